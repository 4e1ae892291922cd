"""Tables computed from arithmetic and from the source, not measured: bytes per parameter, and lines changed."""

import difflib

from common import ROOT
from tables import SHAPES, gib, markdown, parameters_of, table

# bytes per parameter on each of k GPUs: parameters, gradients, AdamW's two moments, weights in 16 bits
BYTES = {
    'DDP': lambda k: (4, 4, 8, 0),
    'Triton': lambda k: (4, 4, 8, 2),  # its CUDA graphs keep the weights rounded to 16 bits for the matmuls
    'ZeRO-1': lambda k: (4, 4, 8 / k, 0),
    'ZeRO-1 + Triton': lambda k: (4, 4, 8 / k, 2),
    'FSDP, also with Triton': lambda k: (4 / k, 4 / k, 8 / k, 0),
}
# folder -> the file that differs from the reference's
CHANGED = {'phase1_zero1': 'train.py', 'phase2_triton': 'model.py', 'phase3_fsdp': 'train.py'}
SHARDED = {
    'phase1_zero1': "AdamW's state",
    'phase2_triton': 'nothing; computes with Triton kernels',
    'phase3_fsdp': "parameters, gradients, AdamW's state",
}


@table()
def bytes_per_parameter():
    rows = [(name, *(f'{sum(parts(k)):g}' for k in (1, 2, 4, 8))) for name, parts in BYTES.items()]
    return markdown(['bytes per parameter on each GPU', '1 GPU', '2', '4', '8'], rows)


@table()
def memory():
    rows = []
    for size in SHAPES:
        n, first = parameters_of(size), f'{size} ({parameters_of(size):,})'
        for name, parts in BYTES.items():
            if name == 'ZeRO-1 + Triton':  # follows from two other rows
                continue
            for k in (2, 4, 8) if parts(2) != parts(4) else (1,):
                its = [part * n for part in parts(k)]
                cells = [gib(part) if part else '' for part in its]
                rows.append((first, name, k if k > 1 else 'any', *cells, f'**{gib(sum(its))}**'))
                first = ''
    header = ['model (parameters)', 'trainer', 'GPUs', 'parameters', 'gradients', 'AdamW', '16-bit weights']
    return markdown([*header, 'GiB on each'], rows)


@table()
def memory_of_zero1():
    rows = [('bytes per parameter', '16', '12', '10', '9', '8 + 8 / W')]
    for size in ('124M', '1.5B'):
        n = parameters_of(size)
        rows.append((f'GPT-2 {size} ({n:,}), GiB', gib(16 * n), *(gib((8 + 8 / k) * n) for k in (2, 4, 8)), ''))
    return markdown(['', 'DDP', 'ZeRO-1, W = 2', 'W = 4', 'W = 8', 'any W'], rows)


@table()
def memory_of_fsdp():
    n = parameters_of('1.5B')
    rows = [
        ('bytes per parameter', '16', '8 + 8/k', '16/k'),
        (f'GPT-2 1.5B ({n:,}), k = 4, GiB', *(gib(b * n, 1) for b in (16, 10, 4))),
    ]
    return markdown(['', 'DDP', 'ZeRO-1', 'FSDP'], rows)


@table()
def lines():
    rows = []
    for folder, name in CHANGED.items():
        old, new = ((ROOT / place / name).read_text().splitlines() for place in ('nanoGPT', folder))
        changed = sum(
            max(b - a, d - c)
            for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
            if tag != 'equal'
        )
        added = {}
        for path in sorted((ROOT / folder).rglob('*.py')):
            here = path.relative_to(ROOT / folder)
            copied = (ROOT / 'nanoGPT' / here).exists() or path.name == 'train_ddp.py'  # a copy of train.py
            if not copied and not here.parts[0].startswith('out'):
                added.setdefault(here.parts[0], []).append(len(path.read_text().splitlines()))
        added = ', '.join(
            f'{top} ({f"{len(its)} files, " * (len(its) > 1)}{sum(its)} lines)' for top, its in added.items()
        )
        link = f'[{folder}](root:{folder}/IMPLEMENTATION.md)'
        rows.append((link, SHARDED[folder], f'{name}, {changed} of {len(old)} lines', added))
    return markdown(['folder', 'what is sharded', 'changed file', 'added'], rows)
