"""
Checks the fields of a checkpoint before any of them is used, so that an error message can name the wrong one.
"""

import math

import torch

from data_identity import check_manifest
from errors import UserError

SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')  # in model_args
SCALER = {  # range of each number in the state of torch.amp.GradScaler
    'scale': (1e-30, 1e38),
    'growth_factor': (1.0, 1e6),
    'backoff_factor': (1e-6, 1.0),
    'growth_interval': (1, 10**9),
    '_growth_tracker': (0, 10**9),
}


def check_fields(checkpoint, path: str, to_resume: bool, tensors: bool = True) -> dict:
    """
    Returns the checkpoint, read from path, with plain int and float for its numbers and float32 tensors for AdamW's
    steps. to_resume: also checks the fields that only a trainer reads, not sampling. tensors: False if the tensors are
    stored elsewhere, so that `model` maps names to names and AdamW's state has only the steps. Raises UserError, which
    names the field, if one is missing or unusable.
    """
    kinds = {'model': dict, 'model_args': dict, 'iter_num': object}
    fields = checkpoint if isinstance(checkpoint, dict) else {}
    lacking = [k for k, kind in kinds.items() if k not in fields or not isinstance(fields[k], kind)]
    if lacking:
        raise UserError(
            f'{path} is a PyTorch file, but not the checkpoint of a training run: it lacks {", ".join(lacking)}'
        )
    field = Field(path)
    result = dict(checkpoint)
    result['iter_num'] = field.number('iter_num', checkpoint['iter_num'], 0, 10**12, whole=True)
    # a checkpoint without a loss has no best one yet
    loss = checkpoint.get('best_val_loss', 1e9)
    result['best_val_loss'] = field.number('best_val_loss', loss, -1e308, math.inf)
    config = field.dictionary('config', checkpoint.get('config', {}))
    if 'dataset' in config:
        field.text('config.dataset', config['dataset'], 4096)
    if config.get('gelu', 'erf') not in ('erf', 'tanh'):
        field.wrong('config.gelu', config['gelu'], 'erf or tanh')
    resume = field.dictionary('resume', checkpoint.get('resume', {}))
    field.text('resume.log', resume.get('log') or '', 255)
    check_manifest(resume.get('data'))

    weights = checkpoint['model']
    for name, weight in weights.items():
        field.text('model (a name in it)', name, 4096)
        if tensors:
            field.tensor(f'model.{name}', weight)
        else:
            field.text(f'model.{name}', weight, 4096)
    result['model_args'] = _model_args(field, checkpoint['model_args'], weights, tensors)
    if to_resume:
        result['optimizer'] = _optimizer(field, checkpoint.get('optimizer'), path)
        _resume(field, resume)
    return result


def check_finite(tensor: torch.Tensor, name: str, least: float = -math.inf) -> None:
    """Raises UserError, with the name, if an element of the tensor is NaN, infinite or below `least`."""
    if tensor.numel():
        low, high = torch.aminmax(tensor.detach().float())  # NaN if an element is; faster than isfinite().all()
        if not (least <= low and -math.inf < low and high < math.inf):
            raise UserError(
                f'{name} of the checkpoint holds numbers from {low:.3g} to {high:.3g}, so it is of no use: take an '
                'earlier one, such as ckpt_best.pt'
            )


def _model_args(field, model_args, weights, tensors):
    args = dict(model_args)
    for name in SIZES:
        args[name] = field.number(f'model_args.{name}', args.get(name), 1, 2**31 - 1, whole=True)
    if 'bias' in args:
        bias = args['bias']
        args['bias'] = bias if isinstance(bias, bool) else bool(field.number('model_args.bias', bias, 0, 1, whole=True))
    if 'dropout' in args:
        args['dropout'] = field.number('model_args.dropout', args['dropout'], 0, 1)
    if args['n_embd'] % args['n_head']:
        field.wrong('model_args.n_embd', args['n_embd'], f'a multiple of model_args.n_head, {args["n_head"]}')
    # a model far larger than its weights would exhaust memory before the two are compared
    most = {'n_layer': len(weights)}
    if tensors:
        widest = max((max(v.shape) for v in weights.values() if v.dim()), default=0)
        most |= {'n_embd': widest, 'vocab_size': widest, 'block_size': sum(v.numel() for v in weights.values())}
    for name in most:
        if args[name] > max(most[name], 1):
            field.wrong(f'model_args.{name}', args[name], f'at most {most[name]}, to match the weights')
    return args


def _optimizer(field, optimizer, path):
    """Returns AdamW's state with each step as a float32 tensor."""
    if not isinstance(optimizer, dict) or not {'state', 'param_groups'} <= optimizer.keys():
        raise UserError(
            f'the optimizer state is missing from {path}: training cannot continue from it, but sample.py can use '
            'its weights'
        )
    state = {}
    for i, moments in field.dictionary('optimizer.state', optimizer['state']).items():
        name = f'optimizer.state[{i!r}]'
        if type(i) is not int:
            field.wrong(name, i, 'numbered')
        state[i] = dict(field.dictionary(name, moments))
        for k, v in moments.items():
            if k == 'step':
                state[i][k] = torch.tensor(field.number(f'{name}.step', v, 0, 1e12), dtype=torch.float32)
            else:
                field.tensor(f'{name}.{k}', v, floating=True)
    for group in field.list('optimizer.param_groups', optimizer['param_groups']):
        group = field.dictionary('optimizer.param_groups (one of it)', group)
        field.list('optimizer.param_groups (params of one)', group.get('params'))
    return {**optimizer, 'state': state}


def _resume(field, resume):
    for r, state in enumerate(field.list('resume.ranks', resume.get('ranks', []))):
        name = f'resume.ranks[{r}]'
        field.dictionary(name, state)
        for k, size in (('rng', torch.get_rng_state().numel()), ('cuda_rng', 16), ('mps_rng', None)):
            if k == 'rng' or k in state:
                rng = field.tensor(f'{name}.{k}', state.get(k))
                if rng.dtype != torch.uint8 or rng.dim() != 1 or size not in (None, rng.numel()):
                    field.wrong(f'{name}.{k}', rng, 'the state of a random generator')
        try:
            torch.Generator().set_state(state['rng'])
        except RuntimeError:
            field.wrong(f'{name}.rng', state['rng'], 'the state of a random generator')
        if 'model' in state:  # see resume.load_rank_state; the model checks the numbers
            field.tensor(f'{name}.model', state['model'], floating=True)
        for k in ('X', 'Y'):
            tokens = field.tensor(f'{name}.{k}', state.get(k))
            if (
                tokens.dtype != torch.int64
                or tokens.dim() != 2
                or not tokens.numel()
                or tokens.shape != state['X'].shape
            ):
                field.wrong(f'{name}.{k}', tokens, 'a batch of tokens, int64 (batch_size, block_size)')
    scaler = field.dictionary('resume.scaler', resume.get('scaler', {}))
    for k, (least, most) in SCALER.items() if scaler else ():  # empty unless the run was in float16
        field.number(f'resume.scaler.{k}', scaler.get(k), least, most)


class Field:
    """Checks single fields. Each method returns the value, or raises UserError with the name of the field."""

    def __init__(self, path: str):
        self.path = path

    def wrong(self, name, value, expected):
        if isinstance(value, torch.Tensor):
            found = f'a tensor of shape {tuple(value.shape)} and {value.dtype}'
        elif isinstance(value, (int, float, str, type(None))):
            found = repr(value)[:50]
        else:
            found = f'a {type(value).__name__}'
        raise UserError(f'{self.path} was not loaded: its {name} is {found}, but it must be {expected}')

    def dictionary(self, name, value):
        return value if isinstance(value, dict) else self.wrong(name, value, 'a dict')

    def list(self, name, value):
        return value if isinstance(value, list) else self.wrong(name, value, 'a list')

    def text(self, name, value, longest):
        if not isinstance(value, str) or len(value) > longest or '\0' in value:
            self.wrong(name, value, f'a string of at most {longest} characters')
        return value

    def number(self, name, value, least, most, whole=False):
        """Returns value as an int or a float. It may be a tensor with one element, as in nanoGPT's checkpoints."""
        item = value
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            item = self.tensor(name, value).item()
        if isinstance(item, bool) or not isinstance(item, (int, float)) or not least <= item <= most:
            self.wrong(name, value, f'a number from {least:.0e} to {most:.0e}')
        if whole and item != int(item):
            self.wrong(name, value, 'a whole number')
        return int(item) if whole else float(item)

    def tensor(self, name, value, floating=False):
        """Returns value, a dense tensor on the CPU with all its elements in the file."""
        if (
            not isinstance(value, torch.Tensor)
            or value.layout != torch.strided
            or value.device.type != 'cpu'
            or value.is_quantized
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()
            or (floating and not value.is_floating_point())
        ):
            self.wrong(name, value, f'a dense tensor{" of floating-point numbers" if floating else ""}')
        return value
