"""
`signal_in_a_save.py TRAIN.PY [FLAG ...]` for ZeRO-1: rank 1 gets the signal SIGNAL (a number) as it sends its first shard of the save
number SAVE (from 1).
"""

import os

import torch.distributed as dist
from script import run_script

number, nth = int(os.environ['SIGNAL']), int(os.environ['SAVE'])
gather, send, gathers = dist.gather_object, dist.send, 0


def counting_gather(*args, **kwargs):
    global gathers
    gathers += 1  # two in each save: which shards there are, then the ranks' generators
    return gather(*args, **kwargs)


def send_and_signal(*args, **kwargs):
    if gathers == 2 * nth - 1:
        os.kill(os.getpid(), number)
    return send(*args, **kwargs)


dist.gather_object, dist.send = counting_gather, send_and_signal
run_script()
