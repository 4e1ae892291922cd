"""
Decides which rank prints, and keeps a failure to print from ending a run.

Only rank 0 prints to stdout. Any rank may print warnings to stderr. The rank that error_reporter.py chooses prints the
error that ends a run to stderr.
"""

import os
import select
import sys
from contextlib import suppress

import torchrun_env

PATIENCE_S = 10


class Output:
    """
    Wraps stdout or stderr so that a failure to print never ends a run. Output is lost if the disk is full, or if the
    terminal was closed under nohup. On a broken pipe, reader_gone becomes True, and StopSignal ends the run with a
    save: in `train.py | tee`, Ctrl-C ends `tee` too. Once StopSignal sets stop_requested, output that nobody reads is
    lost too, so that the save need not wait. With several ranks, it is lost after PATIENCE_S, as in a terminal after
    Ctrl-S, because the other ranks would give up waiting for this one.
    """

    # shared by all streams
    reader_gone = False
    stop_requested = False

    def __init__(self, stream):
        self.stream, self.lost = stream, 0  # number of writes that are lost since the last one that was not
        with suppress(AttributeError, OSError):  # a notebook's stream, or one that cannot flush to a full disk
            # for characters that the terminal's encoding lacks; and a kill loses no line
            stream.reconfigure(errors='backslashreplace', line_buffering=True)

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, function, *args):
        if Output.stop_requested:
            discard_stuck_output()
        elif torchrun_env.number('WORLD_SIZE', 1) > 1:
            if not _takes_output(self.stream, 0 if self.lost else PATIENCE_S):
                self.lost += 1
                return
        try:
            if self.lost:
                self.stream.write('\n... (lines are missing, because nobody read them for a while)\n')
                self.lost = 0
            function(*args)
        except BrokenPipeError:
            Output.reader_gone = True
        except OSError:
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def discard_stuck_output() -> None:
    """
    Redirects stdout and stderr to /dev/null if they are full and nobody reads them for a second, such as a pipe into
    `less`. Called by a signal handler, it also ends the print that the signal interrupted.
    """
    for stream in (sys.__stdout__, sys.__stderr__):
        if not _takes_output(stream, 1):
            with open(os.devnull, 'wb') as null:
                os.dup2(null.fileno(), stream.fileno())


def _takes_output(stream, timeout_s):
    """Returns whether the stream accepts a line within timeout_s, or cannot tell."""
    with suppress(AttributeError, OSError, ValueError):  # no stream, or a closed one
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return bool(poll.poll(timeout_s * 1000))
    return True


def silence_other_ranks() -> None:
    """Discards the stdout of every rank but rank 0."""
    if torchrun_env.number('RANK', 0) != 0:
        sys.stdout = open(os.devnull, 'w')


def protect_output() -> None:
    """Wraps stdout and stderr of this process in Output."""
    sys.stdout, sys.stderr = (Output(stream or open(os.devnull, 'w')) for stream in (sys.stdout, sys.stderr))


def print_error(text: str) -> None:
    """Prints the error that ends this process. Uses sys.__stderr__, because torch's excepthook buffers sys.stderr."""
    with suppress(OSError):  # a full disk
        print(text, file=sys.__stderr__, flush=True)
