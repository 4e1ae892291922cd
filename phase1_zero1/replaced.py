"""Writes small files so that other programs never read half of one."""

import os
from contextlib import contextmanager, suppress


@contextmanager
def replaced(path: str | os.PathLike):
    """
    Yields the name of a temporary file, hidden and next to path, that replaces path at the end of the block. If the
    block raises, path stays as it was. Raises OSError, with path in its message, if the file cannot be written. Follows
    a link.
    """
    folder, name = os.path.split(os.path.realpath(path))
    stem, ending = os.path.splitext(name)
    temporary = os.path.join(folder, f'.{stem}.tmp{os.getpid()}{ending}')
    try:
        yield temporary
        os.replace(temporary, os.path.join(folder, name))
    except OSError as error:
        raise OSError(f'{path} cannot be written: {error.strerror or error}') from error
    finally:
        with suppress(OSError):
            os.remove(temporary)
