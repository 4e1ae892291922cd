"""
`aot_eager.py TRAIN.PY [FLAG ...]` runs it with a torch.compile that captures graphs, and their gradients, and leaves the operations in
them as they are: what compiling a CPU's code in minutes would show of the graphs, in seconds. Prints how many there were.
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
