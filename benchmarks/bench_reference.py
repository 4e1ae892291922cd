"""
Measures what the reference trainer costs besides its model. On a GPU, at GPT-2 124M: bench.py with tokens from the data
set, bench.py with random tokens, and train.py. On a CPU: train.py against a minimal loop over the same model
(tests/minimal_loop.py).

    python nanoGPT/data/python_gpt2/prepare.py
    python benchmarks/bench_reference.py --out=benchmarks/results/reference.json
    python benchmarks/bench_reference.py --dry-run                                  # tiny, on a CPU

The variants alternate, so that a change of the machine's speed affects all of them. Prints a table and writes JSON.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench_trainers import make_data
from common import ROOT, facts, write_json
from tables import cite, commit_of, gib, load, markdown, number, short, summary, table, with_spread

NANOGPT = ROOT / 'nanoGPT'


def run(script, *flags):
    """Returns the stdout of `python script flags`."""
    command = [sys.executable, str(script), *flags]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1')),
    )
    if result.returncode:
        sys.exit(f'{" ".join(command)} failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}')
    return result.stdout


def train_ms(skip, *flags):
    """
    Returns the median, minimum and maximum of the step times that train.py prints, in ms, without the first `skip`, and
    its peak memory in bytes.
    """
    with tempfile.TemporaryDirectory() as out:
        text = run(NANOGPT / 'train.py', f'--out_dir={out}', '--log_interval=1', *flags)
        log = json.loads(next(Path(out).glob('run_*.json')).read_text())
    times = [float(x) for x in re.findall(r'^iter \d+: .* time ([\d.]+)ms', text, re.M)][skip:]
    return {
        'ms': statistics.median(times),
        'ms_min': min(times),
        'ms_max': max(times),
        'peak_memory_bytes': log['summary']['peak_memory_bytes'],
    }


def bench_ms(*flags):
    """Returns the median step time in ms that bench.py prints."""
    return float(re.search(r'time per iteration: ([\d.]+)ms', run(NANOGPT / 'bench.py', *flags))[1])


def on_gpu(repeats, dry, dataset='python_gpt2'):
    shape = ['--batch_size=12', '--block_size=1024', f'--dataset={dataset}', '--cuda_graph=False']
    if dry:
        shape += [
            '--n_layer=1',
            '--n_head=1',
            '--n_embd=16',
            '--device=cpu',
            '--compile=False',
            '--block_size=32',
            '--dtype=float32',
        ]
    micro_steps = 8
    tokens = 12 * (32 if dry else 1024) * micro_steps
    results = {'real': [], 'random': []}
    for _ in range(repeats):
        for name in results:
            results[name].append(
                bench_ms(
                    *shape,
                    f'--real_data={name == "real"}',
                    f'--gradient_accumulation_steps={micro_steps}',
                    '--steps=20',
                )
            )
    flags = [
        '--max_iters=40',
        '--eval_interval=1000',
        '--eval_iters=1',
        '--warmup_iters=100',
        f'--gradient_accumulation_steps={micro_steps}',
    ]
    train = [train_ms(10, *shape, *flags) for _ in range(repeats)]
    rows = [
        {'what': 'train.py', 'tokens_per_sec': [tokens / t['ms'] * 1000 for t in train], 'runs': train},
        {'what': 'bench.py, data set', 'tokens_per_sec': [tokens / ms * 1000 for ms in results['real']]},
        {
            'what': 'bench.py, the same random tokens',
            'tokens_per_sec': [tokens / ms * 1000 for ms in results['random']],
        },
    ]
    loader = statistics.median(results['real']) / statistics.median(results['random']) - 1
    return rows, {'data_loader_share_of_step': loader}


def on_cpu(repeats):
    """Measures the model of `make demo` on data/python_char in one process."""
    data = NANOGPT / 'data' / 'python_char'
    shape = dict(
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=128,
        batch_size=8,
        max_iters=40,
        eval_interval=1000,
        eval_iters=1,
        learning_rate=1e-3,
        min_lr=1e-4,
        warmup_iters=10,
        lr_decay_iters=60,
    )
    flags = [f'--{k}={v}' for k, v in shape.items()]
    ms = {'train.py': [], 'minimal loop': []}
    fastest = {'train.py': [], 'minimal loop': []}  # on a shared machine the fastest steps are the undisturbed ones
    for _ in range(repeats):
        ours = train_ms(10, *flags, '--dataset=python_char', '--gradient_accumulation_steps=2', '--device=cpu')
        text = run(
            ROOT / 'tests' / 'minimal_loop.py',
            *flags,
            f'--data_dir={data}',
            '--vocab_size=96',
            '--accumulation=2',
            '--dropout=0',
            '--bias=0',
        )
        median, least = map(float, re.search(r'median step ([\d.]+) ms, fastest ([\d.]+) ms', text).groups())
        for name, m, f in (('train.py', ours['ms'], ours['ms_min']), ('minimal loop', median, least)):
            ms[name].append(m)
            fastest[name].append(f)
    tokens = 2 * 8 * 128
    rows = [
        {'what': what, 'tokens_per_sec': [tokens / t * 1000 for t in times], 'fastest_ms': fastest[what]}
        for what, times in ms.items()
    ]
    ratios = [minimal / ours for ours, minimal in zip(ms['train.py'], ms['minimal loop'], strict=True)]
    return rows, {
        'speed_against_minimal_loop_fastest_steps': min(fastest['minimal loop']) / min(fastest['train.py']),
        'speed_against_minimal_loop_medians': statistics.median(ratios),
        'ratios': ratios,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', help='JSON file to write')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--dry-run', action='store_true', help='run the GPU benchmark at a tiny size on the CPU')
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            make_data(Path(folder, 'tiny'), 512)
            rows, totals = on_gpu(1, True, f'{folder}/tiny')
    else:
        rows, totals = on_gpu(args.repeats, False) if gpu else on_cpu(args.repeats)
    where = facts(cpu=not gpu)
    if args.out:
        write_json(args.out, {'facts': where, 'rows': rows, 'summary': totals})
    print(', '.join(f'{k} {v}' for k, v in where.items()))
    print(markdown(['', 'tokens/s'], [(row['what'], with_spread(row['tokens_per_sec'])) for row in rows]))
    for k, v in totals.items():
        print(f'{k}: {v if isinstance(v, list) else format(v, ".4f")}')


@table('reference_h*', together=True)
def reference(reports):
    names = {
        'train.py': '`nanoGPT/train.py`, without CUDA graphs',
        'bench.py, data set': 'the bare step, batches from the data set',
        'bench.py, the same random tokens': 'the bare step, the same batch each time',
    }
    rows = [{row['what']: row for row in report['rows']} for report in reports.values()]
    cells = [(text, *(with_spread(its[what]['tokens_per_sec']) for its in rows)) for what, text in names.items()]
    peaks = [gib(its['train.py']['runs'][0]['peak_memory_bytes'], 1) for its in rows]
    cells.append(('peak memory of `train.py`, GiB', *peaks))
    cells.append(('result file', *(f'{cite(file)}, {commit_of(report)}' for file, report in reports.items())))
    return markdown(['tokens/s', *(f'one {short(report)}' for report in reports.values())], cells)


@number
def loop_speed():
    """Returns the speed of train.py on a CPU relative to a minimal loop's: median and range over the pairs of runs."""
    median, least, most = summary(load('reference_cpu')['summary']['ratios'])
    return f'{median:.2f} ({least:.2f} to {most:.2f})'


if __name__ == '__main__':
    main()
