"""
The folder of a run's checkpoints and logs: creates it, notices another run that uses it, and sets aside what an earlier run left.
"""

import os
import shutil
import sys

from errors import UserError

not_ours = set()  # folders in which this run begins anew, and has not saved yet


def make_out_dir(out_dir, init_from):
    """Creates the folder of checkpoints and logs. Raises UserError where that cannot be."""
    if init_from != 'resume':
        not_ours.add(os.path.abspath(out_dir))
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


def set_aside(out_dir):
    """Before a run that began anew saves for the first time: what another run has saved in out_dir is kept, once, as *_before."""
    if os.path.abspath(out_dir) not in not_ours:
        return
    not_ours.discard(os.path.abspath(out_dir))
    for name, before in (
        ('ckpt.pt', 'ckpt_before.pt'),
        ('ckpt_best.pt', 'ckpt_best_before.pt'),
        ('ckpt_sharded', 'ckpt_sharded_before'),
    ):
        old, new = os.path.join(out_dir, name), os.path.join(out_dir, before)
        if os.path.exists(old):
            if os.path.isdir(new):
                shutil.rmtree(new)  # a folder does not replace a full one
            os.replace(old, new)
            print(f'{old} is of another run, and becomes {before}')
