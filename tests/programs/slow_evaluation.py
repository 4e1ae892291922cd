"""`slow_evaluation.py TRAIN.PY [FLAG ...]`: evaluations take 50 ms per batch; progress is silent for 0.3 s only."""

import time

from script import run_script

import progress
import token_files

progress.SILENT_S, progress.INTERVAL_S = 0.3, 0.1


def slow(read):
    def slow_read(self, *args):
        time.sleep(0.05)
        return read(self, *args)

    return slow_read


token_files.TokenFiles.sample = slow(token_files.TokenFiles.sample)
token_files.TokenFiles.consecutive = slow(token_files.TokenFiles.consecutive)
run_script()
