"""Asks a run to stop at the next step boundary, on all ranks together."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from output import Output


class StopSignal:
    """
    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) ask a run to stop at the next step boundary instead of killing it in mid-step. The handler
    may only take note: another rank may be inside a collective, and only together can ranks leave the loop.
    """

    def __init__(self):
        self.received = None  # time of the first signal
        self.data = None  # a Dataset; a problem with it stops the run too
        self.unread = False  # what is printed, because its reader has gone
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL else []  # nohup has it ignored
        for number in (signal.SIGTERM, signal.SIGINT, *hangup):
            signal.signal(number, self._handle)
        sys.stdout, sys.stderr = (Output(stream or open(os.devnull, 'w'), self) for stream in (sys.stdout, sys.stderr))

    def _handle(self, number, frame):
        # a Ctrl-C reaches a process twice, from the terminal and from torchrun; a later one is from an impatient user
        if number == signal.SIGINT and self.received and time.time() - self.received > 2:
            raise KeyboardInterrupt
        self.received = self.received or time.time()

    def requested(self):
        """True on every rank if any rank is to stop. Collective, over the CPU: does not wait for the GPU."""
        wanted = self.received is not None or self.unread or bool(self.data and self.data.problem)
        if not dist.is_initialized():
            return wanted
        flag = torch.tensor(float(wanted))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
