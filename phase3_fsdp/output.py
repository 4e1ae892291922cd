"""
Who may print, and what becomes of a message that cannot be printed.

Rank 0 alone prints to stdout. Warnings go to stderr, from any rank. The report of the error that ends a run goes to stderr
too, from the rank that error_reporter.py chooses.
"""

import os
import sys
from contextlib import suppress

import torchrun_env


class Output:
    """
    Wraps stdout or stderr so that no failure to print ends a run: text for a full disk, or for a terminal that was closed
    under nohup, is lost. If nobody reads a pipe any more, reader_gone becomes True, and StopSignal ends the run with a save:
    a Ctrl-C ends the `tee` of `| tee` too.
    """

    reader_gone = False  # of any stream

    def __init__(self, stream):
        self.stream = stream
        with suppress(AttributeError, OSError):  # a notebook's stream, or one with unwritten text for a full disk
            stream.reconfigure(errors='backslashreplace')  # for characters that the terminal's encoding lacks

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, function, *args):
        try:
            function(*args)
        except BrokenPipeError:
            Output.reader_gone = True
        except OSError:
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def silence_other_ranks():
    """Lets rank 0 alone print to stdout. The other ranks' stdout leads nowhere."""
    if torchrun_env.number('RANK', 0) != 0:
        sys.stdout = open(os.devnull, 'w')


def protect_output():
    """Wraps stdout and stderr of this process in Output."""
    sys.stdout, sys.stderr = (Output(stream or open(os.devnull, 'w')) for stream in (sys.stdout, sys.stderr))


def print_error(text):
    """Prints the error that ends this process. sys.stderr is no use: torch's own excepthook, around ours, holds it back."""
    with suppress(OSError):  # a full disk
        print(text, file=sys.__stderr__, flush=True)
