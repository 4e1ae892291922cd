"""
Puts the measurements into the documents. Every table between `<!-- table: NAME -->` and `<!-- end -->` in a document is written
by the function of that name below, from the files in benchmarks/results/; so are single numbers in the middle of a sentence.

    python benchmarks/report.py            # after a new result file: rewrites documents and pictures
    python benchmarks/report.py --check    # fails if one of them is not what the result files say; a test runs this
    python benchmarks/report.py --run      # runs the verification commands on this machine, keeps what they print, then as above

Tables of all files of a kind are empty where there is none; the others need theirs.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
from functools import cache

from common import GIB, RESULTS, ROOT, facts, write_json

BLOCK = re.compile(r'(<!-- table: ([^\n]*?) -->)(.*?)(<!-- end -->)', re.S)
TABLES = {}
PHASES = {
    'phase1_zero1': 'train.py',
    'phase2_triton': 'model.py',
    'phase3_fsdp': 'train.py',
}  # and the file that each changes
SHAPES = {'124M': (12, 768), '350M': (24, 1024), '1.5B': (48, 1600)}  # n_layer, n_embd
NAMES = {
    'ddp': 'DDP',
    'zero1': 'phase 1',
    'triton': 'phase 2',
    'fsdp': 'phase 3',
    'zero1+triton': 'phases 1 + 2',
    'fsdp+triton': 'phases 2 + 3',
    'hybrid': 'phase 3 hybrid',
    'fsdp+one_unit': 'phase 3 as one unit',
}
NAMES |= {f'{key}+launched': f'{name} without CUDA graphs' for key, name in NAMES.items()}
ON_4_GPUS, ZERO1_ON_4_GPUS = 'trainers_h200x4', 'trainers_h100x4'  # in the latter DDP and phase 1 took turns
MANY = {'124M': 10, '1.5B': 5}  # the larger number of micro-steps in the first of them
TRY = 'nanoGPT/config/train_python_char.py --max_iters=20 --eval_interval=20 --eval_iters=2 --log_interval=20 --always_save_checkpoint=True'
TRY_2 = 'torchrun --standalone --nproc_per_node=2'
CHECKS = [  # what the summary shows with its output
    f"{TRY_2} nanoGPT/train.py {TRY} --out_dir=out-ddp | grep -E '^(step|iter) 20'",
    f"{TRY_2} phase1_zero1/train.py {TRY} --out_dir=out-zero1 | grep -E '^(Using|step 20|iter 20)'",
    f"{TRY_2} phase3_fsdp/train.py {TRY} --out_dir=out-fsdp | grep -E '^(each|step 20|iter 20)'",
    f"{TRY_2} phase3_fsdp/train.py {TRY} --out_dir=out-zero1 --init_from=resume --max_iters=40 | grep -E '^(Resuming|step|iter) '",
    'python -m pytest -q tests/test_layout.py tests/test_zero1.py | tail -n 1',
    'python -m pytest -q tests/test_parity.py tests/test_interchange.py | tail -n 1',
]


def table(function):
    TABLES[function.__name__] = function
    return function


@cache
def load(name):
    """A result file, or None where it is not there."""
    path = RESULTS / f'{name}.json'
    return json.loads(path.read_text()) if path.exists() else None


def cite(name, document):
    """A link to the result file from the document."""
    return f'[{name}.json]({os.path.relpath(RESULTS / f"{name}.json", (ROOT / document).parent)})'


def markdown(header, rows):
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in [header, ['---'] * len(header), *rows])


def gib(n, digits=2):
    return f'{n / GIB:,.{digits}f}'


def parameters_of(size):
    """Of GPT-2 without biases, 50304 tokens, 1024 positions."""
    layers, width = SHAPES[size]
    return 50304 * width + 1024 * width + layers * (12 * width**2 + 2 * width) + width


def reference_files():
    """{short name of the GPU: name of its result file}."""
    return {short(load(path.stem)): path.stem for path in sorted(RESULTS.glob('reference_h*.json'))}


def short(report):
    """'H100' of 'NVIDIA H100 80GB HBM3'."""
    return report.get('facts', report)['device'].removeprefix('NVIDIA ').split()[0]


@table
def reference(document):
    names = {
        'train.py': '`nanoGPT/train.py`, without CUDA graphs',
        'bench.py, data set': 'the bare step, batches from the data set',
        'bench.py, the same random tokens': 'the bare step, the same batch each time',
    }
    files = reference_files()
    reports = {gpu: {row['what']: row for row in load(name)['rows']} for gpu, name in files.items()}
    cells = [
        (text, *(f'{statistics.median(rows[what]["tokens_per_sec"]):,.0f}' for rows in reports.values()))
        for what, text in names.items()
    ]
    peaks = [gib(rows['train.py']['runs'][0]['peak_memory_bytes'], 1) for rows in reports.values()]
    cells.append(('peak memory of `train.py`, GiB', *peaks))
    cells.append(('result file', *(cite(name, document) for name in files.values())))
    return markdown(['tokens/s', *(f'one {gpu}' for gpu in files)], cells)


@table
def reference_cpu(document):
    summary = load('reference_cpu')['summary']
    ratios = summary['ratios']
    return (
        f'{summary["speed_against_minimal_loop_medians"]:.2f} of the speed of a minimal loop over the same model '
        f'({cite("reference_cpu", document)}: pairs of runs from {min(ratios):.2f} to {max(ratios):.2f}, on a shared machine)'
    )


@table
def zero1_speed(document):
    rows = []
    for size, by_micro_steps in load('zero1_h200x4')['speed'].items():
        for micro_steps, row in by_micro_steps.items():
            ddp, zero1, by_round = row['ddp'], row['zero1'], row['zero1_of_ddp_by_round']
            rows.append(
                (
                    f'{size} × {micro_steps}',
                    f'{ddp["tokens_per_sec"]:,.0f}',
                    f'{zero1["tokens_per_sec"]:,.0f}',
                    f'**{row["zero1_of_ddp"]:.1%}** ({100 * min(by_round):.1f} to {100 * max(by_round):.1f})',
                    f'{gib(ddp["at_rest_bytes"])} → {gib(zero1["at_rest_bytes"])}',
                    f'{gib(ddp["peak_bytes"])} → {gib(zero1["peak_bytes"])}',
                )
            )
    return markdown(
        ['model × micro-steps', 'DDP, tokens/s', 'ZeRO-1, tokens/s', 'of DDP (by round)', 'at rest, GiB', 'peak, GiB'],
        rows,
    )


@table
def zero1_parts(document):
    parts = load('zero1_h200x4')['parts_ms']
    names = {
        'AdamW': 'AdamW of all parameters (DDP)',
        'step: AdamW of the shards': "a rank's share of it",
        'step: all-gather in place': 'all-gather in place',
        'instead: one all-gather of a buffer': 'instead: one all-gather of a buffer, with copies',
        'instead: an all-gather for each parameter': 'instead: an all-gather for each parameter',
        "instead: ZeroRedundancyOptimizer's broadcasts": "instead: a broadcast for each piece, by ZeroRedundancyOptimizer's own function",
    }
    return markdown(
        ['the optimizer step, ms', *parts],
        [(text, *(f'{its[name]:.2f}' for its in parts.values())) for name, text in names.items()],
    )


@table
def zero1_saved(document):
    one = [load('zero1_h200x4')['speed'][size]['1'] for size in ('124M', '1.5B')]
    measured, expected = (' and '.join(gib(row[key]) for row in one) for key in ('saved_bytes', 'saved_bytes_expected'))
    return f'{measured} GiB measured, {expected} computed'


@table
def zero1_trainers(document):
    """The whole train.py against DDP's."""
    sizes = [
        f'{of_ddp("zero1", size, 10, ZERO1_ON_4_GPUS):.1%} of the speed of DDP at {size} with 10 micro-steps and '
        f'{of_ddp("zero1", size, 1, ZERO1_ON_4_GPUS):.1%} with 1'
        for size in ('124M', '1.5B')
    ]
    rows = {(row['trainer'], row['size']): row for row in load(ZERO1_ON_4_GPUS)['rows']}
    rest = ' → '.join(gib(rows[trainer, '1.5B']['memory_bytes']['rest'], 1) for trainer in ('ddp', 'zero1'))
    return f'{", ".join(sizes)}, where {rest} GiB are taken at rest ({cite(ZERO1_ON_4_GPUS, document)})'


@table
def zero1_save(document):
    saves = load('zero1_h200x4')['save'].values()
    peaks, seconds = (
        ' and '.join(gib(s['peak_bytes']) for s in saves),
        ' and '.join(f'{s["seconds"]:.1f}' for s in saves),
    )
    return f'({peaks} GiB); collecting the state took {seconds} s'


@table
def zero1_range(document):
    ratios = [row['zero1_of_ddp'] for its in load('zero1_h200x4')['speed'].values() for row in its.values()]
    return f'{100 * min(ratios):.1f}% to {100 * max(ratios):.1f}%'


@table
def zero1_less(document):
    """How much less memory at rest, over both sizes."""
    its = [row['1'] for row in load('zero1_h200x4')['speed'].values()]
    less = [row['saved_bytes'] / row['ddp']['at_rest_bytes'] for row in its]
    return f'{100 * min(less):.0f}% to {100 * max(less):.0f}%'


@table
def zero1_curves(document):
    curves = load('zero1_124M_curves_h200x4')['curves']
    apart = [max(abs(a - b) for a, b in zip(curves['ddp'], curves[name])) for name in ('zero1', 'ddp again')]
    other = max(abs(a - b) for a, b in zip(curves['ddp'], curves['ddp, other data']))
    means = {name: f'{statistics.mean(losses[-10:]):.3f}' for name, losses in curves.items()}
    return (
        f'at most {apart[0]:.3f} and {apart[1]:.3f} apart), where another data order is up to {other:.2f} away. Means of the last ten steps: '
        f'DDP {means["ddp"]}, ZeRO-1 {means["zero1"]}, DDP again {means["ddp again"]}, other data {means["ddp, other data"]} '
        f'({cite("zero1_124M_curves_h200x4", document)})'
    )


@table
def layer_norm(document):
    rows = []
    for row in load('layer_norm_h100')['rows']:
        cells = []
        for name in ('eager', 'compiled', 'liger', 'ours'):
            its = row[name]
            cells.append(
                f'{its["forward_percent"]:.0f} · {its["both_percent"]:.0f}' if 'forward_percent' in its else 'refuses'
            )
        us = f'{row["ours"]["forward_us"][0]:.1f} · {row["ours"]["both_us"][0]:.1f}'
        mix = f'{row["x"]} / {row["weight"]} → {row["y"]}'
        rows.append((mix, f'{row["M"]} × {row["N"]}', f'{row["copy_percent"]:.0f}', *cells[:3], f'**{cells[3]}**', us))
    header = [
        'x / weight → y',
        'shape',
        'copy',
        'eager fwd · both',
        'compiled fwd · both',
        'Liger fwd · both',
        '**ours fwd · both**',
        'ours µs',
    ]
    return markdown(header, rows)


def measured_by(report, name, document):
    """Where the numbers of a result file come from, in a line."""
    versions = report['versions']
    where = f'{report["device"]}, torch {versions["torch"]}, Triton {versions["triton"]}, {report["date"][:10]}'
    return f'{where} ({cite(name, document)}, by `{report["command"]}`)'


def work_of(report):
    """Size, sequences in a micro-step and micro-steps of a result file of bench_phase2.py; the first ones say nothing."""
    return report.get('size', '124M'), report.get('batch_size', 12), report.get('micro_steps', 8)


@table
def phase2_ladder(document):
    blocks = []
    for path in sorted(RESULTS.glob('phase2_ladder_*.json')):
        cells = []
        size, batch_size, micro_steps = work_of(load(path.stem))
        for row in load(path.stem)['rows']:
            ms, ratios = row['ms'], row['ratios']
            cells.append(
                (
                    row['name'],
                    f'{statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})',
                    f'{row["tokens_per_s"]:,.0f}',
                    f'**{row["ratio"]:.3f}** ({min(ratios):.3f} to {max(ratios):.3f})',
                    gib(row['peak_memory_bytes']),
                )
            )
        header = ['', 'ms of an iteration', 'tokens/s', 'of the compiled reference in the same turns', 'peak, GiB']
        caption = f'{size}, {micro_steps} micro-steps of {batch_size} × 1024 tokens: {measured_by(load(path.stem), path.stem, document)}'
        blocks.append(f'{caption}:\n\n{markdown(header, cells)}')
    return '\n\n'.join(blocks)


@table
def phase2_curves(document):
    reports = {path.stem: load(path.stem) for path in sorted(RESULTS.glob('phase2_curves_*.json'))}
    blocks = [
        (measured_by(its, name, document), '\n'.join(its['summary']))
        for name, its in reports.items()
        if 'summary' in its
    ]
    return '\n\n'.join(f'{caption}:\n\n```\n{text}\n```' for caption, text in blocks)


@table
def phase2_profile(document):
    """The kernels that take more than 0.1 ms of a micro-step."""
    blocks = []
    for path in sorted(RESULTS.glob('phase2_profile_*.json')):
        blocks.append(f'{measured_by(load(path.stem), path.stem, document)}:')
        for row in load(path.stem)['rows']:
            # in a table | ends a cell
            cells = [
                (f'{us / 1e3:.2f}', f'{times:.1f}', f'`{kernel[:60].replace("|", "/")}`')
                for us, times, kernel in row['kernels']
                if us > 100
            ]
            blocks.append(f'{row["name"]}, {row["ms"]:.2f} ms of kernels in a micro-step of {row["span_ms"]:.2f} ms:')
            blocks.append(markdown(['ms', 'times', 'kernel'], cells))
    return '\n\n'.join(blocks)


@table
def phase2_largest(document):
    blocks = []
    for path in sorted(RESULTS.glob('phase2_largest_*.json')):
        cells = [
            (
                row['name'],
                row['batch_size'],
                f'{row["tokens_per_s"]:,.0f}',
                gib(row['peak_memory_bytes'], 1),
                f'{row["bytes_per_sequence"] / 2**20:,.0f}',
            )
            for row in load(path.stem)['rows']
        ]
        limit = load(path.stem).get('gib')
        header = [
            f'the most that fits into a micro-step{f" in {limit:g} GiB" if limit else ""}',
            'sequences of 1024',
            'tokens/s',
            'peak, GiB',
            'MiB a sequence',
        ]
        note = load(path.stem).get('note')
        blocks.append(
            f'{measured_by(load(path.stem), path.stem, document)}{f". {note}" if note else ""}:\n\n{markdown(header, cells)}'
        )
    return '\n\n'.join(blocks)


@table
def kernels(document):
    blocks = []
    for path in sorted(RESULTS.glob('kernels_*.json')):
        cells = []
        for row in load(path.stem)['rows']:
            line = [row['name']]
            for name in ('eager', 'compiled', 'Liger', 'ours'):
                r = row.get(name, {})
                text = f'{r["us"]:,.1f}' if 'us' in r else 'fails' if r else ''
                text += f' · {r["percent_of_copy"]:.0f}%' if 'percent_of_copy' in r else ''
                text += f' · {gib(r["peak_memory_bytes"])} GiB' if 'peak_memory_bytes' in r else ''
                line.append(f'**{text}**' if name == 'ours' else text)
            cells.append(line)
        header = ['forward + backward, µs · of copy bandwidth', 'eager', 'compiled', 'Liger', 'ours']
        blocks.append(f'{measured_by(load(path.stem), path.stem, document)}:\n\n{markdown(header, cells)}')
    return '\n\n'.join(blocks)


@table
def memory(document):
    """By component, computed."""
    rows = []
    for size in SHAPES:
        n = parameters_of(size)
        rows.append(
            (f'{size} ({n:,})', 'DDP, phase 2', 'any', gib(4 * n), gib(4 * n), gib(8 * n), f'**{gib(16 * n)}**')
        )
        for name, parts in (('phase 1', (1, 1, 0)), ('phase 3', (0, 0, 0))):
            for k in (2, 4, 8):
                its = [size_of * n / (1 if whole else k) for size_of, whole in zip((4, 4, 8), parts)]
                rows.append(('', name, k, *map(gib, its), f'**{gib(sum(its))}**'))
    return markdown(['model (parameters)', 'trainer', 'GPUs', 'parameters', 'gradients', 'AdamW', 'GiB on each'], rows)


@table
def shards_on_8(document):
    """The fullest of 8 processes, in a sentence."""
    rows = load('shards_cpu_x8')['rows']
    parts = []
    for row in in_order(rows):
        held = {key: row['memory_bytes'][key] for key in ('parameters', 'gradients', 'optimizer')}
        parts.append(
            f'under {NAMES[row["trainer"]]} {sum(held.values()) / row["parameters"]:.2f} bytes a parameter, AdamW {gib(held["optimizer"], 3)} GiB'
        )
    return f'{"; ".join(parts)} ({cite("shards_cpu_x8", document)})'


@table
def memory_of_zero1(document):
    rows = [('bytes per parameter', '16', '12', '10', '9', '8 + 8 / W')]
    for size in ('124M', '1.5B'):
        n = parameters_of(size)
        rows.append((f'GPT-2 {size} ({n:,}), GiB', gib(16 * n), *(gib((8 + 8 / k) * n) for k in (2, 4, 8)), ''))
    return markdown(['', 'DDP', 'ZeRO-1, W = 2', 'W = 4', 'W = 8', 'any W'], rows)


@table
def memory_of_fsdp(document):
    n = parameters_of('1.5B')
    rows = [
        ('bytes per parameter', '16', '8 + 8/k', '16/k'),
        (f'GPT-2 1.5B ({n:,}), k = 4, GiB', *(gib(b * n, 1) for b in (16, 10, 4))),
    ]
    return markdown(['', 'DDP', 'ZeRO-1', 'FSDP'], rows)


@table
def measured(document):
    """The README's, of one GPU."""
    rows = []
    for gpu, name in reference_files().items():
        its = load(name)['rows'][0]
        speed, peak = statistics.median(its['tokens_per_sec']), its['runs'][0]['peak_memory_bytes']
        rows.append(('reference, without CUDA graphs', gpu, f'{speed:,.0f}', '', gib(peak, 1), cite(name, document)))
    for path in sorted(RESULTS.glob('phase2_ladder_*.json')):
        if work_of(load(path.stem)) != ('124M', 12, 8):
            continue
        its = {row['name']: row for row in load(path.stem)['rows']}
        recorded = its.get('reference, compiled, cuda_graph')
        older = (
            '+ weights rounded once an iteration'  # the last change before half_residual in ladders until 2026-11-28
        )
        for name, text in (
            ('+ clipping by AdamW' if '+ clipping by AdamW' in its else older, 'phase 2, the step'),
            ('+ half_residual', 'with a 16-bit residual stream'),
        ):
            if name not in its:
                continue
            row = its[name]
            than = f'{row["ratio"]:.2f} × the reference' + (
                f', {row["ratio"] / recorded["ratio"]:.2f} × it with CUDA graphs' if recorded else ''
            )
            gpu, file = short(load(path.stem)), cite(path.stem, document)
            rows.append((text, gpu, f'{row["tokens_per_s"]:,.0f}', than, gib(row['peak_memory_bytes'], 1), file))
    return markdown(['', 'GPU', 'tokens/s', 'that is', 'peak, GiB', 'result file'], rows)


def of_ddp(trainer, size, micro_steps, name=ON_4_GPUS):
    """The speed of a trainer on four GPUs, DDP's being 1."""
    found = {
        r['trainer']: r
        for r in load(name)['rows']
        if (r['processes'], r['size'], r['micro_steps']) == (4, size, micro_steps)
    }
    return found[trainer]['tokens_per_sec']['median'] / found['ddp']['tokens_per_sec']['median']


@table
def triton_of_ddp(document):
    """The kernels on several GPUs, alone and under phases 1 and 3."""
    rows = []
    for size in MANY:
        for name in ('triton', 'zero1+triton', 'fsdp+triton'):
            rows.append((NAMES[name], size, *(f'{of_ddp(name, size, n):.1%}' for n in (MANY[size], 1))))
    return markdown(
        ['', 'model', f'of the speed of DDP, {MANY["124M"]} (1.5B: {MANY["1.5B"]}) micro-steps', '1 micro-step'], rows
    )


@table
def fsdp_of_ddp(document):
    """Phase 3 against DDP, both as their train.py runs them by default, and without its CUDA graphs."""
    return (
        f'on four H200s phase 3 has {of_ddp("fsdp", "124M", 10):.1%} of the speed of DDP at 124M with 10 micro-steps and '
        f'{of_ddp("fsdp", "124M", 1):.1%} with 1, {of_ddp("fsdp", "1.5B", 5):.1%} at 1.5B with 5 and {of_ddp("fsdp", "1.5B", 1):.1%} with 1 '
        f'({cite(ON_4_GPUS, document)}). All with CUDA graphs: without them phase 3 falls to {of_ddp("fsdp+launched", "124M", 10):.1%} and '
        f'{of_ddp("fsdp+launched", "124M", 1):.1%} at 124M, because the CPU cannot keep up with 13 units. Part of what it is ahead of DDP is '
        'that it writes no logits and has a residual stream of 16 bits'
    )


@table
def fsdp_checkpoint(document):
    """What saves at 1.5B cost the training, copying and slower steps together."""
    rows = []
    report = load('fsdp_checkpoint_h200x4')
    sharded, full = report['results']
    for its, save in zip(sharded['steps'], sharded['saves']):
        usual, during = its['seconds'], its['seconds_while_saving']
        lost = save['stall_seconds'] + sum(during) - len(during) * usual
        rows.append(
            (
                its['micro_steps'],
                f'{usual:.2f}',
                f'{save["stall_seconds"]:.2f}',
                f'{during[0]:.2f}',
                f'{statistics.median(during[1:]):.2f}',
                f'{save["seconds"]:.0f}',
                f'**{lost:.2f}**',
            )
        )
    header = [
        'micro-steps',
        'a step',
        'copying',
        'the step after that',
        'each step until all is on the disk',
        'until then',
        'training has lost in all',
    ]
    seconds = f'{full["gather_seconds"]:.1f} s to collect {gib(full["bytes"])} GiB on rank 0, {full["seconds"]:.1f} s until they are written'
    text = f'`full`: {seconds} (without the fsync that train.py adds).'
    return f'{report["processes"]} × {measured_by(report, "fsdp_checkpoint_h200x4", document)}, seconds:\n\n{markdown(header, rows)}\n\n{text}'


@table
def fsdp_curves(document):
    """The second half of 200 steps, against other seeds."""
    summary = load('fsdp_curves_h100x4')['results'][-1]
    means, apart = summary['mean_of_second_half'], ' and '.join(f'{d:+.3f}' for d in summary['fsdp_minus_ddp'])
    ddp, fsdp = ([mean for name, mean in means.items() if name.startswith(kind)] for kind in ('ddp', 'fsdp'))
    ddp_text, fsdp_text = (', '.join(f'{mean:.3f}' for mean in its) for its in (ddp, fsdp))
    return (
        f'DDP {ddp_text} with three seeds, FSDP {fsdp_text} with the first two of them, {apart} from DDP with the same seed; '
        f"DDP's seeds are up to {max(ddp) - min(ddp):.3f} apart ({cite('fsdp_curves_h100x4', document)})"
    )


@table
def fsdp_largest(document):
    """The largest model that trains."""
    names = {
        'ddp': 'DDP',
        'zero1': 'phase 1',
        'fsdp': 'phase 3, `--fsdp_reshard=True`',
        'fsdp+ac': '+ `--activation_checkpointing`',
        'fsdp+ac+offload': '+ `--fsdp_cpu_offload`',
    }
    blocks, by_machine = [], {}
    for path in sorted(RESULTS.glob('fsdp_largest_*.json')):
        report = load(path.stem)
        by_machine.setdefault((report['processes'], report['device']), []).append(path.stem)
    for _, files in sorted(by_machine.items(), reverse=True):
        report, rows = load(files[0]), []
        found = {row['name']: (row, name) for name in files for row in load(name)['results']}
        for row, name in (found[key] for key in names if key in found):
            rows.append(
                (
                    names[row['name']],
                    f'**{row["parameters"] / 1e9:.1f} billion**',
                    f'{row["n_layer"]} of {row["n_embd"]}',
                    row['smallest_that_does_not_fit'] or 'not found',
                    f'{row["tokens_per_sec"]["median"]:,.0f}',
                    gib(row['rest_bytes'], 1),
                    gib(row['peak_bytes'], 1),
                    cite(name, document),
                )
            )
        header = [
            '',
            'parameters',
            'layers of width',
            'do not fit',
            'tokens/s',
            'at rest, GiB',
            'peak, GiB',
            'result file',
        ]
        where = (
            f'{report["processes"]} × {report["device"]}, torch {report["versions"]["torch"]}, {report["date"][:10]}'
        )
        blocks.append(f'{where}, by `python benchmarks/bench_fsdp.py largest`:\n\n{markdown(header, rows)}')
    return '\n\n'.join(blocks)


@table
def largest(document):
    """What fits, in a sentence."""
    billions = {
        name: load(f'fsdp_largest_{name}_h200x4')['results'][0]['parameters'] / 1e9 for name in ('ddp', 'zero1', 'fsdp')
    }
    most = {row['name']: row['batch_size'] for row in load('phase2_largest_h100')['rows']}
    names = ('reference, compiled', '+ weights rounded once an iteration', 'loss_rows=4096')
    files = [
        cite(name, document) for name in (*(f'fsdp_largest_{key}_h200x4' for key in billions), 'phase2_largest_h100')
    ]
    reference, phase2, rows = (most[name] for name in names)
    return (
        f'On four H200s DDP trains up to {billions["ddp"]:.1f} billion parameters, phase 1 {billions["zero1"]:.1f}, phase 3 {billions["fsdp"]:.1f} '
        f'(one sequence of 1024 tokens a GPU; {", ".join(files[:-1])}). On an H100 of 80 GB '
        f'the compiled reference fits {reference} sequences of 124M into a micro-step, '
        f'phase 2 {phase2}, with `--half_residual --loss_rows=4096` {rows} ({files[-1]})'
    )


@table
def fsdp_variants(document):
    """What single choices of phase 3 are worth, GPT-2 124M."""
    blocks = []
    for path in sorted(RESULTS.glob('fsdp_variants_*.json')):
        report, found = load(path.stem), {}
        for row in report['results']:
            found.setdefault(row['name'], {})[row['micro_steps']] = row
        counts = sorted({row['micro_steps'] for row in report['results']})
        cells = [
            (
                name,
                *('{median:,.0f} ({p10:,.0f} to {p90:,.0f})'.format(**its[n]['tokens_per_sec']) for n in counts),
                *(
                    f'{its[n]["tokens_per_sec"]["median"] / found["default"][n]["tokens_per_sec"]["median"]:.1%}'
                    for n in counts
                ),
                *(gib(its[counts[-1]][key]) for key in ('rest_bytes', 'peak_bytes')),
            )
            for name, its in found.items()
        ]
        header = ['', *(f'{n} micro-step{"s" * (n > 1)}: tokens/s (10th to 90th percentile)' for n in counts)]
        header += [*(f'{n}: of the default' for n in counts), 'at rest, GiB', 'peak, GiB']
        blocks.append(
            f'{report["processes"]} × {measured_by(report, path.stem, document)}:\n\n{markdown(header, cells)}'
        )
    return '\n\n'.join(blocks)


@table
def bytes_per_parameter(document):
    rows = [
        (name, *(f'{f(k):.0f}' if f(k) == int(f(k)) else f'{f(k):g}' for k in (1, 2, 4, 8)))
        for name, f in (('DDP, phase 2', lambda k: 16), ('phase 1', lambda k: 8 + 8 / k), ('phase 3', lambda k: 16 / k))
    ]
    return markdown(['bytes per parameter on each GPU', '1 GPU', '2', '4', '8'], rows)


@table
def lines(document):
    """What each phase changes, counted."""
    rows = []
    sharded = {
        'phase1_zero1': "AdamW's state",
        'phase2_triton': 'nothing; computes with Triton kernels',
        'phase3_fsdp': "parameters, gradients, AdamW's state",
    }
    for folder, name in PHASES.items():
        old, new = ((ROOT / place / name).read_text().splitlines() for place in ('nanoGPT', folder))
        changed = sum(
            max(b - a, d - c)
            for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
            if tag != 'equal'
        )
        here, added = ROOT / folder, {}
        for path in sorted(here.rglob('*.py')):
            name_here = path.relative_to(here)
            if not (ROOT / 'nanoGPT' / name_here).exists() and not name_here.parts[0].startswith('out'):
                added.setdefault(name_here.parts[0], []).append(len(path.read_text().splitlines()))
        added = ', '.join(
            f'{top} ({f"{len(its)} files, " * (len(its) > 1)}{sum(its)} lines)' for top, its in added.items()
        )
        link = os.path.relpath(ROOT / folder / 'IMPLEMENTATION.md', (ROOT / document).parent)
        rows.append((f'[{folder}]({link})', sharded[folder], f'{name}, {changed} of {len(old)} lines', added))
    return markdown(['folder', 'what is sharded', 'changed file', 'added'], rows)


def trainer_files():
    """Results of bench_trainers.py on GPUs, by name."""
    return [
        path.stem
        for path in sorted(RESULTS.glob('trainers_*.json'))
        if load(path.stem)['sessions'][0]['device_type'] == 'cuda'
    ]


def origin(name, document):
    """Where the numbers of a result file of bench_trainers.py come from."""
    session = load(name)['sessions'][0]
    versions = session['versions']
    parts = [session['device'], f'torch {versions["torch"]}']
    parts += [
        f'{key} {versions[key]}' for key in ('triton', 'nccl') if versions.get(key) and session['device_type'] == 'cuda'
    ]
    parts += [f'driver {session["driver"]}'] if session['driver'] else []
    return f'{", ".join(parts)}, {session["date"][:10]} ({cite(name, document)}, by `benchmarks/bench_trainers.py`)'


def in_order(rows):
    def place(row):
        size = list(SHAPES).index(row['size']) if row['size'] in SHAPES else -1
        return row['processes'], size, row['micro_steps'] or 0, list(NAMES).index(row['trainer'])

    return sorted(rows, key=place)


def one_of_each(rows):
    """The row with the most micro-steps of each trainer, size and number of processes, without failures."""
    return {
        (row['processes'], row['size'], row['trainer']): row for row in in_order(rows) if 'error' not in row
    }.values()


def base_of(row, rows):
    """DDP's row for the same work, or None: without CUDA graphs for what says so, else as it is by default, or what there is."""
    same = ('size', 'processes', 'micro_steps')
    found = {r['trainer']: r for r in rows if 'error' not in r and all(r[key] == row[key] for key in same)}
    names = ('ddp+launched', 'ddp') if row['trainer'].endswith('+launched') else ('ddp', 'ddp+launched')
    return next((found[name] for name in names if name in found), None)


def in_short(name, document):
    """DDP's tokens/s by model and micro-steps, the others' in percent of it, and memory in GiB, from a result file of bench_trainers.py."""
    rows = [
        row
        for row in in_order(load(name)['rows'])
        if 'error' not in row and not row['trainer'].endswith(('launched', 'one_unit'))
    ]
    works = list(dict.fromkeys((row['size'], row['micro_steps']) for row in rows))
    sizes = list(dict.fromkeys(size for size, _ in works))
    found = {(row['trainer'], row['size'], row['micro_steps']): row for row in rows}
    memory = {(row['trainer'], row['size']): row['memory_bytes'] for row in one_of_each(rows)}
    cells = []
    for trainer in (key for key in NAMES if key in {row['trainer'] for row in rows}):
        line = [NAMES[trainer]]
        for work in works:
            row = found.get((trainer, *work))
            base = row and base_of(row, rows)
            speed = row and row['tokens_per_sec']['median']
            line.append(
                ''
                if not row
                else f'{speed / base["tokens_per_sec"]["median"]:.1%}'
                if base and base is not row
                else f'{speed:,.0f}'
            )
        its = [memory.get((trainer, size)) for size in sizes]
        cells.append([*line, *(f'{gib(m["rest"])}, {gib(m["peak"], 1)}' if m else '' for m in its)])
    header = ['', *(f'{size} × {n}' for size, n in works), *(f'{size}: at rest, peak' for size in sizes)]
    where = f'{rows[0]["processes"]} × {load(name)["sessions"][0]["device"]} ({cite(name, document)})'
    return f'{where}:\n\n{markdown(header, cells)}'


@table
def trainers_on_4(document):
    return in_short(ON_4_GPUS, document)


@table
def trainers_on_1(document):
    return '\n\n'.join(in_short(name, document) for name in ('trainers_h200x1', 'trainers_h100x1'))


@table
def trainers_speed(document):
    blocks = []
    for name in trainer_files():
        cells, rows = [], load(name)['rows']
        for row in in_order(rows):
            where = f'{row["size"]} × {row["micro_steps"]}' if row['micro_steps'] else row['size']
            if 'error' in row:
                cells.append((row['processes'], where, NAMES[row['trainer']], row['error'].split(':')[0], *[''] * 5))
                continue
            speed, base, per = (
                row['tokens_per_sec'],
                base_of(row, rows),
                row['tokens_per_sec']['median'] / row['processes'],
            )
            ratio = f'{speed["median"] / base["tokens_per_sec"]["median"]:.1%}' if base and base is not row else ''
            cells.append(
                (
                    row['processes'],
                    where,
                    NAMES[row['trainer']],
                    f'{speed["median"]:,.0f} ({speed["min"]:,.0f} to {speed["max"]:,.0f})',
                    f'{per:,.0f}',
                    ratio,
                    f'{row["time_ms"]["median"]:,.1f}',
                    f'{row["mfu"]:.1%}' if row['mfu'] else 'n/a',
                    ' / '.join(f'{s:.0f}' for s in row['first_step_seconds']),
                )
            )
        header = [
            'GPUs',
            'model × micro-steps',
            'trainer',
            'tokens/s (smallest to largest)',
            'per GPU',
            'of DDP',
            'step, ms',
            'MFU',
            'first step after, s',
        ]
        blocks.append(f'{origin(name, document)}:\n\n{markdown(header, cells)}')
    return '\n\n'.join(blocks)


@table
def trainers_memory(document):
    blocks = []
    for name in trainer_files():
        cells = []
        for row in one_of_each(load(name)['rows']):
            m = row['memory_bytes']
            parts = ('parameters', 'gradients', 'optimizer', 'not_accounted_for', 'rest', 'activations', 'peak')
            where = f'{row["size"]} × {row["micro_steps"]}'
            cells.append((row['processes'], where, NAMES[row['trainer']], *(gib(m[key]) for key in parts)))
        header = [
            'GPUs',
            'model × micro-steps',
            'trainer',
            'parameters',
            'gradients',
            'AdamW',
            'else',
            'at rest',
            'more at the peak',
            'peak, GiB',
        ]
        blocks.append(f'{origin(name, document)}:\n\n{markdown(header, cells)}')
    return '\n\n'.join(blocks)


@table
def trainers_checkpoint(document):
    blocks = []
    for name in trainer_files():
        cells = []
        for row in one_of_each(load(name)['rows']):
            if c := row.get('checkpoint'):
                cells.append(
                    (
                        row['processes'],
                        row['size'],
                        NAMES[row['trainer']],
                        gib(c['bytes']),
                        f'{statistics.median(c["save_seconds"]):.1f}',
                        f'{statistics.median(c["ready_seconds_resumed"]):.1f}' if c['ready_seconds_resumed'] else '',
                    )
                )
        if cells:
            header = [
                'GPUs',
                'model',
                'trainer',
                'ckpt.pt, GiB',
                'training stands still for a save, s',
                'from start to loaded, s',
            ]
            blocks.append(f'{origin(name, document)}:\n\n{markdown(header, cells)}')
    return '\n\n'.join(blocks)


@table
def trainers_cpu(document):
    """The arithmetic of memory, seen in the tensors. How many tokens a second a CPU does says nothing, so speeds are ratios."""
    report = load('trainers_cpu')
    if not report:
        return ''
    rows, cells = in_order(report['rows']), []
    for row in rows:
        n, k = row['parameters'], row['processes']
        if row['micro_steps'] != 1 or k == 1:
            continue
        parts = [row['memory_bytes'][key] / n for key in ('parameters', 'gradients', 'optimizer')]
        computed = {'zero1': 8 + 8 / k, 'fsdp': 16 / k, 'hybrid': 16 / (k // 2)}.get(row['trainer'].split('+')[0], 16)
        speed, base = row['tokens_per_sec'], base_of(row, rows)
        # more processes than cores take turns
        ratios = (
            base
            and k == 2
            and '{:.2f} ({:.2f} to {:.2f})'.format(
                *(speed[key] / base['tokens_per_sec']['median'] for key in ('median', 'min', 'max'))
            )
        )
        cells.append(
            (k, NAMES[row['trainer']], *(f'{part:.2f}' for part in (*parts, sum(parts))), f'{computed:g}', ratios or '')
        )
    header = [
        'processes',
        'bytes per parameter',
        'parameters',
        'gradients',
        'AdamW',
        'sum',
        'by arithmetic',
        "speed, of DDP's median",
    ]
    return f'A model of {rows[0]["parameters"]:,} parameters, gloo: {origin("trainers_cpu", document)}.\n\n{markdown(header, cells)}'


@table
def checks(document):
    """The verification commands with what they printed."""
    report = load('checks_cpu')
    if not report:
        return ''
    where = f'{report["device"]}, {report["cpus"]} cores, torch {report["versions"]["torch"]}, {report["date"][:10]} ({cite("checks_cpu", document)})'
    return where + ':\n\n```\n' + '\n'.join(f'$ {c["command"]}\n{c["output"]}' for c in report['checks']) + '\n```'


def run_checks():
    """Runs the verification commands and keeps what they print."""
    results, path = [], f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
    for command in CHECKS:
        done = subprocess.run(
            command,
            shell=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=dict(os.environ, PATH=path, OMP_NUM_THREADS='1'),
        )
        output = done.stdout.strip().replace(str(ROOT), '.')
        print(f'$ {command}\n{output}', flush=True)
        if not output:
            sys.exit(done.stderr)
        results.append({'command': command, 'output': output})
    write_json(RESULTS / 'checks_cpu.json', facts(cpu=True) | {'checks': results})


def overview_data():
    """What the README's picture shows: GiB by component on each of 4 GPUs, computed; measured at rest; and speeds."""
    n = parameters_of('1.5B')
    computed = {
        'DDP': [4 * n / GIB, 4 * n / GIB, 8 * n / GIB],
        'phase 1\nZeRO-1': [4 * n / GIB, 4 * n / GIB, 8 * n / 4 / GIB],
        'phase 3\nFSDP': [4 * n / 4 / GIB, 4 * n / 4 / GIB, 8 * n / 4 / GIB],
    }
    rows = {(r['trainer'], r['size'], r['micro_steps']): r for r in load(ON_4_GPUS)['rows'] if 'error' not in r}
    measured = {
        name: rows[trainer, '1.5B', MANY['1.5B']]['memory_bytes']['rest'] / GIB
        for name, trainer in zip(computed, ('ddp', 'zero1', 'fsdp'))
    }
    speed = {
        f'{label}, {size}': 100 * of_ddp(trainer, size, MANY[size])
        for size in MANY
        for trainer, label in (
            ('zero1', 'phase 1'),
            ('triton', 'phase 2'),
            ('fsdp', 'phase 3'),
            ('fsdp+triton', 'phases 2 + 3'),
        )
    }
    names = {
        'reference, eager': 'reference, eager',
        'reference, compiled': 'reference, compiled',
        'reference, compiled, cuda_graph': 'reference, compiled, CUDA graph',
        '+ weights rounded once an iteration': 'phase 2, Triton',
        '+ half_residual': 'phase 2, 16-bit, residual',
    }
    tokens_per_s = {row['name']: row['tokens_per_s'] for row in load('phase2_ladder_h100')['rows']}
    ladder = {label: tokens_per_s[name] / 1000 for name, label in names.items() if name in tokens_per_s}
    return {'computed': computed, 'measured': measured, 'speed': speed, 'ladder': ladder}


def draw_overview(data, path, mark):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    plt.rcParams.update({'font.size': 15, 'axes.spines.top': False, 'axes.spines.right': False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(17, 5.4), layout='constrained', width_ratios=(1, 0.9, 1.2)
    )
    colors = {'parameters': '#0072B2', 'gradients': '#56B4E9', "AdamW's moments": '#E69F00'}
    names = list(data['computed'])
    bottom = [0.0] * len(names)
    for i, (part, color) in enumerate(colors.items()):
        heights = [data['computed'][name][i] for name in names]
        left.bar(names, heights, 0.62, bottom=bottom, color=color, label=part, edgecolor='white')
        bottom = [a + b for a, b in zip(bottom, heights)]
    for i, (name, total) in enumerate(zip(names, bottom)):
        left.text(i, max(total, data['measured'].get(name, 0)) + 0.7, f'{total:.1f}', ha='center')
    at = [names.index(name) for name in data['measured']]
    left.scatter(
        at,
        data['measured'].values(),
        s=110,
        facecolor='white',
        edgecolor='black',
        linewidth=2,
        zorder=3,
        label='measured at rest',
    )
    left.set(ylabel='GiB on each GPU', ylim=(0, 1.22 * max(bottom)), title='Memory: GPT-2 1.5B on 4 GPUs, computed')
    left.tick_params(axis='x', length=0)
    left.legend(frameon=False, loc='upper right', fontsize=14)
    labels = list(data['speed'])[::-1]
    for i, label in enumerate(labels):
        percent = data['speed'][label]
        middle.barh(i, percent, 0.62, color='#E69F00' if percent >= 99 else '#999999')
        middle.text(percent + 2, i, f'{percent:.0f}%', va='center')
    middle.axvline(100, color='black', linewidth=1.5)
    middle.text(100, len(labels) - 0.5, 'DDP', ha='center')
    middle.set_yticks(range(len(labels)), [label.replace(', ', '\n') for label in labels], fontsize=12.5)
    middle.set(
        xlabel='% of DDP, 10 (1.5B: 5) micro-steps',
        xlim=(0, 135),
        ylim=(-0.5, len(labels) - 0.1),
        title='Speed: four H200s',
    )
    middle.tick_params(axis='y', length=0)
    for i, (label, thousands) in enumerate(data['ladder'].items()):
        right.bar(i, thousands, 0.62, color='#E69F00' if label.startswith('phase 2') else '#999999')
        right.text(i, thousands + 8, f'{thousands:.0f}', ha='center')
    right.set_xticks(range(len(data['ladder'])), [label.replace(', ', '\n') for label in data['ladder']], fontsize=11.5)
    right.set(
        ylabel='thousand tokens/s',
        ylim=(0, 1.12 * max(data['ladder'].values(), default=1)),
        title='Speed: GPT-2 124M on one H100',
    )
    right.tick_params(axis='x', length=0)
    figure.savefig(path, dpi=80, metadata={'Source-Data': mark})
    plt.close(figure)


def mark_of(data):
    """Stands in the picture's file for the data that it shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


PICTURES = {'benchmarks/results/overview.png': (overview_data, draw_overview)}


def mark_in(path):
    from PIL import Image  # comes with matplotlib

    with Image.open(path) as image:
        return image.info.get('Source-Data')


def rewrite(text, document):
    """The document with all its tables as the result files have them."""

    def fill(match):
        opening, name, old, closing = match.groups()
        if name not in TABLES:
            raise SystemExit(f'{document}: there is no table {name}; there are {", ".join(TABLES)}')
        content = TABLES[name](document)
        inline = '\n' not in old and '\n' not in content and content
        return (
            f'{opening}{content}{closing}'
            if inline
            else f'{opening}\n\n{content}\n\n{closing}'
            if content
            else f'{opening}{closing}'
        )

    return BLOCK.sub(fill, text)


def documents():
    """Every .md of the project."""
    skip = re.compile(r'(^|/)(\.|out|build|node_modules)')
    return [path for path in sorted(ROOT.rglob('*.md')) if not skip.search(str(path.relative_to(ROOT)))]


def stale(write=False):
    """Names of documents and pictures that differ from the result files; with write they are written anew."""
    found = []
    for path in documents():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        new = rewrite(text, name)
        if new != text:
            found.append(name)
            if write:
                path.write_text(new)
    for name, (collect, draw) in PICTURES.items():
        data, path = collect(), ROOT / name
        if not path.exists() or mark_in(path) != mark_of(data):
            found.append(name)
            if write:
                draw(data, path, mark_of(data))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, and fail if something would change')
    parser.add_argument('--run', action='store_true', help='run the verification commands first')
    args = parser.parse_args()
    if args.run:
        run_checks()
    found = stale(write=not args.check)
    if args.check and found:
        sys.exit(f'{", ".join(found)}: not what the result files say; python benchmarks/report.py')
    print(', '.join(found) + ' written' if found else 'all as the result files say')


if __name__ == '__main__':
    main()
