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


class Output:
    """
    Wraps stdout or stderr so that a failure to print never ends a run. Output is lost if the disk is full, or if the
    terminal was closed under nohup. On a broken pipe, reader_gone becomes True, and StopSignal ends the run with a
    save: in `train.py | tee`, Ctrl-C ends `tee` too. Once StopSignal sets stop_requested, output that nobody reads is
    lost too, so that the save need not wait.
    """

    # shared by all streams
    reader_gone = False
    stop_requested = False

    def __init__(self, stream):
        self.stream = stream
        with suppress(AttributeError, OSError):  # a notebook's stream, or one that cannot flush to a full disk
            stream.reconfigure(errors='backslashreplace')  # for characters that the terminal's encoding lacks

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, function, *args):
        if Output.stop_requested:
            discard_stuck_output()
        try:
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
        with suppress(AttributeError, OSError, ValueError):  # no stream, or a closed one
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if not poll.poll(1000):
                with open(os.devnull, 'wb') as null:
                    os.dup2(null.fileno(), stream.fileno())


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
