"""
Searches the data for tokens outside the vocabulary while the model trains.

One thread on each machine reads every file once, at the speed of memory if the file is cached. If this takes longer
than a few seconds, it shows its progress on a terminal. A token it finds becomes data.problem, which ends the run at
the next step boundary, after a save.
"""

import sys
import threading
import time

import numpy as np

import torchrun_env
from data_identity import in_both_splits
from token_files import outside_vocabulary, unreadable

CHUNK = 4 << 20  # bytes; all the memory that the thread needs
SECONDS = 5  # between two progress lines


def scan_in_background(data, vocab_size: int) -> threading.Thread:
    """
    Starts the scan of all files of the Dataset on the first rank of each machine and returns its thread, which ends
    when the scan does, or with the process.
    """
    thread = threading.Thread(target=_scan, args=(data, vocab_size), daemon=True, name='data scan')
    if torchrun_env.first_on_machine():
        thread.start()
    return thread


def _scan(data, vocab_size):
    warning = in_both_splits(data.full_manifest())  # now, before anything can replace the files
    if warning and torchrun_env.number('RANK', 0) == 0:
        print(f'WARNING: {warning}', file=sys.stderr)
    files = [file for tokens in data.splits.values() for file in tokens.files if _can_exceed(file, vocab_size)]
    files.sort(key=lambda file: file.bytes)  # small files are checked before the first steps are done
    total, done, shown = sum(file.bytes for file in files), 0, time.monotonic()
    for file in files:
        position = 0  # in tokens
        try:
            for tokens in _chunks(file):
                if tokens.max() >= vocab_size:  # max() releases Python's lock
                    i = int(np.argmax(tokens >= vocab_size))
                    message = outside_vocabulary(file.path, position + i, tokens[i], vocab_size)
                    data.problems.append((file.path, message))
                    return
                position += len(tokens)
                done += tokens.nbytes
                if time.monotonic() - shown > SECONDS and sys.stderr.isatty():
                    shown = time.monotonic()
                    print(f'checking the tokens: {done / 1e9:.1f} of {total / 1e9:.1f} GB', file=sys.stderr)
        except OSError as e:
            data.problems.append((file.path, unreadable(file.path, e)))
            return


def _can_exceed(file, vocab_size):
    return np.iinfo(file.dtype).max >= vocab_size


def _chunks(file):
    """Yields the tokens of the file in chunks, which all reuse one buffer."""
    buffer = np.empty(CHUNK // file.dtype.itemsize, file.dtype)
    with open(file.path, 'rb') as f:
        f.seek(file.offset)
        while count := f.readinto(buffer) // file.dtype.itemsize:
            yield buffer[:count]
