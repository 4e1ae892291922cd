"""Writes 3,000 iterations to a log that may not grow beyond 200,000 bytes, and prints its path: `log_to_a_small_disk.py FOLDER LOG_FOLDER`."""

import resource
import signal
import sys

sys.path.insert(0, sys.argv[1])
from training_logger import TrainingLogger

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
log = TrainingLogger(sys.argv[2], {}, {})
for i in range(3000):
    log.iteration(i, loss=1.0, lr=1e-3, time_ms=20.0, tokens_per_sec=1e5)
log.close('completed')
print(log.path)
