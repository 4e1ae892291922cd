"""
Resumes a run from its checkpoint: the architecture, AdamW's state, and each rank's random generators and next batch.
"""

import math
import os
from contextlib import suppress

import torch
import torch.distributed as dist

from checkpoint import fit_names, load_checkpoint, load_model, saved_options
from checkpoint_crc import fingerprint
from checkpoint_fields import check_finite
from configurator import ARCHITECTURE
from data_identity import check_same_data, quick_fingerprint
from distributed import max_over_ranks, same_on_all_ranks
from errors import UserError
from out_dir import other_best
from regular_file import check_regular

# the fields of a checkpoint that a save writes again, and two that only sharded ones have
FIELDS = {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'resume'}
FIELDS |= {'folder', 'crc32_of_chunks'}


def resume_model_args(checkpoint: dict, model_args: dict, flags_set: set[str]) -> dict:
    """
    Returns model_args with the architecture of the checkpoint. flags_set: the names of the flags that the user set.
    Raises UserError if one of them asks for another architecture, except for a smaller block_size, to which the model
    is cropped.
    """
    saved = checkpoint['model_args']
    lacking = [k for k in ARCHITECTURE if k not in saved]
    if lacking:
        raise UserError(f'the checkpoint lacks {", ".join(lacking)} (in model_args), so its model cannot be built')
    sizes = model_args['vocab_size'], saved['vocab_size']
    if sizes[0] != sizes[1] and min(sizes) < 50257:  # larger vocabularies are GPT-2's with different padding
        raise UserError(
            f'the checkpoint has a vocabulary of {sizes[1]:,} tokens, which does not fit the data set with '
            f'{sizes[0]:,}: give the data set that it was trained on with --dataset'
        )
    block_sizes = model_args['block_size'], saved['block_size']
    if block_sizes[0] != block_sizes[1] and not ('block_size' in flags_set and block_sizes[0] < block_sizes[1]):
        raise UserError(
            f'the checkpoint was trained with block_size={block_sizes[1]}, but here it is {block_sizes[0]}: give '
            f'--block_size={block_sizes[1]}, or a smaller one, to which the model will be cropped'
        )
    for k in ARCHITECTURE:
        if k in flags_set and model_args[k] != saved[k] and k != 'block_size':
            raise UserError(
                f'the checkpoint was trained with {k}={saved[k]}, but the command asks for {k}={model_args[k]}: leave '
                'it out, or train from scratch with another --out_dir'
            )
    if block_sizes[0] < block_sizes[1]:
        print(
            f'note: the model is cropped from block_size={block_sizes[1]} to {block_sizes[0]}, and the next save '
            'replaces the checkpoint: to keep the whole model, copy the checkpoint first'
        )
    return {**model_args, **{k: saved[k] for k in ARCHITECTURE}}


def load_optimizer(optimizer, scaler: torch.amp.GradScaler, checkpoint: dict) -> None:
    """
    Loads the checkpoint's AdamW state into the optimizer, and its loss scale into the float16 scaler. Hyper-parameters
    keep the values of this run's flags. Raises UserError if the state is incomplete or does not fit.
    """
    saved, own = checkpoint['optimizer'], optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group['params']]
    block_size = checkpoint['model_args'].get('block_size')
    no_fit = 'training cannot continue from it, but sample.py can use its weights'
    if [g['params'] for g in saved['param_groups']] != [g['params'] for g in own['param_groups']]:
        raise UserError(f"the checkpoint's optimizer state does not fit its model: it has other parameters; {no_fit}")
    # each step that overflows in float16 halves the loss scale; if all steps did, none was made, and AdamW has no state
    scaler_state = checkpoint.get('resume', {}).get('scaler') or {}
    no_step = not saved['state'] and scaler_state.get('scale') == 2.0 ** (16 - checkpoint['iter_num'])
    state = {}
    for i, p in enumerate(params if not no_step else ()):
        lacking = {'step', 'exp_avg', 'exp_avg_sq'} - saved['state'].get(i, {}).keys()
        if lacking:
            raise UserError(
                f"the checkpoint's optimizer state is incomplete: {', '.join(sorted(lacking))} of parameter {i} of "
                f'{len(params)}; {no_fit}'
            )
        state[i] = {}
        for k, v in saved['state'][i].items():
            if k != 'step':
                if v.dim() == 2 and len(v) == block_size > len(p):
                    v = v[: len(p)]  # position embeddings may have been cut to a shorter block_size
                if v.shape != p.shape:
                    raise UserError(
                        f"the checkpoint's optimizer state does not fit its model: {k} of parameter {i} is "
                        f'{tuple(v.shape)} instead of {tuple(p.shape)}; {no_fit}'
                    )
                check_finite(v, f'optimizer.state[{i}].{k}', least=0 if k == 'exp_avg_sq' else -math.inf)
            # clone a tensor that stays on the CPU, because loaded tensors are views of the file
            state[i][k] = v if p.is_cuda and v.numel() > 1 else v.clone()
    optimizer.load_state_dict({'state': state, 'param_groups': own['param_groups']})
    if scaler_state:  # empty unless it was written in float16
        scaler.load_state_dict(scaler_state)


def load_rank_state(model: torch.nn.Module, checkpoint: dict) -> None:
    """
    Passes this rank's entry of the checkpoint to model.rank_state, if the model has one: an object with save(), which
    returns a dict of tensors, load(dict) and log(), which returns a dict of counts for the log. At another world size
    the entry is {}.
    """
    ranks = checkpoint.get('resume', {}).get('ranks', [])
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if getattr(model, 'rank_state', None):
        model.rank_state.load(ranks[rank] if len(ranks) == world_size else {})


def rank_state(device: str, X: torch.Tensor, Y: torch.Tensor, model: torch.nn.Module) -> dict:
    """
    Returns the state from which this rank can resume exactly: its random generators, the batch X, Y (int64 tokens)
    that it has already drawn, and the model's own, which state_dict() leaves out (see load_rank_state).
    """
    state = {'rng': torch.get_rng_state(), 'X': X, 'Y': Y}
    if getattr(model, 'rank_state', None):
        state |= model.rank_state.save()
    if device.startswith('cuda'):
        state['cuda_rng'] = torch.cuda.get_rng_state(device)
    if device == 'mps':
        state['mps_rng'] = torch.mps.get_rng_state()
    return state


def restore_rank_state(checkpoint, rank, world_size, device, dataset, batch_shape, sequential):
    """
    Restores the random generators and returns the next batch X, Y on the CPU. If that is impossible (another world
    size, batch shape or data set, or a checkpoint from nanoGPT), starts a new data order, which does not repeat the one
    so far, and returns None. With a sequential order only dropout is affected.
    """
    ranks = checkpoint.get('resume', {}).get('ranks', [])
    if (
        len(ranks) != world_size
        or ranks[rank]['X'].shape != batch_shape
        or not (checkpoint['resume'].get('data') or checkpoint.get('config', {}).get('dataset') == dataset)
    ):
        if rank == 0:
            new = 'new random numbers' if sequential else 'a new data order'
            print(f'{new}: the checkpoint has another world size, batch shape or data set, or is from nanoGPT')
        torch.manual_seed(1337 + rank + 1_000_003 * checkpoint['iter_num'])
        return None
    state, vocab_size = ranks[rank], checkpoint['model_args']['vocab_size']
    for k in ('X', 'Y'):
        least, most = torch.aminmax(state[k])
        if least < (-1 if k == 'Y' else 0) or most >= vocab_size:
            raise UserError(
                f"the checkpoint's resume.ranks[{rank}].{k} has tokens from {least} to {most}, outside its vocabulary "
                f'of {vocab_size}'
            )
    torch.set_rng_state(state['rng'])
    if device.startswith('cuda') and 'cuda_rng' in state:
        torch.cuda.set_rng_state(state['cuda_rng'], device)
    if device == 'mps' and 'mps_rng' in state:
        torch.mps.set_rng_state(state['mps_rng'])
    return state['X'].clone(), state['Y'].clone()


def crop_positions(checkpoint: dict, model) -> dict:
    """Returns the checkpoint with its position embeddings cropped to the model's block_size, if that is smaller."""
    own, block_size = model.state_dict(), checkpoint['model_args']['block_size']
    weights = fit_names(checkpoint['model'], own)
    for name, weight in weights.items():
        if name in own and weight.dim() == 2 and len(weight) == block_size > len(own[name]):
            weights[name] = weight[: len(own[name])]
    return {**checkpoint, 'model': weights}


def measured_differently(saved: dict, config: dict, same_data: bool) -> str:
    """
    Returns the flags that select other tokens for the validation loss than those in saved, the config of a checkpoint,
    such as 'val_tokens=1000 instead of 0'; '' if there are none.
    """
    saved = {'val_tokens': 0, **saved}  # nanoGPT's checkpoints lack it
    names = ['val_tokens', 'block_size', *([] if same_data else ['dataset'])]
    last_part = lambda value: os.path.basename(os.path.normpath(str(value)))  # nanoGPT's data sets are names, not paths
    changed = [k for k in names if k in saved and last_part(saved[k]) != last_part(config[k])]
    return ', '.join(f'{k}={config[k]} instead of {str(saved[k])[:100]}' for k in changed)


def loss_to_beat(checkpoint: dict, best_path: str, config: dict) -> float:
    """
    Returns the lowest validation loss so far, 1e9 if there is none. If the file best_path of the best checkpoint has a
    higher one than the checkpoint, returns that: its run could write ckpt.pt but not the copy. A loss on other tokens
    than this run's does not count, with a printed note, and the best checkpoint that has it will be renamed.
    """
    same_data = bool(checkpoint.get('resume', {}).get('data'))  # then check_same_data() compares it
    difference = measured_differently(checkpoint.get('config', {}), config, same_data)
    losses, kept = [] if difference else [checkpoint['best_val_loss']], ''
    with suppress(Exception):  # a damaged file can raise any error
        check_regular(best_path)
        best = torch.load(best_path, 'cpu', weights_only=True, mmap=True)
        if measured_differently(best.get('config', {}), config, same_data):
            other_best.add(os.path.abspath(config['out_dir']))
            kept = '; the best checkpoint so far will be kept'
        else:
            losses.append(float(best['best_val_loss']))
    if not losses and checkpoint['best_val_loss'] < 1e9 and not config['eval_only']:
        print(
            f'note: the lowest validation loss so far, {checkpoint["best_val_loss"]:.4f}, does not count in this run, '
            f'which measures on other tokens ({difference}){kept}'
        )
    return max(losses, default=1e9)


class Resume:
    """
    Everything a run takes from a checkpoint. With path=None, for a run from scratch or from pretrained weights, it is
    empty: iteration 0, no best loss, and load() and next_batch() change nothing.

    path: the checkpoint's file (or folder, for a subclass). data: the Dataset to continue on. config: this run's flags.
    Raises UserError if the checkpoint is unusable, or if the ranks see other data or another checkpoint. Collective.
    """

    def __init__(self, path: str | None, data, config: dict):
        same_on_all_ranks(len(data.train), f'the number of training tokens in {config["dataset"]}')
        same_on_all_ranks(quick_fingerprint(data), f'the fingerprint of the data set {config["dataset"]}')
        self.path, self.checkpoint = path, self.read(path) if path else {}
        self.iter_num, self.best_val_loss, self.log, self.order = 0, 1e9, None, None
        if path:
            unknown = ', '.join(sorted(str(k)[:100] for k in self.checkpoint.keys() - FIELDS))
            if unknown:
                print(f'note: {path} also holds {unknown}, which the next save drops: to keep it, copy {path} first')
            self.iter_num = same_on_all_ranks(self.checkpoint['iter_num'], f'the iteration of {path}')
            same_on_all_ranks(int(fingerprint(self.main_file(path)), 16), f'the fingerprint of {path}')
            self.best_val_loss = max_over_ranks(loss_to_beat(self.checkpoint, self.best_path(path), config))
            extra = self.checkpoint.get('resume', {})  # nanoGPT's own checkpoints have none
            self.log = {'log': extra.get('log'), 'iter': self.iter_num}
            self.order = extra.get('order')
            self.data, self.saved_data = data, extra.get('data')

    def read(self, path: str) -> dict:
        return load_checkpoint(path, to_resume=True)

    def main_file(self, path: str) -> str:
        """Returns the path of the file that differs between any two checkpoints."""
        return path

    def best_path(self, path: str) -> str:
        """Returns the path of the best checkpoint's file, which may be missing."""
        return os.path.join(os.path.dirname(path), 'ckpt_best.pt')

    def model_args(self, model_args: dict, flags_set: set) -> dict:
        """
        Returns the checkpoint's architecture. Raises UserError if it contradicts the data or a flag that the user set.
        """
        if not self.path:
            return model_args
        model_args = resume_model_args(self.checkpoint, model_args, flags_set)
        check_same_data(self.saved_data, self.data)
        return model_args

    def model_options(self, options: dict, flags_set: set) -> dict:
        """
        Returns options, the model's own flags, with the checkpoint's GELU. Raises UserError if flags_set contradicts.
        """
        return saved_options(self.checkpoint, options, flags_set) if self.path else options

    def load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Loads weights, AdamW's state and the float16 loss scale. Raises UserError if they do not fit."""
        if self.path:
            load_model(model, crop_positions(self.checkpoint, model))
            load_optimizer(optimizer, scaler, self.checkpoint)
            load_rank_state(model, self.checkpoint)

    def next_batch(self, rank: int, world_size: int, config: dict):
        """
        Restores the random generators and returns the next batch (X, Y) on config's device, or None if the data order
        provides it, a sequential or a new random one. Frees the checkpoint's memory.
        """
        checkpoint, self.checkpoint = self.checkpoint, {}
        if not self.path:
            return None
        if self.iter_num > config['max_iters']:
            print(
                f'nothing is left to do: iteration {self.iter_num} comes next, but max_iters={config["max_iters"]} is '
                'the last'
            )
        shape, device = (config['batch_size'], config['block_size']), config['device']
        sequential = config['data_order'] == 'sequential'
        if sequential and not self.order:
            print('the checkpoint has no position in the data: the sequential order starts at the first token')
        batch = restore_rank_state(checkpoint, rank, world_size, device, config['dataset'], shape, sequential)
        if batch is None or sequential:
            return None
        return tuple(tokens.to(device) for tokens in batch)
