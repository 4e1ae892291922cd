"""
UserError, for the user's mistakes. Raise it anywhere, on any rank: importing this module makes error_reporter.py print
one message from one rank, without a traceback, and exit with status 2. Scripts import it first, so that a Python that
is too old or lacks a package is one message too.
"""

import re
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    print(f'error: this needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}', file=sys.stderr)
    sys.exit(2)

# messages of CUDA, cuBLAS, PyTorch and NumPy about exhausted memory
OUT_OF_MEMORY = re.compile(
    r"out of memory|ALLOC_FAILED|can't allocate memory|cannot allocate memory|unable to allocate"
    r'|storage size calculation overflowed',
    re.I,
)


class UserError(Exception):
    """A user's mistake. The message says what was wrong, where, and what to do about it."""


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).splitlines()), '') or type(error).__name__


def causes(error: BaseException | None):
    """Yields the error, its cause or context, the cause or context of that, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException) -> str:
    """
    Returns the first line about the OSError among `error` and its causes, or about `error`. torch's writer turns a full
    disk into a RuntimeError about positions in the file.
    """
    return first_line(next((cause for cause in causes(error) if isinstance(cause, OSError)), error))


def out_of_memory(error: BaseException) -> BaseException | None:
    """Returns the error among `error` and its causes that reports exhausted memory, or None."""
    for cause in causes(error):
        if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and OUT_OF_MEMORY.search(str(cause))):
            return cause
    return None


import error_reporter  # noqa: F401  last, because it imports the names above
