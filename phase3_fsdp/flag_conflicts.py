"""
Refuses flags that contradict each other, and prints notes about flags without an effect. Considers only flags that the
user set.

A flag that works only together with another flag says so at the end of its help text: `needs use_fsdp`, `needs
init_from=resume`, or, for the opposite, `unused with val_tokens`.
"""

import math
import re

from errors import UserError


def conflicts(config: dict, flags_set: set, defaults: dict, help_texts: dict) -> list[str]:
    """Returns notes about flags in flags_set that have no effect. Raises UserError for flags that contradict others."""
    if config.get('wandb_log') and config.get('tracker', '') not in ('', 'wandb'):
        raise UserError(f'wandb_log=True and tracker={config["tracker"]} select two trackers: leave out one of the two')
    notes = unused_flags(config, flags_set, defaults, help_texts) + learning_rate_notes(config, flags_set)
    sizes = sorted(flags_set & {'n_layer', 'n_head', 'n_embd', 'bias'})
    if sizes and str(config.get('init_from')).startswith('gpt2'):
        notes.append(f'{", ".join(sizes)}: no effect with init_from={config["init_from"]}, which has its own')
    return notes


def unused_flags(config, flags_set, defaults, help_texts):
    """Returns a note for each condition under which flags in flags_set have no effect."""
    unused = {}  # {condition: flags}
    for key in (key for key in config if key in flags_set and config[key] != defaults[key]):
        match = re.search(r'\b(needs|unused with) (\w+)(?:=(\w+))?$', help_texts.get(key, ''))
        if match and match[2] in config:
            word, other, value = match.groups()
            holds = str(config[other]) == value if value else bool(config[other])
            if holds == (word == 'unused with'):
                unused.setdefault(f'{other}={config[other]!r}', []).append(key)
    return [f'{", ".join(keys)}: no effect with {condition}' for condition, keys in unused.items()]


def learning_rate_notes(config, flags_set):
    """Returns notes about a learning rate that does not warm up and decay as usual within this run."""
    names = ('decay_lr', 'learning_rate', 'min_lr', 'warmup_iters', 'lr_decay_iters', 'max_iters')
    if not config.keys() >= set(names) or not config['decay_lr'] or config['eval_only']:
        return []
    _, peak, min_lr, warmup, decay, last = (config[name] for name in names)
    if last < warmup:
        notes = [
            f'max_iters={last} is before the end of the warmup, warmup_iters={warmup}: the learning rate reaches '
            f'{peak * (last + 1) / (warmup + 1):.2e}, not {peak:.2e}'
        ] * bool(flags_set & {'max_iters', 'warmup_iters'})
        if min_lr > peak and flags_set & {'learning_rate', 'min_lr'}:
            notes.append(f'learning_rate={peak} is below min_lr={min_lr}: in a longer run it would rise to that')
        return notes
    if min_lr > peak:
        raise UserError(
            f'learning_rate={peak} is below min_lr={min_lr}, so the learning rate would rise where it should decay: '
            f'add --min_lr={peak / 10:.2g} (about learning_rate / 10), or --decay_lr=False for a constant learning rate'
        )
    notes = []
    if decay <= warmup and flags_set & {'lr_decay_iters', 'warmup_iters'}:
        notes.append(
            f'lr_decay_iters={decay} is not after the warmup, warmup_iters={warmup}: the learning rate drops from '
            f'{peak:.2e} to {min_lr:.2e} at once'
        )
    elif decay < last and flags_set & {'lr_decay_iters', 'max_iters'}:
        notes.append(f'the learning rate stays at {min_lr:.2e} from lr_decay_iters={decay} to max_iters={last}')
    elif decay > last and flags_set & {'lr_decay_iters', 'max_iters'}:
        cosine = 0.5 * (1 + math.cos(math.pi * (last - warmup) / (decay - warmup)))
        notes.append(
            f'the learning rate ends at {min_lr + cosine * (peak - min_lr):.2e}, not {min_lr:.2e}: max_iters={last} is '
            f'before lr_decay_iters={decay}'
        )
    return notes
