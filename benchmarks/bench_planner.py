"""
Fits plan.py's efficiencies to the measured rows, and reports the errors of its predictions for rows that the fit did
not see.

    python benchmarks/bench_planner.py --fit       # writes planner/efficiencies.json
    python benchmarks/bench_planner.py --predict=benchmarks/results/planner_8gpus.json
    python benchmarks/bench_planner.py  # writes results/planner_error.json and .png, and the tables in docs/planner.md

Needs numpy and matplotlib but no GPU, and takes seconds. A configuration is a shape, a batch, a trainer and its
options, on any kind and number of GPUs and with any number of micro-steps. Each configuration in turn is left out,
everything is fitted to the others, and its rows are predicted.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'nanoGPT')]
from planner import measured, memory, options, plan, speed
from planner import report as report_module
from planner.gpus import GIB, GPUS
from planner.run import Run

from common import RESULTS
from tables import load, number

# the fields of Efficiencies that are fitted; the others keep their defaults
EFFICIENCIES = (
    'matmul',
    'narrow',
    'narrow_fp8',
    'attention',
    'compiled',
    'kernels',
    'eager',
    'fsdp',
    'fixed',
    'optimizer',
    'slowest_rank',
    'link',
    'exposed',
    'launch_kernels',
    'launch_fsdp',
    'launch_reduce',
)
ALLOCATOR = ('rounding', 'pool_compiled', 'pool_kernels')
PULL = 0.1  # weight of a squared change of an efficiency's logarithm, relative to squared relative errors


def fit(predict, start, names, rows, steps=12):
    """
    Returns {name: value} that minimizes predict(row, values), the log of predicted / measured, over the rows, by
    Gauss-Newton on the logarithms of the values. start: initial values, from a profile of one run. A pull towards them
    determines values that the rows alone do not.
    """
    x = origin = np.log([start[name] for name in names])

    def residuals(x):
        values = dict(zip(names, np.exp(x).tolist()))
        return np.array([predict(row, values) for row in rows])

    for _ in range(steps):
        r = residuals(x)
        jacobian = np.array([(residuals(x + 1e-4 * unit) - r) / 1e-4 for unit in np.eye(len(x))]).T
        pull = PULL * np.eye(len(x))
        change = np.linalg.solve(jacobian.T @ jacobian + pull, -jacobian.T @ r - PULL * (x - origin))
        x = x + np.clip(change, -0.5, 0.5)
        if np.abs(change).max() < 1e-4:
            break
    return dict(zip(names, np.exp(x).tolist()))


def speed_error(row, values):
    predicted = speed.tokens_per_sec(row.run, replace(speed.Efficiencies(), **values))
    return math.log(predicted / row.tokens_per_sec)


def memory_error(row, values):
    predicted = memory.memory(row.run, replace(memory.Allocator(), **values))['total']
    return math.log(predicted / row.reserved)


def full(row):
    """Returns whether kernels were launched and tensors left so little memory that torch may have freed some."""
    return bool(row.allocated) and not row.run.graphs and row.allocated > 0.94 * row.run.gpu.memory_bytes


def fits_speed(row):
    """
    Returns whether the fit uses the row's speed. It leaves out searches for the largest model, which time two steps.
    """
    return row.tokens_per_sec and row.kind != 'largest'


def fit_speed(rows):
    """Returns the fitted efficiencies: `mapping` from the rows that a full GPU slows down, all others without these."""
    start = asdict(speed.Efficiencies())
    slow = [row for row in rows if row.tokens_per_sec and memory.tight(row.run) and not row.run.graphs]
    values = fit(speed_error, start, EFFICIENCIES, [row for row in rows if fits_speed(row) and row not in slow])
    return values | fit(lambda row, more: speed_error(row, values | more), start, ('mapping',), slow)


def fit_memory(rows):
    return fit(memory_error, asdict(memory.Allocator()), ALLOCATOR, [row for row in rows if row.reserved])


def configuration(row):
    """Returns a key of the rows that are left out together."""
    return replace(row.run, micro_steps=1, gpu=None, gpus=1)


def leave_one_out(rows, error, fitted):
    """
    Returns (row, relative error) for every row, predicted with the values of fitted(rows of all other configurations).
    """
    result, folds = [], defaultdict(list)
    for row in rows:
        folds[configuration(row)].append(row)
    for left_out, its_rows in folds.items():
        values = fitted([row for row in rows if configuration(row) != left_out])
        result += [(row, math.exp(error(row, values)) - 1) for row in its_rows]
    return result


def eleuther(run):
    """
    Returns the bytes per GPU that EleutherAI's calculator predicts (cookbook, calc/calc_transformer_mem.py at 069ae2e)
    for mixed precision, with its defaults elsewhere. It counts embedding and output layer separately; 2 bytes per
    weight, 4 per gradient and 12 for Adam, each divided by the number of GPUs from ZeRO stage 3, 2 and 1 on;
    activations of (34 + 5 a s / h) s b h per layer, or 34 s b h with checkpointing; and buffers of 5e8 elements (stage
    3: 1e9 more).
    """
    h, layers, tokens = run.n_embd, run.n_layer, run.tokens
    n = 2 * run.vocab_size * h + run.block_size * h + layers * (8 * h + 12 * h * h) + 2 * h
    stage = {'ddp': 0, 'zero1': 1, 'fsdp': 3}[run.trainer]
    shards = run.gpus
    weights = 2 * n / (shards if stage == 3 else 1)
    gradients = 4 * n / (shards if stage >= 2 else 1)
    adam = 12 * n / (shards if stage >= 1 else 1)
    buffers = 2 * (5e8 * (stage >= 1) + 1e9 * (stage == 3)) if run.gpus > 1 else 0
    each = 34 if run.checkpointing else 34 + 5 * run.n_head * run.block_size / h
    return weights + gradients + adam + buffers + tokens * h * layers * each


def describe(row):
    run = row.run
    trainer = run.trainer + (f' in groups of {run.shards}' if run.sharded and run.shards < run.gpus else '')
    size = next((k for k, v in measured.SHAPES.items() if v == (run.n_layer, run.n_head, run.n_embd)), None)
    more = [
        run.path if run.path != 'compiled' else '',
        '' if run.graphs else 'no graphs',
        'checkpointing' * run.checkpointing,
        'offload' * run.offload,
        'half residual' * run.half_residual,
        'FP8' * run.fp8,
        f'loss_rows {run.loss_rows}' * bool(run.loss_rows),
        'one unit' * (run.min_num_params > 10**10),
    ]
    return {
        'gpus': f'{run.gpus} × {run.gpu.name.upper()}',
        'model': size or f'{run.n_layer} × {run.n_embd}',
        'batch': f'{run.micro_steps} × {run.batch_size} × {run.block_size}',
        'trainer': ', '.join([trainer, *filter(None, more)]),
        'source': row.source,
    }


def speed_class(row):
    run = row.run
    if full(row):
        return 'memory full'
    if row.kind == 'largest':
        return 'two steps of the largest models'
    return (
        'CUDA graphs'
        if run.graphs
        else 'launched, compiled'
        if not (run.sharded or run.kernels)
        else 'launched, CPU-bound'
    )


def summary(errors, limit):
    sizes = sorted(abs(e) for e in errors)
    return {
        'rows': len(sizes),
        'within_limit': sum(e <= limit for e in sizes),
        'limit': limit,
        'mean': statistics.mean(sizes),
        'p90': sizes[int(0.9 * (len(sizes) - 1))],
        'max': sizes[-1],
    }


@number
def planned(kind, *name):
    """Returns how many rows are within the limit, "89 of 95". kind: speed or memory. name: of a class, if not all."""
    classes = load('planner_error')[f'{kind}_summary']
    own = [classes[' '.join(name)]] if name else [classes['one GPU'], classes['several GPUs']]
    return f'{sum(s["within_limit"] for s in own)} of {sum(s["rows"] for s in own)}'


def by_class(rows, limit):
    classes = defaultdict(list)
    for row in rows:
        classes[row['class']].append(row)
    result = {name: summary([row['error'] for row in its], limit) for name, its in classes.items()}
    for name, its in classes.items():
        if spreads := [row['spread'] for row in its if row.get('spread')]:
            result[name]['spread'] = statistics.median(spreads)
    return result


def remapping(rows):
    """Returns the measured times of runs that lacked memory, next to the formulas' times without and with that line."""
    return [
        describe(row)
        | {
            'measured': row.run.tokens_per_iter / row.tokens_per_sec,
            'without': speed.iteration_seconds(row.run, full=False),
            'with': speed.iteration_seconds(row.run),
            'remapped_bytes': speed.remapped_bytes(row.run),
        }
        for row in rows
        if row.tokens_per_sec and memory.tight(row.run) and not row.run.graphs
    ]


def external_checks():
    """Compares plan.py's predictions for train.py with published runs of others with the same flags."""
    h100, h200 = GPUS['h100'], GPUS['h200']
    small = Run(h100, 8, 12, 12, 768, batch_size=64, block_size=1024, micro_steps=1)
    checks = []
    for name, run in (('ddp', small), ('triton', small.change(kernels=True, exponentials=True))):
        seconds = 19560 * 2**19 / speed.tokens_per_sec(run)
        checks.append(
            {
                'what': f'124M, 19,560 × 524,288 tokens, 8 × H100, 64 sequences a GPU, {name}',
                'predicted_hours': seconds / 3600,
                'published_hours': 0.75,
                'source': 'llm.c, about 45 minutes',
            }
        )
    large = Run(h100, 8, 48, 25, 1600, batch_size=8, block_size=1024, micro_steps=16)
    for name, run in (('ddp', large), ('triton', large.change(kernels=True, exponentials=True))):
        seconds = 32000 * 2**20 / speed.tokens_per_sec(run)
        checks.append(
            {
                'what': f'1.5B, 32,000 × 1,048,576 tokens, 8 × H100, 8 sequences a GPU, {name}',
                'predicted_hours': seconds / 3600,
                'published_hours': 24.0,
                'source': 'llm.c, scripts/run_gpt2_1558M.sh, about 24 hours',
            }
        )
    xl = Run(h200, 32, 48, 25, 1600, batch_size=27, block_size=1024, micro_steps=1, trainer='fsdp')
    for network, change, how in (
        (50e9, {}, 'compiled, CUDA graphs, 50 GB/s a GPU'),
        (3.1e9, dict(graphs=False, reshard=True), 'gathered twice, no graphs, 3.1 GB/s a GPU'),
    ):
        run = xl.change(**change)
        checks.append(
            {
                'what': f'1.5B, 10,466 × 884,736 tokens, 32 × H200, FSDP, {how}',
                'predicted_hours': 10466 * run.tokens_per_iter / speed.tokens_per_sec(run, network=network) / 3600,
                'published_hours': 14.5,
                'source': 'nanoGPT PR #632, config/train_gpt2_xl.py',
            }
        )
    return checks


def largest_checks():
    """Compares the largest models and batches that trained with the largest that fit according to plan.py."""

    def most(run, key):
        few, many = 0, 4096
        while many - few > 1:
            middle = (few + many) // 2
            changed = run.change(**{key: middle})
            fits = memory.needed(changed) + memory.outside_torch(changed) <= run.gpu.memory_bytes
            few, many = (middle, many) if fits else (few, middle)
        return few

    checks = []
    wide = Run(GPUS['h200'], 4, 1, 48, 6144, 1, 1024, 1, compiled=False, graphs=False)
    for name, run, trained in (
        ('DDP', wide, 16),
        ('ZeRO-1', wide.change(trainer='zero1'), 25),
        ('FSDP', wide.change(trainer='fsdp', reshard=True), 76),
        ('FSDP, checkpointing', wide.change(trainer='fsdp', reshard=True, checkpointing=True), 76),
    ):
        layers = most(run, 'n_layer')
        billions = [run.change(n_layer=n).parameters / 1e9 for n in (layers, trained)]
        checks.append(
            {
                'what': f'{name}, 6144 wide, 4 × H200',
                'unit': 'billion parameters',
                'predicted': billions[0],
                'trained': billions[1],
            }
        )
    small = Run(GPUS['h100'], 1, 12, 12, 768, 1, 1024, 1)
    for name, run, trained in (
        ('compiled, no graphs', small.change(graphs=False), 125),
        ('Triton', small.change(kernels=True), 181),
        ('Triton, half_residual, loss_rows=4096', small.change(kernels=True, half_residual=True, loss_rows=4096), 259),
    ):
        checks.append(
            {
                'what': f'124M, {name}, H100',
                'unit': 'sequences of 1024',
                'predicted': most(run, 'batch_size'),
                'trained': trained,
            }
        )
    return [check | {'error': check['predicted'] / check['trained'] - 1} for check in checks]


def scatter(report, path):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    for axis, rows, unit, limit, label in (
        (axes[0], report['memory'], GIB, 0.05, 'reserved memory, GiB'),
        (axes[1], report['speed'], 1e3, 0.07, 'thousand tokens/s'),
    ):
        names = list(dict.fromkeys(row['class'] for row in rows))
        for name, colour, marker in zip(names, ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9'), 'osD^v'):
            mine = [row for row in rows if row['class'] == name]
            x, y = [row['measured'] / unit for row in mine], [row['predicted'] / unit for row in mine]
            axis.scatter(x, y, s=16, color=colour, marker=marker, label=name, zorder=3)
        if label.startswith('reserved'):
            x, y = [row['measured'] / unit for row in rows], [row['eleuther'] / unit for row in rows]
            axis.scatter(x, y, s=16, color='#999999', marker='x', label="EleutherAI's calculator")
        ends = np.array([min(r['measured'] for r in rows) * 0.8 / unit, max(r['measured'] for r in rows) * 1.25 / unit])
        axis.plot(ends, ends, color='black', linewidth=0.8)
        axis.fill_between(ends, ends * (1 - limit), ends * (1 + limit), color='#dddddd', zorder=0)
        axis.set(xscale='log', yscale='log', xlabel=f'measured, {label}', ylabel=f'predicted, {label}')
        axis.legend(fontsize=8, frameon=False)
        axis.xaxis.set_minor_formatter('')
        axis.yaxis.set_minor_formatter('')
    ticks = [2, 5, 10, 20, 50, 100]
    axes[0].set_xticks(ticks[:-1], ticks[:-1])
    axes[0].set_yticks(ticks, ticks)
    axes[0].set_title('each point predicted by a fit without its configuration; band: ±5%', fontsize=9)
    axes[1].set_title('each point predicted by a fit without its configuration; band: ±7%', fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def tables(report):
    """Returns {name: lines}, the Markdown tables of docs/planner.md."""
    result = {}
    for key, limit in (('memory', '5%'), ('speed', '7%')):
        spread = ' spread of the measurement |' * (key == 'speed')
        lines = [
            f'| rows | number | within {limit} | mean error | 90% of rows within | largest |{spread}',
            '| --- | --- | --- | --- | --- | --- |' + ' --- |' * bool(spread),
        ]
        for name, s in report[f'{key}_summary'].items():
            cells = [name, s['rows'], s['within_limit'], *(f'{s[k]:.1%}' for k in ('mean', 'p90', 'max'))]
            cells += [f'{s["spread"]:.1%}' if 'spread' in s else ''] * bool(spread)
            lines.append(f'| {" | ".join(map(str, cells))} |')
        result[key] = lines
    worst = sorted(report['memory'] + report['speed'], key=lambda row: -abs(row['error']))
    lines = [
        '| predicted | GPUs | model | micro-steps × batch × context | trainer | measured | predicted | error |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in worst:
        speed_row = 'eleuther' not in row
        if abs(row['error']) <= (0.07 if speed_row else 0.05):
            continue
        unit, form, name = (1, ',.0f', 'tokens/s') if speed_row else (GIB, '.2f', 'GiB')
        numbers = [f'{row[k] / unit:{form}}' for k in ('measured', 'predicted')]
        cells = [name, *(row[key] for key in ('gpus', 'model', 'batch', 'trainer')), *numbers, f'{row["error"]:+.0%}']
        lines.append(f'| {" | ".join(cells)} |')
    result['outside'] = lines
    lines = [
        '| GPUs | model | trainer | measured, ms | formulas without this line | with it | GB given back | GB/s |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in report['remapping']:
        ms = [f'{row[k] * 1e3:,.0f}' for k in ('measured', 'without', 'with')]
        rate = row['remapped_bytes'] / (row['measured'] - row['without'])
        cells = [
            row['gpus'],
            row['model'],
            row['trainer'],
            *ms,
            f'{row["remapped_bytes"] / 1e9:.1f}',
            f'{rate / 1e9:.0f}',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    result['remapping'] = lines
    lines = ['| limit | trained | plan.py | difference |', '| --- | --- | --- | --- |']
    for check in report['largest']:
        form = '.1f' if check['unit'].startswith('billion') else '.0f'
        numbers = f'{check["trained"]:{form}} | {check["predicted"]:{form}} | {check["error"]:+.1%}'
        lines.append(f'| {check["what"]}, {check["unit"]} | {numbers} |')
    result['largest'] = lines
    lines = ['| run | published | plan.py |', '| --- | --- | --- |']
    for check in report['external']:
        published = f'{check["published_hours"]:.2f} h ({check["source"]})'
        lines.append(f'| {check["what"]} | {published} | {check["predicted_hours"]:.2f} h |')
    result['external'] = lines
    lines = ['| efficiency | before the fit | fitted |', '| --- | --- | --- |']
    fitted, before = report['fitted'], report['before']
    lines += [f'| `{name}` | {before[name]:.3g} | {fitted[name]:.3g} |' for name in fitted]
    result['efficiencies'] = lines
    return result


def predictions():
    """Returns plan.py's predictions for 8 GPUs of one machine, made before any such run, to compare with one."""
    found = []
    for kind in ('h100', 'h200'):
        for size, batch_size in (('124M', 12), ('1.5B', 8)):
            flags = dict(zip(('n_layer', 'n_head', 'n_embd'), measured.SHAPES[size]))
            config = options.train_flags() | options.kernel_flags() | flags
            config |= dict(vocab_size=50304, batch_size=batch_size, price=0.0)
            for micro_steps in (1, 5):
                config['gradient_accumulation_steps'] = 8 * micro_steps
                plan_8 = plan.make_plan(config, GPUS[kind], 8, network=50e9)
                trainers = report_module.as_json(plan_8, config, GPUS[kind], 8, None, [], (), 0)['trainers']
                for values in trainers.values():
                    for key in ('hours', 'cost', 'command'):
                        del values[key]
                found.append(
                    dict(gpu=kind, gpus=8, size=size, batch_size=batch_size, block_size=1024, micro_steps=micro_steps)
                    | {'trainers': trainers}
                )
    return found


def put_tables(report, path=ROOT / 'docs' / 'planner.md'):
    text = path.read_text()
    for name, lines in tables(report).items():
        block = f'<!-- planner: {name} -->\n\n' + '\n'.join(lines) + '\n\n<!-- end planner -->'
        text = re.sub(
            rf'<!-- planner: {name} -->.*?<!-- end planner -->', lambda match, block=block: block, text, flags=re.S
        )
    path.write_text(text)


def fit_all(rows):
    """Returns {'efficiencies': {...}, 'allocator': {...}}, fitted to all rows and rounded to four digits."""
    found = {'efficiencies': fit_speed(rows), 'allocator': fit_memory(rows)}
    return {kind: {k: float(f'{v:.4g}') for k, v in values.items()} for kind, values in found.items()}


def report_on(rows):
    timed, reserved = [row for row in rows if row.tokens_per_sec], [row for row in rows if row.reserved]
    speeds = leave_one_out(timed, speed_error, fit_speed)
    memories = leave_one_out(reserved, memory_error, fit_memory)
    kinds = {True: 'one GPU', False: 'several GPUs'}
    report = {
        'memory': [
            describe(row)
            | {'class': kinds[row.run.gpus == 1], 'measured': row.reserved, 'predicted': row.reserved * (1 + error)}
            | {'error': error, 'eleuther': eleuther(row.run)}
            for row, error in memories
        ],
        'speed': [
            describe(row)
            | {'class': speed_class(row), 'measured': row.tokens_per_sec, 'predicted': row.tokens_per_sec * (1 + error)}
            | {'error': error, 'spread': (row.high - row.low) / row.tokens_per_sec if row.low else None}
            for row, error in speeds
        ],
        'tensors': [
            describe(row)
            | {'class': row.kind, 'measured': row.allocated, 'predicted': sum(memory.tensors(row.run).values())}
            | {'error': sum(memory.tensors(row.run).values()) / row.allocated - 1, 'eleuther': eleuther(row.run)}
            for row in rows
            if row.allocated
        ],
        'flagged': [describe(row) | {'allocated': row.flagged} for row in rows if row.flagged],
        'remapping': remapping(rows),
        'largest': largest_checks(),
        'external': external_checks(),
    }
    eleuther_rows = [
        {'class': "EleutherAI's calculator", 'error': r['eleuther'] / r['measured'] - 1} for r in report['memory']
    ]
    tensors = [r | {'class': 'tensors alone, no fit (allocated)'} for r in report['tensors']]
    report['memory_summary'] = by_class(report['memory'] + tensors + eleuther_rows, 0.05)
    report['speed_summary'] = by_class(report['speed'], 0.07)
    constants = fit_all(rows)
    report['fitted'] = constants['efficiencies'] | constants['allocator']
    report['before'] = asdict(speed.Efficiencies()) | asdict(memory.Allocator())
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fit', action='store_true', help='only fit, and write planner/efficiencies.json')
    parser.add_argument('--out', default=str(RESULTS), help='folder of planner_error.json and .png')
    parser.add_argument('--predict', default='', help='only predict 8 GPUs, into this JSON file')
    args = parser.parse_args()
    if args.predict:
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        command = 'python benchmarks/bench_planner.py --predict=planner_8gpus.json'
        note = 'predicted: no run of 8 GPUs existed when this file was committed; random tokens, bfloat16, CUDA graphs'
        facts = dict(date=time.strftime('%Y-%m-%d'), commit=commit, command=command, note=note)
        Path(args.predict).write_text(json.dumps(facts | {'predictions': predictions()}, indent=1) + '\n')
        return
    rows = measured.all_rows()
    if args.fit:
        speed.FITTED.write_text(json.dumps(fit_all(rows), indent=1) + '\n')
        return print(speed.FITTED.read_text())
    report = report_on(rows)
    Path(args.out, 'planner_error.json').write_text(json.dumps(report, indent=1) + '\n')
    scatter(report, Path(args.out, 'planner_error.png'))
    if (ROOT / 'docs' / 'planner.md').exists() and Path(args.out) == RESULTS:
        put_tables(report)
    for name, lines in tables(report).items():
        print(f'\n{name}', *lines, sep='\n')


if __name__ == '__main__':
    main()
