"""
The folder of a run's checkpoints and logs: creates it, notices another run that uses it, and sets aside what an earlier run left.
"""

import os
import sys

from errors import UserError

unsaved_runs = set()  # folders in which this process trains from scratch and has not saved yet


def make_out_dir(out_dir: str, init_from: str) -> None:
    """Creates the folder of checkpoints and logs. Raises UserError if that fails."""
    if init_from != 'resume':
        unsaved_runs.add(os.path.abspath(out_dir))
    try:
        out_dir.encode()  # torch opens checkpoints by names in UTF-8 only
        os.makedirs(out_dir, exist_ok=True)
        if not os.access(out_dir, os.W_OK):
            raise PermissionError('not writable')
    except (OSError, UnicodeEncodeError) as e:
        raise UserError(f'out_dir={out_dir} cannot be used: {e}') from None
    try:
        import fcntl

        fcntl.flock(os.open(out_dir, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        print(
            f'WARNING: another run is using out_dir={out_dir}: each overwrites the checkpoints of the other',
            file=sys.stderr,
        )
    except (ImportError, OSError):
        pass  # a file system, or a system, without such locks


def set_aside(out_dir: str) -> None:
    """
    Call before each save. The first time in a run from scratch, renames the checkpoints of an earlier run: ckpt.pt,
    ckpt_best.pt and folders ckpt_*, in which trainers keep checkpoints of several files. The new names end in _before,
    _before_2, ...: the first that is free, so that nothing is overwritten. Raises OSError if that fails.
    """
    if os.path.abspath(out_dir) not in unsaved_runs:
        return
    names = sorted(os.listdir(out_dir))
    found = [name for name in names if name in ('ckpt.pt', 'ckpt_best.pt') or is_checkpoint_folder(out_dir, name)]

    def renamed(name, ending):
        stem, dot, extension = name.partition('.')
        return stem + ending + dot + extension

    number = 1
    while {renamed(name, _ending(number)) for name in found} & set(names):
        number += 1
    for name in found:
        new = renamed(name, _ending(number))
        os.rename(os.path.join(out_dir, name), os.path.join(out_dir, new))
        print(f'{os.path.join(out_dir, name)} is of another run, and becomes {new}')
    unsaved_runs.discard(os.path.abspath(out_dir))


def is_checkpoint_folder(out_dir: str, name: str) -> bool:
    """Returns whether out_dir/name is a folder of checkpoints that was not set aside."""
    return name.startswith('ckpt_') and '_before' not in name and os.path.isdir(os.path.join(out_dir, name))


def _ending(number):
    return '_before' if number == 1 else f'_before_{number}'
