"""Limits files to 100,000 bytes, so that writing a checkpoint fails half-way, as on a full disk."""

import resource
import signal

from script import run_script

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a refused write raises an error instead of ending the process
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_script()
