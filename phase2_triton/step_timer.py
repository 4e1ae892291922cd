"""The time of a training step, without evaluations and saves."""

import time
from contextlib import contextmanager

from hardware import now


class StepTimer:
    """
    Measures the mean time of the iterations between two laps. The caller waits for the device before it calls lap(),
    which then costs nothing.
    """

    def __init__(self, device: str, iter_num: int):
        self.device, self.started, self.first_iter = device, now(device), iter_num

    @contextmanager
    def pause(self):
        """`with timer.pause():` leaves out the time of the block."""
        paused = now(self.device)
        yield
        self.started += now(self.device) - paused

    def lap(self, iter_num: int) -> float:
        """Returns the seconds per iteration since the previous lap, up to and including iteration iter_num."""
        stopped = time.perf_counter()
        seconds = (stopped - self.started) / (iter_num + 1 - self.first_iter)
        self.started, self.first_iter = stopped, iter_num + 1
        return seconds
