"""`slow_evaluation.py TRAIN.PY [FLAG ...]` runs a train.py whose evaluations take 50 ms per batch; progress is silent for 0.3 s only."""

import time

from script import run_script

import progress
import token_files

progress.SILENT_S, progress.INTERVAL_S = 0.3, 0.1
sample = token_files.TokenFiles.sample


def slow_sample(self, *args):
    time.sleep(0.05)
    return sample(self, *args)


token_files.TokenFiles.sample = slow_sample
run_script()
