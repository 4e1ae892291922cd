"""Rank 0 waits for rank 1, which does not come, in groups that were made after the first: `wait_for_a_group.py FOLDER`."""

import sys
import time

sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from distributed import setup
from torch.distributed.device_mesh import init_device_mesh

rank, world_size = setup('gloo', 3)
mesh = init_device_mesh('cpu', (1, 2), mesh_dim_names=('replicate', 'shard'))
groups = [dist.new_group(backend='gloo'), mesh.get_group('shard')]
if rank == 1:
    time.sleep(100)
for group in groups:
    started = time.time()
    try:
        dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        print(f'{time.time() - started:.1f} s')
raise RuntimeError('enough')
