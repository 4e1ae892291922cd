"""`like_windows.py SCRIPT [ARGUMENT ...]` runs a script on a Python without the modules that Windows lacks."""

import os
import select
import signal
import sys

sys.modules['resource'] = sys.modules['fcntl'] = None  # importing one raises ImportError
del select.poll, signal.SIGHUP, os.getuid, os.pread, os.pwrite, os.O_CLOEXEC

from script import run_script

run_script()
