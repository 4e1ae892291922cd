"""Stops a run at the next step boundary, on all ranks together."""

import signal
import time

from distributed import max_over_ranks
from output import Output, discard_stuck_output


class StopSignal:
    """
    Stops a run at the next step boundary, not in the middle of a step, after one of these signals: SIGTERM, SIGINT
    (Ctrl-C), SIGHUP (a closed terminal), SIGUSR1 and SIGUSR2 (schedulers send them before a time limit), and SIGXCPU (a
    limit of CPU time).
    The handler only records the signal: another rank may be inside a collective, so the ranks must leave the loop
    together. A problem of the data stops the run in the same way, so that it saves first.
    """

    def __init__(self, data=None):
        self.data, self.received_at = data, None  # a Dataset or None; time of the first signal
        limits = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *limits):
            # nohup ignores SIGHUP, and the user may handle SIGUSR1 and SIGUSR2
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._handle)

    def _handle(self, number, frame):
        # one Ctrl-C arrives twice, from the terminal and from torchrun; a later one comes from an impatient user
        if number == signal.SIGINT and self.received_at and time.monotonic() - self.received_at > 2:
            raise KeyboardInterrupt
        self.received_at = self.received_at or time.monotonic()
        Output.stop_requested = True
        discard_stuck_output()  # a print of this thread may be waiting for a reader

    def requested(self) -> bool:
        """Returns True on every rank if any rank must stop. Collective on the CPU: it does not wait for the GPU."""
        problem = self.data is not None and self.data.problem is not None
        return bool(max_over_ranks(self.received_at is not None or Output.reader_gone or problem))
