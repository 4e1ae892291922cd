"""
A run that ends while a thread still works, for which the interpreter would wait: `finished_run.py FOLDER`.
"""

import atexit
import sys
import threading

sys.path.insert(0, sys.argv[1])
from distributed import join_ranks, leave_ranks

join_ranks('gloo', 60)
atexit.register(print, 'exit functions have run', flush=True)
threading.Thread(target=threading.Event().wait).start()
leave_ranks()
