"""
For each line `LOG_FOLDER COUNTER` of stdin, a forked process writes records to a log as fast as it can until a signal ends it. Prints
that process's id and the path of its log, and `ended` after its end. The file COUNTER holds how many iterations have been handed to
the logger, in shared memory, so that the number outlives a SIGKILL. `log_forever.py FOLDER` of training_logger.py.
"""

import itertools
import mmap
import os
import signal
import sys

sys.path.insert(0, sys.argv[1])
from training_logger import TrainingLogger


def log_forever(folder, counter):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    with open(counter, 'r+b') as f:
        sent = memoryview(mmap.mmap(f.fileno(), 8)).cast('q')
    log = TrainingLogger(folder, {'a': 1}, {'phase': 'x'})
    print(os.getpid(), log.path, flush=True)
    usual = dict(lr=1e-3, time_ms=20.0, tokens_per_sec=1e5 / 3, mfu=0.3, peak_memory_bytes=1 << 33)
    for i in itertools.count():
        log.iteration(i, loss=1.0 / (i + 1), grad_norm=i / 7, **usual)
        if i % 10 == 0:
            log.evaluation(i, train_loss=1.0, val_loss=1.1 + 1 / (i + 1), lr=1e-3)
            log.checkpoint(i, path='out/ckpt.pt', bytes=1, seconds=0.1)
        sent[0] = i + 1


for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        log_forever(*line.split())
    os.waitpid(pid, 0)
    print('ended', flush=True)
