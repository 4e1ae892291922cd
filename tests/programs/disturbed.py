"""
`disturbed.py TRAIN.PY [FLAG ...]` with a fault: FAULT is term, kill, disk or none. It happens on rank VICTIM, DELAY seconds after the
first step of the run or, with EARLY=1, after its start. After a full disk with FREED=1 there is room again. Rank 0 creates the file
`started` after the first step, and adds its resident memory to the file `memory` four times a second: time and bytes.
"""

import os
import resource
import signal
import threading
import time

from script import run_script
from training_logger import TrainingLogger

fault, rank = os.environ['FAULT'], os.environ.get('RANK', '0')


def disturb():
    while os.environ.get('EARLY') != '1' and not os.path.exists('started'):
        time.sleep(0.005)
    time.sleep(float(os.environ['DELAY']))
    if fault == 'disk':
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        time.sleep(0.3)
        if os.environ['FREED'] == '1':  # else the last save fails, too
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL if fault == 'kill' else signal.SIGTERM)


def note_memory():
    while True:
        with open('/proc/self/statm') as f, open('memory', 'a') as out:
            out.write(f'{time.time()} {int(f.read().split()[1]) * resource.getpagesize()}\n')
        time.sleep(0.25)


signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write that is refused is an error, not the end
if rank == '0':
    iteration = TrainingLogger.iteration

    def first_iteration(*args, **kwargs):
        with open('started', 'w'):
            pass
        return iteration(*args, **kwargs)

    TrainingLogger.iteration = first_iteration
    threading.Thread(target=note_memory, daemon=True).start()
if fault != 'none' and rank == os.environ['VICTIM']:
    threading.Thread(target=disturb, daemon=True).start()
run_script()
