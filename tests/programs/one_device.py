"""
`one_device.py TRAIN.PY [FLAG ...]` runs a train.py on a single CPU or GPU as if there were several ranks. Alone it is the only one of a
process group: FSDP then does all that it does on many, but for the sending. Under torchrun, with --backend=gloo (NCCL refuses
that), all ranks share one GPU, and they send too:

    torchrun --standalone --nproc_per_node=2 tests/programs/one_device.py phase3_fsdp/train.py --backend=gloo ...
"""

import os

import torch.distributed as dist
from script import run_script

import distributed


class Several(int):
    """A number of ranks that is more than any other."""

    def __gt__(self, other):
        return True


def setup(backend, timeout_s):
    dist.init_process_group(
        'cpu:gloo,cuda:nccl' if backend == 'nccl' else backend, store=dist.HashStore(), rank=0, world_size=1
    )
    return 0, Several(1)


if int(os.environ.get('WORLD_SIZE', 1)) > 1:
    os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')  # the only GPU
else:
    distributed.setup = setup
run_script()
