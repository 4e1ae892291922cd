"""No file can be larger than 100,000 bytes: a checkpoint fails in the middle of its write, as on a full disk."""

import resource
import signal

from script import run_script

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is refused is an error, not the end
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_script()
