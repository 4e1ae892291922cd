"""
Manages the folder of a run's checkpoints and logs: creates it, detects another run that uses it, and renames the
checkpoints that an earlier run left.
"""

import glob
import os
import re
import shutil
import sys
from contextlib import suppress

from errors import UserError

started_in = os.getcwd()
unsaved_runs = set()  # folders where this process trains from scratch and has not saved yet
other_best = set()  # folders whose best checkpoint has a validation loss that is not comparable with this run's
shared = set()  # folders that another run used when this process started


def make_out_dir(out_dir: str, init_from: str) -> None:
    """Creates the folder of checkpoints and logs. Raises UserError if that fails."""
    if init_from != 'resume':
        unsaved_runs.add(os.path.abspath(out_dir))
    try:
        out_dir.encode()  # torch opens only file names in UTF-8
        if os.path.islink(out_dir) and not os.path.exists(out_dir):
            raise FileNotFoundError(f'it is a link to {os.path.realpath(out_dir)}, which does not exist')
        os.makedirs(out_dir, exist_ok=True)
        if not os.access(out_dir, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError('not writable, or not readable')
    except (OSError, UnicodeEncodeError) as e:
        raise UserError(f'out_dir={out_dir} cannot be used: {e}') from None
    for path in (os.path.join(out_dir, name) for name in ('ckpt.pt', 'ckpt_best.pt')):
        if os.path.islink(path):
            print(
                f'note: {path} is a link to {os.path.realpath(path)}, which stays as it is, because the next save '
                'replaces the link: to save on another disk, make out_dir a link to a folder there'
            )
    alone = alone_in(out_dir)
    if alone:
        _remove_what_killed_runs_left(out_dir)
    elif alone is False:
        print(
            f"WARNING: another run is using out_dir={out_dir}: the two overwrite each other's checkpoints",
            file=sys.stderr,
        )
        shared.add(os.path.abspath(out_dir))


def make_again(folder: str) -> None:
    """Creates the folder, and the working folder too, if they were deleted during the run. Raises OSError."""
    try:
        os.getcwd()
    except FileNotFoundError:  # relative names lead nowhere, even if there is a new folder of the same name
        os.makedirs(started_in, exist_ok=True)
        os.chdir(started_in)
    os.makedirs(folder, exist_ok=True)


def alone_in(folder: str) -> bool | None:
    """
    Returns whether no other process that has called this function for the folder is still running, and None if the
    system or the file system has no locks.
    """
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY)  # until this process ends
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            with suppress(BlockingIOError):  # an older version keeps the exclusive lock
                # all hold this one, so that a later process is not alone before the last of them has ended
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return None


def _remove_what_killed_runs_left(out_dir):
    """Removes unfinished checkpoints whose names no later run uses. Only a run that is alone in out_dir may call it."""
    names = [name for name in os.listdir(out_dir) if re.fullmatch(r'ckpt.*\.pt\.\d+\.tmp', name)]
    names += glob.glob('ckpt_*/saving*', root_dir=out_dir)
    for path in (os.path.join(out_dir, name) for name in names):
        with suppress(OSError):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def set_aside(out_dir: str) -> None:
    """
    Renames the checkpoints of an earlier run: ckpt.pt, ckpt_best.pt and folders ckpt_*, which hold checkpoints of
    several files. Call it in each save; it acts once, in a run from scratch. The new names end in _before, or else
    _before_2, and so on, so that nothing is overwritten. Raises OSError if renaming fails.
    """
    if os.path.abspath(out_dir) not in unsaved_runs:
        return
    names = sorted(os.listdir(out_dir))
    found = [name for name in names if name in ('ckpt.pt', 'ckpt_best.pt') or is_checkpoint_folder(out_dir, name)]
    _rename(out_dir, found, 'belongs to another run')
    unsaved_runs.discard(os.path.abspath(out_dir))


def set_best_aside(out_dir: str, path: str) -> None:
    """
    Renames the best checkpoint at path in the same way, if resume.py has found its loss not comparable. Call it before
    each save of a best checkpoint; it acts once.
    """
    if os.path.abspath(out_dir) in other_best and os.path.exists(path):
        _rename(os.path.dirname(path), [os.path.basename(path)], 'has the lowest loss measured on other tokens')
    other_best.discard(os.path.abspath(out_dir))


def _rename(folder, found, reason):
    """Gives the files named in `found` new names, with one ending for all of them, and prints them."""
    names = os.listdir(folder)

    def renamed(name, ending):
        stem, dot, extension = name.partition('.')
        return stem + ending + dot + extension

    number = 1
    while {renamed(name, _ending(number)) for name in found} & set(names):
        number += 1
    for name in found:
        new = renamed(name, _ending(number))
        os.rename(os.path.join(folder, name), os.path.join(folder, new))
        print(f'{os.path.join(folder, name)} {reason}: renamed to {new}')


def temporary(path: str) -> str:
    """
    Returns the name under which a file for path is written. A killed run leaves at most one such file, which the next
    one overwrites or removes. If two runs share a folder, the second uses names of its own, and so does a run that
    finds a folder of that name.
    """
    name = f'{path}{own_ending(os.path.dirname(path))}.tmp'
    return f'{path}.{os.getpid()}.tmp' if os.path.isdir(name) else name


def own_ending(out_dir: str) -> str:
    """Returns an ending for names of temporary files, '' unless another run uses the folder too."""
    return f'.{os.getpid()}' if os.path.abspath(out_dir) in shared else ''


def is_checkpoint_folder(out_dir: str, name: str) -> bool:
    """Returns whether out_dir/name is a folder of checkpoints that was not set aside."""
    return name.startswith('ckpt_') and '_before' not in name and os.path.isdir(os.path.join(out_dir, name))


def _ending(number):
    return '_before' if number == 1 else f'_before_{number}'
