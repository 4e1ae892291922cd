"""
Continues a run from its checkpoint: the architecture, AdamW's state, the random generators and the next batch of each rank.
"""

import torch
from configurator import ARCHITECTURE
from errors import UserError


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
