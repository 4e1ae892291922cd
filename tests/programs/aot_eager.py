"""
`aot_eager.py TRAIN.PY [FLAG ...]` runs it with a torch.compile that captures graphs and their gradients but generates
no code, which takes seconds instead of minutes on a CPU. Prints the number of graphs.
"""

import functools

import torch
import torch._dynamo.utils
import torch.distributed as dist
from script import run_script

torch.compile = functools.partial(torch.compile, backend='aot_eager')
destroy = dist.destroy_process_group


def report():
    counters = torch._dynamo.utils.counters
    print('graphs', counters['stats']['unique_graphs'], 'breaks', len(counters['graph_break']))
    destroy()


dist.destroy_process_group = report
run_script()
