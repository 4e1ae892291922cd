"""Detects named pipes and devices, because opening one can wait forever."""

import errno
import os
import stat


def check_regular(path: str | os.PathLike) -> None:
    """Raises OSError if path is a named pipe, a device or a socket, or is missing. Accepts a folder."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, 'not a regular file', os.fspath(path))
