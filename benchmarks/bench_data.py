"""
Measures the cost of reading batches from many shards: time to open the data set, time per batch, and the growth of
resident memory.

    python benchmarks/bench_data.py [--shards=100] [--mb=200] [--ranks=8] [--batches=10000] [--dir=.] [--out=FILE.json]

The shards are sparse files: they take no space on the disk, and reading one costs as much as reading a cached file. All
ranks run at the same time, as processes of this machine. A batch is 12 x 1024 tokens. The last line gives the speed of
the scan for tokens outside the vocabulary, and of the fingerprints. About 2 minutes on 2 cores.

    python benchmarks/bench_data.py --gpu [--shards=100] [--mb=4] [--rounds=12] [--out=FILE.json]

This times steps of GPT-2 124M on one GPU, whose batches come in turns from one file and from shards with the same
tokens. A step is train.py's with one micro-step, of which the data takes the largest share. About a minute on an H200.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'nanoGPT'))
import torch

import data_scan
from common import facts, write_json
from data_order import SequentialOrder
from dataset import open_dataset
from tables import load, markdown, number, table
from token_files import inputs_and_targets

BATCH_SIZE, BLOCK_SIZE, VOCAB_SIZE = 12, 1024, 50304
STEP_MS = 25  # a training step, for comparison
STEPS = 20  # steps that are timed before the source of the batches changes


def make_shards(folder, shards, mb):
    """Makes sparse shards of mb megabytes, one of them for validation."""
    tokens = mb * 10**6 // 2
    for i in range(shards):
        with open(f'{folder}/web_{"train" if i else "val"}_{i:06}.bin', 'wb') as f:
            header = np.zeros(256, '<i4')
            header[:3] = 20240520, 1, tokens
            f.write(header.tobytes())
            f.truncate(1024 + 2 * tokens)


def resident_bytes():
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def read_batches(folder, rank, ranks, batches):
    """Returns a dict: milliseconds to open the data set and, for each order, times per batch and resident bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(1337 + rank)
    start = time.perf_counter()
    data = open_dataset(folder, BLOCK_SIZE)
    result = {'open_ms': 1000 * (time.perf_counter() - start)}
    order = SequentialOrder(data.train, BATCH_SIZE, rank, ranks)
    for name, draw in (
        ('random', lambda: data.train.sample(BATCH_SIZE, VOCAB_SIZE)),
        ('sequential', lambda: order.next(VOCAB_SIZE)),
    ):
        micros, resident, cpu = [], [], time.process_time()
        for i in range(batches):
            start = time.perf_counter()
            draw()
            micros.append(1e6 * (time.perf_counter() - start))
            if i in (batches // 100, batches - 1):
                resident.append(resident_bytes())
        cpu = time.process_time() - cpu
        micros.sort()
        result[name] = {
            'cpu_us': 1e6 * cpu / batches,
            'median_us': statistics.median(micros),
            'p99_us': micros[int(0.99 * len(micros))],
            'resident_bytes': resident,
        }
    return result


def scan_and_fingerprint(folder):
    """Returns a dict: milliseconds of all fingerprints, and bytes that the scan reads per second and CPU second."""
    data = open_dataset(folder, BLOCK_SIZE)
    total = sum(file.bytes for tokens in data.splits.values() for file in tokens.files)
    start = time.perf_counter()
    data.manifest()
    manifest_ms = 1000 * (time.perf_counter() - start)
    start, cpu = time.perf_counter(), time.process_time()
    data_scan.scan_in_background(data, VOCAB_SIZE).join()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {'manifest_ms': manifest_ms, 'scan_bytes_per_sec': total / seconds, 'scan_bytes_per_cpu_sec': total / cpu}


def write_tokens(folder, shards, mb):
    """Writes random tokens as one headerless file, in folder/one, and as shards, in folder/shards."""
    rng, tokens = np.random.default_rng(0), mb * 10**6 // 2
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, tokens
    for name in ('one', 'shards'):
        (folder / name).mkdir()
    for i in range(shards + 1):
        split, ids = 'train' if i else 'val', rng.integers(0, 50257, tokens, dtype=np.uint16).tobytes()
        with open(folder / 'one' / f'{split}.bin', 'ab') as f:
            f.write(ids)
        (folder / 'shards' / f'web_{split}_{i:06}.bin').write_bytes(header.tobytes() + ids)


def time_steps(folder, rounds, device='cuda', size='124M'):
    """
    Returns {source: milliseconds of a step in each round, the median of STEPS}, for batches from one file at random,
    and from shards at random and in order.
    """
    from trainer import SIZES, Trainer, to_device

    one, shards = (open_dataset(str(folder / name), BLOCK_SIZE).train for name in ('one', 'shards'))
    order = SequentialOrder(shards, BATCH_SIZE)
    draws = {
        'one file, random': lambda: one.sample(BATCH_SIZE, VOCAB_SIZE),
        'shards, random': lambda: shards.sample(BATCH_SIZE, VOCAB_SIZE),
        'shards, sequential': lambda: order.next(VOCAB_SIZE),
    }
    gpu, shape = device == 'cuda', {**SIZES[size], 'vocab_size': VOCAB_SIZE}
    options = dict(batch_size=BATCH_SIZE, block_size=BLOCK_SIZE, compile=gpu, cuda_graph=gpu, init='gpu')
    trainer = Trainer('ddp', shape, device, **options)
    found = {name: [] for name in draws}
    for i in range(rounds + 1):
        for name, draw in draws.items():
            trainer.feed(lambda _, draw=draw: tuple(to_device(x, device) for x in inputs_and_targets(draw())))
            if i == 0:
                trainer.warm_up(1)
            else:
                trainer.step(1).item()  # the step after a change is not measured
                found[name].append(1000 * statistics.median(trainer.timed_steps(1, STEPS)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=int, default=100)
    parser.add_argument('--mb', type=int, help='size of each, by default 200, with --gpu 4')
    parser.add_argument('--ranks', type=int, default=8)
    parser.add_argument('--batches', type=int, default=10000)
    parser.add_argument('--dir', default='.')
    parser.add_argument('--out')
    parser.add_argument('--gpu', action='store_true', help='time training steps instead')
    parser.add_argument('--rounds', type=int, default=12)
    parser.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)  # folder, rank
    args = parser.parse_args()
    if args.worker:
        return print(json.dumps(read_batches(args.worker[0], int(args.worker[1]), args.ranks, args.batches)))
    args.mb = args.mb or (4 if args.gpu else 200)
    if args.gpu:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            write_tokens(Path(folder), args.shards, args.mb)
            report = {**facts(), 'shards': args.shards, 'mb': args.mb}
            report['step_ms'] = time_steps(Path(folder), args.rounds)
        print(data_speed(report))
        return write_json(args.out, report) if args.out else None
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        make_shards(folder, args.shards, args.mb)
        command = [sys.executable, __file__, f'--ranks={args.ranks}', f'--batches={args.batches}', '--worker', folder]
        alone = read_batches(folder, 0, 1, args.batches)
        workers = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE) for rank in range(args.ranks)]
        ranks = [json.loads(worker.communicate()[0]) for worker in workers]
        rest = scan_and_fingerprint(folder)
    report = {**facts(cpu=True), 'alone': alone, 'ranks': ranks, **rest}
    print(f'{args.shards} shards of {args.mb} MB, {args.batches:,} batches of {BATCH_SIZE} x {BLOCK_SIZE} tokens')
    print(data(report))
    if args.out:
        write_json(args.out, report)


@table('data_speed_*')
def data_speed(report):
    """
    Returns the time of a step with batches from one file and from shards, and the ratio of each round to one file's.
    """
    one, rows = report['step_ms']['one file, random'], []
    for name, ms in report['step_ms'].items():
        ratios = sorted(there / here for here, there in zip(ms, one, strict=True))
        spread = f'{statistics.median(ratios):.4f} ({ratios[0]:.4f} to {ratios[-1]:.4f})'
        rows.append((name, f'{statistics.median(ms):.2f}', spread))
    return markdown(['batches from', 'step, ms', 'speed relative to one file (median and range of rounds)'], rows)


@number
def speed_from_shards(order):
    """Returns the speed of a step with batches from shards relative to one file: median and range of the rounds."""
    ms = load('data_speed_h200')['step_ms']
    ratios = [100 * a / b for a, b in zip(ms['one file, random'], ms[f'shards, {order}'], strict=True)]
    return f'{statistics.median(ratios):.1f}% ({min(ratios):.1f}% to {max(ratios):.1f}%)'


@table('data_cpu*')
def data(report):
    """
    Returns times of opening the data set and reading batches, for one rank and for the slowest of several; scan speed.
    """
    rows = []
    for name, results in (('1', [report['alone']]), (f'{len(report["ranks"])}, slowest', report['ranks'])):
        for order in ('random', 'sequential'):
            cpu, median, p99 = (max(r[order][key] for r in results) for key in ('cpu_us', 'median_us', 'p99_us'))
            growth = max(last - first for first, last in (r[order]['resident_bytes'] for r in results)) / 1e6
            opened, share = max(r['open_ms'] for r in results), 100 * cpu / (1000 * STEP_MS)
            batch = (f'{cpu:.0f}', f'{share:.2f}', f'{median:.0f}', f'{p99:,.0f}')
            rows.append((name, order, f'{opened:.0f}', *batch, f'{growth:.1f}'))
    header = ['ranks', 'order', 'open, ms', 'batch: CPU time, µs', f'% of a {STEP_MS} ms step', 'median, µs', '99%, µs']
    gb = report['scan_bytes_per_sec'] / 1e9, report['scan_bytes_per_cpu_sec'] / 1e9
    text = f'fingerprints of all files {report["manifest_ms"]:.0f} ms, '
    text += f'scan {gb[0]:.1f} GB/s, {gb[1]:.1f} GB per CPU second'
    return f'{markdown([*header, "growth of resident memory, MB"], rows)}\n\n{text}'


if __name__ == '__main__':
    main()
