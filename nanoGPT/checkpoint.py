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

# what a model is, of all the fields of GPTConfig; dropout may differ between runs
ARCHITECTURE = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')


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


def resume_model_args(checkpoint, model_args, given):
    """
    model_args with the architecture of the checkpoint. Raises UserError where a flag in `given`, the names that the user
    has set, asks for another one. A smaller block_size is no contradiction if it was asked for: the model is cropped to it.
    """
    saved = checkpoint['model_args']
    lacking = [k for k in ARCHITECTURE if k not in saved]
    if lacking:
        raise UserError(
            f'the checkpoint does not say its {", ".join(lacking)} (in model_args), so its model cannot be built'
        )
    sizes = model_args['vocab_size'], saved['vocab_size']
    if (
        sizes[0] != sizes[1] and min(sizes) < 50257
    ):  # not GPT-2's tokens, of which some models have a few more than others
        raise UserError(
            f'the checkpoint has a vocabulary of {sizes[1]:,} tokens, which does not fit the data set with {sizes[0]:,}: '
            'give the one that it was trained on with --dataset'
        )
    block_sizes = model_args['block_size'], saved['block_size']
    if block_sizes[0] != block_sizes[1] and not ('block_size' in given and block_sizes[0] < block_sizes[1]):
        raise UserError(
            f'the checkpoint was trained with block_size={block_sizes[1]}, but here it is {block_sizes[0]}: give --block_size={block_sizes[1]}, '
            'or a smaller one, to which the model will be cropped'
        )
    for k in ARCHITECTURE:
        if k in given and model_args[k] != saved[k] and k != 'block_size':
            raise UserError(
                f'the checkpoint was trained with {k}={saved[k]}, but {k}={model_args[k]} was asked for: leave it out, '
                'or train from scratch with another --out_dir'
            )
    return {**model_args, **{k: saved[k] for k in ARCHITECTURE}}


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


def load_optimizer(optimizer, scaler, checkpoint):
    """
    Puts the checkpoint's AdamW state into the optimizer, and its loss scale into the float16 scaler. Hyper-parameters stay
    as the flags of this run have them. Raises UserError if the state does not fit.
    """
    saved, own = checkpoint.get('optimizer'), optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group['params']]
    fits = (
        isinstance(saved, dict)
        and {'state', 'param_groups'} <= saved.keys()
        and [len(g['params']) for g in saved['param_groups']] == [len(g['params']) for g in own['param_groups']]
    )
    block_size = checkpoint['model_args'].get(
        'block_size'
    )  # position embeddings may have been cut to a shorter one; then their state is, too
    cut = lambda v, p: v[: len(p)] if v.dim() == 2 and len(v) == block_size > len(p) else v
    state = {i: {k: cut(v, params[i]) for k, v in s.items()} for i, s in saved['state'].items()} if fits else {}
    # each tensor of the state is as large as its parameter or, like the step count, a single number
    if not fits or any(v.numel() not in (1, params[i].numel()) for i, s in state.items() for v in s.values()):
        raise UserError(
            "the checkpoint's optimizer state is missing or does not fit its model: training cannot go on from it, but sample.py can use its weights"
        )
    # what stays on the CPU is cloned: the loaded tensors are views of the file
    state = {
        i: {k: v if params[i].is_cuda and v.numel() > 1 else v.clone() for k, v in s.items()} for i, s in state.items()
    }
    optimizer.load_state_dict({'state': state, 'param_groups': own['param_groups']})
    if checkpoint.get('resume', {}).get('scaler'):  # empty unless it was written in float16
        scaler.load_state_dict(checkpoint['resume']['scaler'])


def rank_state(device, X, Y):
    """
    What this rank needs in order to go on from here as if nothing had happened: its random generators, and the batch
    X, Y (int64 tokens) that it has drawn already.
    """
    state = {'rng': torch.get_rng_state(), 'X': X, 'Y': Y}
    if device.startswith('cuda'):
        state['cuda_rng'] = torch.cuda.get_rng_state(device)
    if device == 'mps':
        state['mps_rng'] = torch.mps.get_rng_state()
    return state


def restore_rank_state(checkpoint, rank, world_size, device, dataset, batch_shape):
    """
    Sets the random generators as they were and returns the batch X, Y that comes next, on the CPU. Where that cannot be
    (another world size, batch shape or data set, or a checkpoint of nanoGPT's) it starts a new data order, one that does
    not repeat what the run has seen before, and returns None.
    """
    ranks = checkpoint.get('resume', {}).get('ranks', [])
    if (
        len(ranks) != world_size
        or ranks[rank]['X'].shape != batch_shape
        or checkpoint.get('config', {}).get('dataset') != dataset
    ):
        if rank == 0:
            print(
                "a new data order: the checkpoint is of other processes, another batch shape or data set, or nanoGPT's own"
            )
        torch.manual_seed(1337 + rank + 1_000_003 * checkpoint['iter_num'])
        return None
    state = ranks[rank]
    torch.set_rng_state(state['rng'])
    if device.startswith('cuda') and 'cuda_rng' in state:
        torch.cuda.set_rng_state(state['cuda_rng'], device)
    if device == 'mps' and 'mps_rng' in state:
        torch.mps.set_rng_state(state['mps_rng'])
    return state['X'].clone(), state['Y'].clone()
