"""A run that has ended while a thread is still at work, which the interpreter would wait for: `finished_run.py FOLDER`."""

import atexit
import sys
import threading

sys.path.insert(0, sys.argv[1])
from distributed import leave, setup

setup('gloo', 60)
atexit.register(print, 'exit functions have run', flush=True)
threading.Thread(target=threading.Event().wait).start()
leave()
