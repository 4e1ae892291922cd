"""Detects named pipes and devices, because opening one can wait forever."""

import errno
import os
import stat


def check_regular(path: str | os.PathLike) -> None:
    """
    Raises OSError if path is a named pipe, a device or a socket, is missing, or cannot be a name. Accepts a folder.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a zero byte, for example from a damaged file that names another
        raise OSError(errno.EINVAL, 'not a valid name', os.fspath(path)) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, 'not a regular file', os.fspath(path))
