"""
Compares our trainers with upstream nanoGPT and, if you have it, llm.c on one GPU. Every program is started as its users
start it, in turns, on the same tokens.

    git clone https://github.com/karpathy/nanoGPT ~/nanoGPT
    python benchmarks/bench_peers.py --nanogpt=$HOME/nanoGPT --out=...      # about 12 minutes on an H200
    python benchmarks/bench_peers.py --nanogpt=$HOME/nanoGPT --llmc=$HOME/llm.c/train_gpt2cu --out=...
    python benchmarks/bench_peers.py --nanogpt=... --only='upstream;Triton' --rounds=1 --out=...
    python benchmarks/bench_peers.py --nanogpt=... --steps=1500 --micro_steps=1 --out=...  # losses

Each round starts every program once, as a process of its own: GPT-2 124M in bfloat16, --micro_steps of --batch_size x
1024 tokens per iteration, and an evaluation before the first iteration. A program's time is the median of the last
--timed iterations that it prints. A ratio is the quotient of the medians over the rounds, with its spread over the
rounds. Memory is the GPU's by nvidia-smi, minus the memory in use before the program started.

Build llm.c with cuDNN. Upstream and our programs draw the same batches, so their first evaluations should agree. llm.c
reads the validation tokens in order, so its first loss differs. It keeps weights in bfloat16 with a float32 copy, and
gradients and the residual stream in bfloat16.

With --steps, the losses are compared instead of the times: each program trains this many iterations, all programs at
the same time, and the results are their evaluations. All but llm.c draw the same batches.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from common import ROOT, facts, output_of, write_json
from tables import gib, load, markdown, number, table, times, with_spread

BLOCK_SIZE = 1024
ITERATION = re.compile(r'^(?:iter|step) +\d+.*?(?:, time | \| )([\d.]+) ?ms', re.MULTILINE)  # nanoGPT's line or llm.c's
EVALUATION = re.compile(r'^step (\d+): train loss ([\d.]+), val loss ([\d.]+)', re.MULTILINE)
LLMC_EVALUATION = re.compile(r'^val loss ([\d.]+)', re.MULTILINE)


def nanogpt_flags(args):
    """Returns flags that upstream's train.py and ours share."""
    last = args.steps or args.iterations - 1
    return [
        f'--dataset={args.data}',
        f'--batch_size={args.batch_size}',
        f'--gradient_accumulation_steps={args.micro_steps}',
        f'--max_iters={last}',
        f'--lr_decay_iters={last if args.steps else args.iterations}',
        f'--eval_interval={args.steps // 2 or args.iterations * 10}',
        f'--eval_iters={args.eval_iters}',
        *(['--warmup_iters=100', '--log_interval=100'] if args.steps else ['--log_interval=1']),
        '--always_save_checkpoint=False',
        *(['--compile=False', '--device=cpu', '--dtype=float32', *TINY] if args.dry_run else []),
    ]


TINY = ['--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=32']


def write_shard(source, target):
    """
    Converts a train.bin or val.bin to llm.c's format: a header of 256 int32, of which three are used, and the tokens
    as uint16.
    """
    tokens = np.fromfile(source, np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    with open(target, 'wb') as f:
        header.tofile(f)
        tokens.tofile(f)


def programs(args):
    """Returns {name: (command, folder to run it in)}."""
    ours = {
        'upstream nanoGPT, compiled': (args.nanogpt,),
        'nanoGPT/ here': (ROOT / 'nanoGPT',),
        'Triton': (ROOT / 'phase2_triton',),
        'Triton, half_residual': (ROOT / 'phase2_triton', '--half_residual'),
    }
    found = {}
    for i, (name, (folder, *more)) in enumerate(ours.items()):
        flags = [*nanogpt_flags(args), f'--out_dir={args.scratch}/out{i}', *more]
        found[name] = ([sys.executable, str(folder / 'train.py'), *flags], folder)
    if args.llmc and not args.steps:
        shards = {split: f'{args.scratch}/{split}_shard.bin' for split in ('train', 'val')}
        for split, shard in shards.items():
            write_shard(f'{args.data}/{split}.bin', shard)
        flags = {
            'i': shards['train'],
            'j': shards['val'],
            'e': 'd12',
            'b': args.batch_size,
            't': BLOCK_SIZE,
            'd': args.batch_size * BLOCK_SIZE * args.micro_steps,
            'x': args.iterations,
            'l': 6e-4,
            'u': 2000,
            'c': 0.1,
            'v': args.iterations * 10,
            'm': args.eval_iters,
            's': args.iterations * 10,
            'r': 0,
        }
        command = [str(args.llmc), *(str(part) for flag, value in flags.items() for part in (f'-{flag}', value))]
        found['llm.c'] = (command, args.llmc.parent)
    parts = args.only.split(';')
    chosen = lambda name: any(part == name if part in found else part in name for part in parts)
    return {name: found[name] for name in found if not args.only or chosen(name)}


def gpu_bytes_in_use():
    """Returns the bytes in use on the first visible GPU, by nvidia-smi; None without one."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0] or '0'
    mib = output_of('nvidia-smi', '-i', visible, '--query-gpu=memory.used', '--format=csv,noheader,nounits')
    return mib and int(mib.split()[0]) * 2**20


def run(command, folder):
    """
    Runs a program. Returns (its output, the most bytes of GPU memory that it used, or None without a GPU). Ends the
    benchmark if the program fails.
    """
    before, most, done = gpu_bytes_in_use(), [0], threading.Event()

    def watch():
        while not done.wait(0.2):
            most.append(gpu_bytes_in_use())

    if before is not None:
        watcher = threading.Thread(target=watch)
        watcher.start()
    try:
        process = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
        done.set()
        if before is not None:
            watcher.join()
    if process.returncode != 0:
        sys.exit(f'bench_peers.py: {" ".join(command)} failed in {folder}:\n{process.stdout[-3000:]}')
    return process.stdout, None if before is None else max(most) - before


def measured(text, timed):
    """Returns a dict of the last `timed` iterations' ms and the first evaluation's losses in a program's output."""
    ms = [float(found) for found in ITERATION.findall(text)][-timed:]
    evaluation, llmc = EVALUATION.search(text), LLMC_EVALUATION.search(text)
    if len(ms) < timed or not (evaluation or llmc):
        sys.exit(f'bench_peers.py: no {timed} iterations and no evaluation in this output:\n{text[-3000:]}')
    train, val = evaluation.groups()[1:] if evaluation else (None, llmc[1])
    return {'ms': ms, 'first_train_loss': train and float(train), 'first_val_loss': float(val)}


def evaluations(text):
    """Returns the evaluations in a program's output: [iteration, train loss, val loss] of each."""
    return [[int(step), float(train), float(val)] for step, train, val in EVALUATION.findall(text)]


@table('peers_*')
def peers(report):
    """Returns medians over the rounds, and ratios to upstream and to llm.c with their spread over the rounds."""
    if 'steps' in report:
        return ''
    speeds = peer_speeds(report)
    bases = [name for name in ('upstream nanoGPT, compiled', 'llm.c') if name in speeds]
    cells = []
    for name in speeds:
        own = [row for row in report['rows'] if row['name'] == name]
        memory = [row['peak_memory_bytes'] for row in own if row['peak_memory_bytes'] is not None]
        losses = ', '.join(f'{own[0][key]:.4f}' for key in ('first_train_loss', 'first_val_loss') if own[0][key])
        ms = statistics.median(statistics.median(row['ms']) for row in own)
        ratios = [times(speeds[name], speeds[base], 3) for base in bases]
        cells.append(
            (name, f'{ms:.1f}', with_spread(speeds[name]), *ratios, gib(max(memory), 1) if memory else '', losses)
        )
    header = ['', 'ms', 'tokens/s', *(f'× {base}' for base in bases), 'GPU memory, GiB', 'first losses: train, val']
    return markdown(header, cells)


def peer_speeds(report):
    """Returns {program: its tokens/s in each round}."""
    tokens, speeds = report['batch_size'] * report['micro_steps'] * report.get('block_size', BLOCK_SIZE), {}
    for row in report['rows']:
        speeds.setdefault(row['name'], []).append(tokens / statistics.median(row['ms']) * 1e3)
    return speeds


@number
def times_peer(*words):
    """Returns the speed of a program relative to another's. words: 'Triton of llm.c'."""
    name, base = ' '.join(words).split(' of ')
    speeds = peer_speeds(load('peers_h200'))
    return f'{statistics.median(speeds[name]) / statistics.median(speeds[base]):.2f}'


@table('peers_*')
def peers_losses(report):
    """Returns the losses of programs that trained on the same batches, and how far from upstream's they end."""
    if 'steps' not in report:
        return ''
    found = {row['name']: row['evaluations'] for row in report['rows']}
    upstream, cells = found.get('upstream nanoGPT, compiled'), []
    for name, its in found.items():
        apart = f'{its[-1][2] - upstream[-1][2]:+.4f}' if upstream else ''
        cells.append((name, *(f'{train:.4f}, {val:.4f}' for _, train, val in its), apart))
    steps = [f'step {step}: train, val' for step, *_ in next(iter(found.values()))]
    return markdown(['', *steps, "last val - upstream's"], cells)


def train_together(args, report):
    """Runs every program at the same time, and adds its evaluations to the report as soon as it ends."""
    turns = programs(args)
    with ThreadPoolExecutor(len(turns)) as pool:
        runs = {pool.submit(run, *turn): name for name, turn in turns.items()}
        for done in as_completed(runs):
            text, _ = done.result()
            report['rows'].append(dict(name=runs[done], evaluations=evaluations(text)))
            report['rows'].sort(key=lambda row: list(turns).index(row['name']))
            print(f'{runs[done]}: {evaluations(text)}', flush=True)
            write_json(args.out, report)


def take_turns(args, report):
    turns = programs(args)
    for i in range(args.rounds):
        for name, (command, folder) in turns.items():
            began = time.perf_counter()
            text, peak = run(command, folder)
            row = dict(name=name, round=i, peak_memory_bytes=peak, **measured(text, args.timed))
            report['rows'].append({**row, 'seconds': time.perf_counter() - began})
            print(f'{name}, round {i}: {statistics.median(row["ms"]):.1f} ms', flush=True)
            write_json(args.out, report)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nanogpt', type=Path, required=True, help='a checkout of karpathy/nanoGPT')
    parser.add_argument('--llmc', type=Path, help='train_gpt2cu, built from karpathy/llm.c')
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument(
        '--data', type=Path, default=ROOT / 'nanoGPT/data/python_gpt2', help='folder of train.bin, val.bin'
    )
    parser.add_argument('--batch_size', type=int, default=12)
    parser.add_argument('--micro_steps', type=int, default=8)
    parser.add_argument('--iterations', type=int, default=45)
    parser.add_argument('--timed', type=int, default=25, help='number of last iterations that count')
    parser.add_argument('--eval_iters', type=int, default=20)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument(
        '--steps', type=int, default=0, help='compare the losses after this many iterations, not the times'
    )
    parser.add_argument(
        '--only', default='', help='only programs whose names contain one of these parts, separated by semicolons'
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='tiny models on the CPU: only checks that everything runs'
    )
    args = parser.parse_args()
    args.data, args.nanogpt = args.data.resolve(), args.nanogpt.resolve()
    for path in (args.nanogpt / 'train.py', args.data / 'train.bin', args.data / 'val.bin', *filter(None, [args.llmc])):
        if not path.is_file():
            sys.exit(f'bench_peers.py: there is no {path}')
    args.llmc = args.llmc and args.llmc.resolve()
    args.timed = min(args.timed, args.iterations)
    report = {
        **facts(),
        'batch_size': args.batch_size,
        'micro_steps': args.micro_steps,
        'block_size': 32 if args.dry_run else BLOCK_SIZE,
        'rows': [],
    }
    if args.steps:
        report['steps'] = args.steps
    report['nanogpt_commit'] = output_of('git', '-C', str(args.nanogpt), 'rev-parse', 'HEAD')
    with tempfile.TemporaryDirectory() as args.scratch:
        (train_together if args.steps else take_turns)(args, report)
    write_json(args.out, report)
    print(peers(report) or peers_losses(report))


if __name__ == '__main__':
    main()
