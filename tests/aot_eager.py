"""
`aot_eager.py TRAIN.PY [FLAG ...]` runs it with a torch.compile that captures graphs, and their gradients, and leaves the operations in
them as they are: what compiling a CPU's code in minutes would show of the graphs, in seconds. Prints how many there were.
"""

import functools
import os
import runpy
import sys

import torch
import torch._dynamo.utils
import torch.distributed as dist

del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
torch.compile = functools.partial(torch.compile, backend='aot_eager')
destroy = dist.destroy_process_group


def report():
    counters = torch._dynamo.utils.counters
    print('graphs', counters['stats']['unique_graphs'], 'breaks', len(counters['graph_break']))
    destroy()


dist.destroy_process_group = report
runpy.run_path(sys.argv[0], run_name='__main__')
