"""Measures the time of training steps, without evaluations and saves."""

import time
from contextlib import contextmanager

from hardware import now


class StepTimer:
    """
    Measures the mean time per iteration between two laps. lap() does not wait for the device: the caller must do so
    first.
    """

    def __init__(self, device: str, iter_num: int):
        self.device, self.started, self.first_iter = device, now(device), iter_num

    @contextmanager
    def pause(self):
        """Excludes the time of the block: `with timer.pause():`."""
        pause_started = now(self.device)
        yield
        self.started += now(self.device) - pause_started

    def lap(self, iter_num: int) -> float:
        """Returns the seconds per iteration since the previous lap, up to and including iteration iter_num."""
        stopped = time.perf_counter()
        seconds = (stopped - self.started) / (iter_num + 1 - self.first_iter)
        self.started, self.first_iter = stopped, iter_num + 1
        return seconds
