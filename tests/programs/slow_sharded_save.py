"""Each rank waits SAVE_SECONDS before it writes its part of a sharded checkpoint. With NAN_AFTER=n, all steps after n fail."""

import itertools
import os
import time

import torch.distributed.checkpoint as dcp
from script import run_script
from step_guard import StepGuard

seconds, nan_after = float(os.environ['SAVE_SECONDS']), float(os.environ.get('NAN_AFTER', 'inf'))
save, step, steps = dcp.save, StepGuard.step, itertools.count()


def slow_save(*args, **kwargs):
    time.sleep(seconds)
    return save(*args, **kwargs)


def step_or_nan(self, optimizer, norm):
    step(self, optimizer, norm if next(steps) < nan_after else norm * float('nan'))


dcp.save, StepGuard.step = slow_save, step_or_nan
run_script()
