"""
Checkpoints: written so that a kill at any moment leaves the previous one whole, read without running anything in them,
and resumed from to the bit.

A checkpoint is nanoGPT's dictionary (model, optimizer, model_args, iter_num, best_val_loss, config) and one more key,
`resume`, which nanoGPT ignores: for each rank its random generators and the batch that it had drawn but not yet used, the
float16 loss scaler, and the name of the run's log. out_dir/ckpt.pt is the latest, out_dir/ckpt_best.pt the one with
the lowest validation loss.
"""

import os
import pickle
import shutil
import sys
import time
from contextlib import suppress

import torch
from errors import UserError
from out_dir import set_aside

# what a model is, of all the fields of GPTConfig; dropout may differ between runs
ARCHITECTURE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')


def write_checkpoint(checkpoint, out_dir, best, required, name='ckpt.pt'):
    """
    Writes out_dir/ckpt.pt, or of another name, and ckpt_best.pt as another name of the same file if best. Returns its path, bytes and seconds
    as a dict. Where it cannot be written (a full disk, say) what was there stays, and this raises UserError if the
    checkpoint is required; otherwise it warns, and bytes is None: training goes on.
    """
    started = time.time()
    path = os.path.join(out_dir, name)
    try:
        set_aside(out_dir)
        if os.path.exists(path + '.tmp'):
            os.remove(
                path + '.tmp'
            )  # of a run that was killed; it may be another name of ckpt_best.pt, which must not be written to
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())  # the name must not change before the bytes are on disk
        if best:
            _link(path + '.tmp', os.path.join(out_dir, 'ckpt_best.pt'))
        os.replace(path + '.tmp', path)
        _sync_folder(out_dir)
    except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError on a full disk
        try:
            os.remove(path + '.tmp')  # half a checkpoint only takes space
        except OSError:
            pass
        problem = f'{path} could not be saved ({str(e).splitlines()[0]}); an earlier one is untouched'
        if required:
            raise UserError(problem) from None
        print(f'WARNING: {problem}, and training goes on', file=sys.stderr)
        return {'path': path, 'bytes': None, 'seconds': time.time() - started}
    return {'path': path, 'bytes': os.path.getsize(path), 'seconds': time.time() - started}


def _link(source, target):
    """Makes target another name of the file source, replacing what it was in one step; copies where there are no hard links."""
    if os.path.exists(target + '.tmp'):
        os.remove(target + '.tmp')
    try:
        os.link(source, target + '.tmp')
    except OSError:
        shutil.copyfile(source, target + '.tmp')
        with open(target + '.tmp', 'rb+') as f:
            os.fsync(f.fileno())
    os.replace(target + '.tmp', target)


def _sync_folder(folder):
    fd = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot do this to a folder
        os.fsync(fd)  # makes the new names last
    os.close(fd)


def find_checkpoint(out_dir):
    """
    The path of the checkpoint in out_dir: ckpt.pt, or a folder of phase 3's with the shards of all ranks; where there are both the one of the
    later iteration, of equals the newer one; ckpt.pt if there is nothing.
    """
    full, latest = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'ckpt_sharded', 'latest')
    if not os.path.exists(latest):
        return full
    with open(latest, errors='replace') as f:
        sharded = os.path.join(os.path.dirname(latest), os.path.basename(f.read().strip()))
    if not os.path.exists(full):
        return sharded
    # not by time alone: whoever has copied out_dir may have lost the times of its files
    newer = os.path.getmtime(full) >= os.path.getmtime(latest)
    ours, theirs = _iteration(full), _iteration(os.path.join(sharded, 'rest.pt'))
    if newer and ours < theirs:
        what = f'of an earlier iteration ({ours} of {theirs})' if ours >= 0 else 'cannot be read'
        print(f'{full} is newer than {sharded}, but {what}: the latter counts')
    return full if (ours, newer) >= (theirs, not newer) else sharded


def _iteration(path):
    """Of the checkpoint at path; -1 if that cannot be read."""
    try:
        return load_checkpoint(path)['iter_num']
    except UserError:
        return -1


def load_checkpoint(path):
    """
    The checkpoint at path, tensors on the CPU, written by any phase or by nanoGPT. Nothing in the file is executed.
    Raises UserError if it is missing, damaged, sharded, no checkpoint, or holds code.
    """
    if os.path.exists(os.path.join(path, 'rest.pt')):
        raise UserError(
            f'{path} is sharded, and only phase 3 with FSDP, so with several processes, resumes from that. It becomes a ckpt.pt, in the folder '
            'phase3_fsdp, by: '
            f'python sharded_checkpoint.py full {os.path.dirname(os.path.dirname(os.path.abspath(path)))}'
        )
    try:
        # mapped into memory, so that many ranks on one machine share what they read
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(
            f'there is no checkpoint {path}: train first (--init_from=scratch), or give its folder with --out_dir; '
            'several machines need a file system that all of them see'
        ) from None
    except pickle.UnpicklingError:
        raise UserError(
            f'{path} was not loaded: it holds something other than tensors and plain values, '
            'which could run code on this machine, and no checkpoint of ours needs that'
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise UserError(
            f'{path} cannot be read as a checkpoint; it may have been cut short ({str(e).splitlines()[0]}). '
            'The other checkpoint in its folder (ckpt.pt or ckpt_best.pt) may be whole'
        ) from None
    kinds = {'model': dict, 'model_args': dict, 'iter_num': (int, float, torch.Tensor)}
    missing = [
        k for k, kind in kinds.items() if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(k), kind)
    ]
    if missing:
        raise UserError(
            f'{path} is a file of torch, but no checkpoint of a training run: it lacks {", ".join(missing)}'
        )
    for prefix in ('_orig_mod.', 'module.'):  # what torch.compile and DDP put before each name
        checkpoint['model'] = {k.removeprefix(prefix): v for k, v in checkpoint['model'].items()}
    checkpoint['iter_num'] = int(checkpoint['iter_num'])
    checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', 1e9))
    return checkpoint


def saved_options(checkpoint, options, given):
    """
    Returns options, the fields of GPTConfig that are flags, with the GELU of the checkpoint: unlike the others it belongs to the weights.
    nanoGPT's own checkpoints do not record it; they have the erf form. Raises UserError if the flag is in given and asks for another form.
    """
    if 'gelu' not in options:  # a model.py of the user's own
        return options
    saved = (checkpoint.get('config') or {}).get('gelu', 'erf')
    if saved not in ('erf', 'tanh'):
        raise UserError(f"the checkpoint's config says gelu={saved!r}, but only erf and tanh are known here")
    if 'gelu' in given and options['gelu'] != saved:
        raise UserError(
            f'the checkpoint was trained with gelu={saved}, but gelu={options["gelu"]} was asked for: leave the flag out'
        )
    return {**options, 'gelu': saved}


def load_model(model, checkpoint):
    """Copies the checkpoint's weights into the model. Raises UserError if they do not fit."""
    saved, own = checkpoint['model'], model.state_dict()
    wrong = [f'{k} is missing' for k in own if k not in saved] + [f'{k} is unknown' for k in saved if k not in own]
    wrong += [
        f'{k} is {tuple(saved[k].shape)} instead of {tuple(own[k].shape)}'
        for k in own
        if k in saved and saved[k].shape != own[k].shape
    ]
    if wrong:
        raise UserError(
            f'the checkpoint does not fit its own model_args: {"; ".join(wrong[:3])}'
            + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
        )
    model.load_state_dict(saved)
