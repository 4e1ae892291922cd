"""
Writes plan.py's numbers for each preset into a comment at the top of its file.

    python -m planner.presets     # from the root of the repository; a test compares the comments
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'nanoGPT')]
from configurator import convert, run_config_file
from planner import options, plan
from planner.gpus import GIB, GPUS
from planner.report import table

CONFIGS = ROOT / 'nanoGPT' / 'config'
PRESETS = ('train_gpt2_350M', 'train_gpt2_774M', 'train_gpt2_1.5B', 'gpt3_2.7B', 'gpt3_6.7B', 'gpt3_13B')
BEGIN, END = '# plan.py says', '# end of what plan.py says'
COLUMNS = [(gpu, count) for gpu in ('h100', 'h200') for count in (1, 4, 8)]


def assigned_in(path):
    """Returns the flags that the config file sets."""
    return run_config_file(str(path), defaults(), str(ROOT / 'nanoGPT' / 'train.py'))


def defaults():
    return options.train_flags() | options.kernel_flags() | {'vocab_size': 50304}


def config_of(path):
    """Returns all flags with the values that the config file sets."""
    known, assigned = defaults(), assigned_in(path)
    return known | {key: convert(key, value, known[key], str(path)) for key, value in assigned.items()}


def cell(found):
    """Returns GiB reserved and thousand tokens/s, or a dash if it does not fit."""
    if not found or not found.fits:
        return '-'
    digits = 0 if found.tokens_per_sec > 2e4 else 1
    return f'{found.memory_bytes["total"] / GIB:.0f} GiB {found.tokens_per_sec / 1e3:.{digits}f}k'


def header(path):
    """Returns the header's lines, each a comment. Uses the model only, so that a new measurement changes no preset."""
    config = config_of(path)
    plans = [plan.make_plan(config, GPUS[gpu], count, network=50e9) for gpu, count in COLUMNS]
    rows = [[name, *(cell(found.get(name)) for found in plans)] for name in options.NAMES]
    lines = table(['', *(f'{count} {gpu.upper()}' for gpu, count in COLUMNS)], rows).splitlines()
    best = [plan.recommend(found, assigned_in(path)) for found in plans]
    fastest = ', '.join(
        f'{e.name} on {count} {gpu.upper()} ({e.hours(config["max_iters"] * e.run.tokens_per_iter) / 24:,.1f} days)'
        for e, (gpu, count) in zip(best, COLUMNS)
        if e and count == 8
    )
    return [
        f'{BEGIN}, as GiB that a GPU reserves and thousand tokens/s of all GPUs; - does not fit:',
        *(f'#   {line}' for line in lines),
        *([f'# It recommends {fastest}.'] if fastest else []),
        '# Numbers for 8 GPUs are extrapolated; docs/planner.md states the errors.',
        END,
    ]


def rewrite(path):
    """Returns the file's text with an updated header before the first line that is not a comment."""
    text = re.sub(rf'{BEGIN}.*?{END}\n', '', path.read_text(), flags=re.S)
    comments, blank, rest = text.partition('\n\n')
    return '\n'.join([comments, *header(path)]) + blank + rest


def main():
    for name in PRESETS:
        path = CONFIGS / f'{name}.py'
        path.write_text(rewrite(path))


if __name__ == '__main__':
    main()
