"""
What the ranks of one run do together: start, average, gather, and agree to stop.

Each function is called on every rank, and each works in a single process as well.
"""

import os
import signal
import time

import torch
import torch.distributed as dist


def setup(backend):
    """Joins the process group if torchrun started several processes. Returns (rank, world_size)."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world_size > 1:
        # beside NCCL for the GPUs, gloo carries what lives on the CPU, so that it need not wait for the GPU
        dist.init_process_group('cpu:gloo,cuda:nccl' if backend == 'nccl' else backend)
    return rank, world_size


def mean_over_ranks(x):
    """The mean of the tensor x over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def gather_from_ranks(x):
    """On rank 0 the list of every rank's x (any picklable object; tensors on the CPU), on the others None."""
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(x, everyone)
    return everyone


class StopSignal:
    """
    SIGTERM and SIGINT (Ctrl-C) ask a run to stop at the next step boundary instead of killing it in mid-step. The handler
    may only take note: another rank may be inside a collective, and only together can ranks leave the loop.
    """

    def __init__(self):
        self.received = None  # time of the first signal
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        # a Ctrl-C reaches a process twice, from the terminal and from torchrun; a later one is from an impatient user
        if number == signal.SIGINT and self.received and time.time() - self.received > 2:
            raise KeyboardInterrupt
        self.received = self.received or time.time()

    def requested(self):
        """True on every rank if any rank has received a signal. Collective, over the CPU: does not wait for the GPU."""
        if not dist.is_initialized():
            return self.received is not None
        flag = torch.tensor(float(self.received is not None))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
