"""Asks a run to stop at the next step boundary, on all ranks together."""

import signal
import time

from distributed import max_over_ranks
from output import Output


class StopSignal:
    """
    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) ask a run to stop at the next step boundary instead of killing it
    in mid-step. The handler only takes a note: another rank may be inside a collective, so the ranks must leave the loop
    together. A problem of the data asks for the same, so that the run saves before it ends.
    """

    def __init__(self, data=None):
        self.data, self.received_at = data, None  # a Dataset or None; the time of the first signal
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL else []  # nohup has it ignored
        for number in (signal.SIGTERM, signal.SIGINT, *hangup):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        # one Ctrl-C arrives twice, from the terminal and from torchrun; a later one is from an impatient user
        if number == signal.SIGINT and self.received_at and time.time() - self.received_at > 2:
            raise KeyboardInterrupt
        self.received_at = self.received_at or time.time()

    def requested(self) -> bool:
        """Returns True on every rank if any rank is to stop. Collective, over the CPU: it does not wait for the GPU."""
        problem = self.data is not None and self.data.problem is not None
        return bool(max_over_ranks(self.received_at is not None or Output.reader_gone or problem))
