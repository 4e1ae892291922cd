"""
Writes and reads checkpoints. A save is atomic, so a kill at any moment leaves the previous checkpoint whole, and
reading one never executes code from it.

A checkpoint is nanoGPT's dictionary (model, optimizer, model_args, iter_num, best_val_loss, config) with one more key,
`resume`, which nanoGPT ignores. It holds the float16 loss scaler, the name of the run's log, and for each rank the
state of its random generators and the batch it has drawn but not yet used. out_dir/ckpt.pt is the latest checkpoint,
and out_dir/ckpt_best.pt the one with the lowest validation loss.
"""

import glob
import os
import pickle
import re
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import torch
import torch.distributed as dist

import torchrun_env
from checkpoint_crc import DamagedFile, add_crc, check_archive
from checkpoint_fields import check_fields, check_finite
from errors import UserError, first_line, reason
from out_dir import is_checkpoint_folder, make_again, set_aside, set_best_aside, temporary
from regular_file import check_regular
from shell import quote

# prefixes that torch.compile, DDP, FSDP and activation checkpointing add to parameter names
WRAPPERS = re.compile(r'(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# the causal mask, a buffer of nanoGPT's attention before torch 2
MASKS = re.compile(r'(?<![^.])attn\.(?:masked_)?bias$')


def write_checkpoint(checkpoint: dict, out_dir: str, best: bool, required: bool, name: str = 'ckpt.pt') -> dict:
    """
    Writes out_dir/ckpt.pt, or out_dir/name, and if best also a copy of it, ckpt_best.pt. Creates out_dir if it is
    missing.

    Costs one write and an fsync. The copy shares no storage with ckpt.pt, except where the file system clones files
    (Btrfs, XFS) and so makes the copy at no cost. Elsewhere the kernel copies from the page cache, and the copy reaches
    the disk after this function returns. Until then ckpt.pt, which is on the disk, has the same content, and the next
    save waits for the copy before it replaces ckpt.pt. A best save needs the space of two more checkpoints while it
    runs, any other save that of one.

    Returns a dict: path, bytes (None if the save failed), seconds, and best, whether ckpt_best.pt is this checkpoint.
    A save that fails, on a full disk for example, raises UserError if it is required and otherwise prints a warning.
    """
    started = time.monotonic()
    path, best_path = os.path.join(out_dir, name), os.path.join(out_dir, 'ckpt_best.pt')
    unfinished, ours, copied = '', None, False
    try:
        make_again(out_dir)
        unfinished = temporary(path)
        with suppress(FileNotFoundError):
            # left by a killed run; it may share storage with ckpt_best.pt if an old version linked the two
            os.remove(unfinished)
        with open(unfinished, 'wb+') as f:
            ours = os.fstat(f.fileno())
            torch.save(checkpoint, f)
            add_crc(f)
            size = f.tell()
            f.flush()
            os.fsync(f.fileno())  # the name must not change before the bytes are on disk
        if not os.path.samestat(ours, os.stat(unfinished)):  # where out_dir.py's lock does not work
            raise OSError(f'another run is writing {unfinished}')
        set_aside(out_dir)  # only now: if the disk is full, the other run's checkpoints keep their names
        if best:
            set_best_aside(out_dir, best_path)
            with suppress(OSError):
                copied = _copy(unfinished, best_path)
        elif os.path.exists(best_path):
            sync(best_path)  # costs nothing if it is on the disk already
        os.replace(unfinished, path)
        sync(out_dir)
    except (OSError, RuntimeError, MemoryError) as e:  # torch's writer raises RuntimeError on a full disk
        with suppress(OSError):
            if ours and os.path.samestat(ours, os.stat(unfinished)):
                os.remove(unfinished)  # half a checkpoint only takes space
        earlier = 'the earlier one is untouched' if os.path.exists(path) else 'there is no earlier one'
        problem = f'{path} could not be saved ({reason(e)}); {earlier}'
        if required:
            raise UserError(problem) from None
        print(f'WARNING: {problem}, and training continues', file=sys.stderr)
        return {'path': path, 'bytes': None, 'seconds': time.monotonic() - started, 'best': copied}
    if best and not copied:
        try:
            copied = _copy(path, best_path)  # again: the replaced file has freed its space
        except OSError as e:
            print(f'WARNING: {path} is saved, but not its copy {best_path} ({first_line(e)})', file=sys.stderr)
    return {'path': path, 'bytes': size, 'seconds': time.monotonic() - started, 'best': copied}


def write_from_rank_0(checkpoint: dict | None, out_dir: str, best: bool, required: bool) -> dict:
    """
    Calls write_checkpoint() on rank 0, the only rank that needs the checkpoint, and returns its result on every rank,
    or raises its UserError on every rank. Collective. The other ranks may wait longer than dist_timeout: rank 0 writes
    in a thread and tells them every second that it is alive.
    """
    if not dist.is_initialized():
        return write_checkpoint(checkpoint, out_dir, best, required)
    future = None
    if dist.get_rank() == 0:
        arguments = checkpoint, out_dir, best, required
        try:
            future = ThreadPoolExecutor(1).submit(write_checkpoint, *arguments)
        except RuntimeError:  # no more threads (ulimit -u): save all the same, while the others wait for dist_timeout
            future = Future()
            try:
                future.set_result(write_checkpoint(*arguments))
            except UserError as e:
                future.set_exception(e)
    period_s = min(1, dist.distributed_c10d.default_pg_timeout.total_seconds() / 4)
    written = None
    while written is None:
        if future and wait([future], timeout=period_s).done:
            try:
                written = future.result()
            except UserError as e:
                written = {'error': str(e)}
        message = [written]
        dist.broadcast_object_list(message)
        written = message[0]
    if 'error' in written:
        raise UserError(written['error'])
    return written


def _copy(source, target):
    """Copies source to target, which is replaced atomically. Returns True. Raises OSError."""
    unfinished = temporary(target)
    with suppress(FileNotFoundError):
        os.remove(unfinished)
    try:
        with open(source, 'rb') as a, open(unfinished, 'wb') as b:
            try:
                # clones where the file system can, and otherwise copies inside the kernel
                while os.copy_file_range(a.fileno(), b.fileno(), 2**30):
                    pass
            except (AttributeError, OSError):  # another system, an old file system, or a full disk
                a.seek(0)
                b.seek(0)
                b.truncate()
                shutil.copyfileobj(a, b, 2**24)
        os.replace(unfinished, target)
    except OSError:
        with suppress(OSError):
            os.remove(unfinished)
        raise
    return True


def sync(path):
    """Flushes a file, or the names in a folder, to the disk, if that is possible."""
    with suppress(OSError):  # the best checkpoint may be unreadable, and some file systems cannot sync a folder
        check_regular(path)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def find_checkpoint(out_dir: str) -> str:
    """
    Returns the path of the latest checkpoint in out_dir: the file that find_file() returns, or a folder ckpt_* of a
    later iteration, which only the trainer that wrote it can read. Returns out_dir/ckpt.pt if there is none. Raises
    UserError if the folder is unreadable.
    """
    path = find_file(out_dir)
    try:
        names = os.listdir(out_dir) if os.path.isdir(out_dir) else ()
    except OSError as e:  # otherwise a run with init_from=auto would start from scratch
        raise UserError(f'out_dir={out_dir} cannot be read: {e.strerror}') from None
    for name in sorted(name for name in names if is_checkpoint_folder(out_dir, name)):
        folder = os.path.join(out_dir, name)
        # a finished save has such a name; a user's own folder holds none
        complete = glob.glob(os.path.join(glob.escape(folder), 'iter_*', '*'))
        theirs = [int(found[1]) for found in map(re.compile(r'.*/iter_(\d+)_\d+/').match, complete) if found]
        if theirs and (not os.path.exists(path) or iteration_of(path) < max(theirs)):
            path = folder
        elif theirs and iteration_of(path) == max(theirs):
            print(f'{path} and {folder} are of the same iteration, {max(theirs)}: reading {path}')
    return path


def iteration_of(path: str) -> int:
    """
    Returns the checkpoint's iteration, or -1 if the file is unreadable. Does not check other fields and checksums.
    """
    try:
        check_regular(path)
        return int(torch.load(path, map_location='cpu', weights_only=True, mmap=True)['iter_num'])
    except Exception:  # damaged bytes can raise any error; loading the checkpoint reports it
        return -1


def find_file(out_dir: str) -> str:
    """Returns the path of ckpt.pt in out_dir, or of ckpt_best.pt, with a printed line, if only that is left."""
    path, best = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'ckpt_best.pt')
    if not os.path.lexists(path) and os.path.exists(best):
        print(f'{path} is missing, so {best} takes its place')
        return best
    return path


def load_checkpoint(path: str, to_resume: bool = False) -> dict:
    """
    Returns the checkpoint file at path, written by any trainer, with tensors on the CPU and its fields as
    check_fields() returns them. Executes nothing in the file. to_resume: also checks the training state. Raises
    UserError if the file is missing, damaged, a folder, not a checkpoint, or holds code.
    """
    return check_fields(read_file(path), path, to_resume)


def read_file(path: str):
    """Returns the unchecked content of a checkpoint file, tensors on the CPU. Raises UserError if it is unreadable."""
    folder = os.path.dirname(path) or '.'
    try:
        if os.path.isdir(path):
            raise UserError(_about_folder(path))
        # one rank per machine reads all of it; every rank notices a file that was cut short
        check_archive(path, contents=torchrun_env.first_on_machine())
        # mapped into memory, so that the ranks of one machine share the pages they read
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(
                f'{path} is a link to {os.path.realpath(path)}, which does not exist: is its disk mounted?'
            ) from None
        others = _others(path)
        advice = (
            f'the checkpoints there are {others}'
            if others
            else 'train first (train.py --init_from=scratch), or give its folder with --out_dir'
        )
        if torchrun_env.number('WORLD_SIZE', 1) > 1:
            advice += '; several machines need a file system that all of them see'
        raise UserError(f'there is no checkpoint {path}: {advice}') from None
    except NotADirectoryError:
        raise UserError(
            f'there is no checkpoint {path}: {folder} is not a folder; name the right one with --out_dir'
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f'{path} was not loaded: it holds something other than tensors and plain values, '
            'which could run code on this machine, and our checkpoints hold none of that'
        ) from None
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror or first_line(e)}') from None
    except DamagedFile as e:
        others = _others(path)
        advice = f'. Other checkpoints there: {others}' if others else ''
        raise UserError(f'{path} is damaged: {e}{advice}') from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as e:
        # the bytes are intact, but torch.load cannot read them
        raise UserError(f'{path} is not a checkpoint: {type(e).__name__}: {first_line(e)}') from None


def _others(path):
    """Returns the names of the other checkpoint files in path's folder, separated by commas."""
    names = sorted(glob.glob('ckpt*.pt', root_dir=os.path.dirname(path) or '.'))
    return ', '.join(name for name in names if name != os.path.basename(path))


def _about_folder(path):
    """Returns the message about a checkpoint folder, with the command from its README that converts the folder."""
    out_dir = quote(os.path.dirname(os.path.abspath(path)))
    try:
        with open(os.path.join(path, 'README'), encoding='utf-8') as f:
            about = f.read(1000).strip().replace('OUT_DIR', out_dir)
    except (OSError, UnicodeDecodeError):
        about = 'Resume with the trainer that wrote it, or convert it there to a ckpt.pt.'
    return f'{path} is a folder, not a checkpoint file. {about}'


def saved_options(checkpoint: dict, options: dict, flags_set: set) -> dict:
    """
    Returns `options`, the fields of GPTConfig that are flags, with the GELU of the checkpoint, which unlike the others
    belongs to the weights. nanoGPT's own checkpoints do not record it; they use the erf form. Raises UserError if the
    user has set the flag (flags_set) to another form.
    """
    if 'gelu' not in options:  # the user's own model.py
        return options
    saved = checkpoint.get('config', {}).get('gelu', 'erf')
    if 'gelu' in flags_set and options['gelu'] != saved:
        raise UserError(
            f'the checkpoint was trained with gelu={saved}, but the command asks for '
            f'gelu={options["gelu"]}: leave the flag out'
        )
    return {**options, 'gelu': saved}


def load_model(model: torch.nn.Module, checkpoint: dict) -> None:
    """
    Copies the checkpoint's weights into the model. Raises UserError if they do not fit or are not finite, or if weights
    differ that are one tensor in this model. Prints a note on fields of model_args that the model does not have.
    """
    unknown = [f'{k}={v!r:.40}' for k, v in checkpoint['model_args'].items() if not hasattr(model.config, str(k))]
    if unknown:
        print(f"note: the checkpoint's model_args have {', '.join(unknown)}, which this model.py ignores")
    own = model.state_dict()
    saved = fit_names(checkpoint['model'], own)
    wrong = [f'{k} is missing' for k in own if k not in saved] + [f'{k} is unknown' for k in saved if k not in own]
    for k in (k for k in own if k in saved):
        if saved[k].shape != own[k].shape:
            wrong.append(f'{k} is {tuple(saved[k].shape)} instead of {tuple(own[k].shape)}')
        elif saved[k].is_floating_point() != own[k].is_floating_point():
            wrong.append(f'{k} is {saved[k].dtype} instead of {own[k].dtype}')
    if wrong:
        raise UserError(
            f'the checkpoint does not fit its own model_args: {"; ".join(wrong[:3])}'
            + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
        )
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # a trainer may have loaded this rank's shard only
        shard = saved[name].to_local() if hasattr(saved[name], 'to_local') else saved[name]
        check_finite(shard, name)
        first, other = names.setdefault(id(parameter), (name, shard))
        if other is not shard and not torch.equal(other, shard.to(other.dtype)):
            raise UserError(
                f"the checkpoint's {name} differs from its {first}, but in this model.py they are one tensor: the "
                'checkpoint comes from another model.py'
            )
    model.load_state_dict(saved)


def fit_names(saved: dict, own: dict) -> dict:
    """
    Returns the saved weights under the names that the model's state_dict() `own` uses. Removes the prefixes that
    wrappers add anywhere in a name, unless the model itself has them, and the causal masks of nanoGPT before torch 2.
    """
    bare = {WRAPPERS.sub('', name): name for name in own}
    fitted = {}
    for name, weight in saved.items():
        stripped = WRAPPERS.sub('', name)
        target = name if name in own else bare.get(stripped, stripped)
        if target in own or not MASKS.search(target):
            fitted[name if target in fitted else target] = weight  # a duplicate is later reported as unknown
    return fitted
