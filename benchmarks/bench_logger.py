"""
Measures the cost of TrainingLogger: the time per record at the start of a run and after 1,000,000 records, and by how
much it slows down steps of 20 ms.

    python benchmarks/bench_logger.py [--records 1000000] [--dir .]
    python benchmarks/bench_logger.py --gpu      # instead: steps of GPT-2 124M, about 20 ms each; one GPU, 1 minute
    python benchmarks/bench_logger.py --dry-run  # few records; with --gpu, tiny steps on a CPU

The tables in LOGGING_GUIDE.md are this program's output. It takes about 5 minutes, and 400 MB of disk in a temporary
folder under --dir.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'nanoGPT'))
from training_logger import TrainingLogger

MATRICES = np.random.default_rng(0).random((2, 64, 64))


def record(log, i):
    """Logs one record and returns the seconds that this took the calling thread."""
    start = time.perf_counter()
    log.iteration(
        i,
        loss=2.0 + 8.9 / (i + 1),
        lr=6e-4 / (i + 1),
        time_ms=20 + i % 97 / 71,
        tokens_per_sec=24576.1 + i % 89 / 3,
        mfu=0.38 + i % 83 / 1e4,
        grad_norm=0.4 + i % 79 / 1e3,
        peak_memory_bytes=41_234_567_890,
    )
    log.flush()
    return time.perf_counter() - start


def python(count):
    """Keeps the interpreter busy and holds its lock (GIL)."""
    total = 0
    for i in range(100 * count):
        total += i * i


def products(count):
    """Multiplies matrices, which releases the GIL every few microseconds, as a training step does."""
    for _ in range(count):
        np.dot(*MATRICES)


def row(name, seconds):
    micros = sorted(1e6 * each for each in seconds)
    median, low, high = (micros[len(micros) * percent // 100] for percent in (50, 5, 95))
    numbers = f'{median:>8.1f} {low:>8.1f} {high:>8.1f} {statistics.fmean(micros):>8.1f} {micros[-1] / 1e3:>9.1f}'
    print(f'{name:<44} {len(micros):>9,} {numbers}')


def loop(log, busy, busy_ms, steps):
    """
    Runs steps of 20 ms that call busy() for busy_ms and sleep for the rest, as if they waited for a GPU. Logs a random
    half of the steps. Prints how long a call of the log takes, and how much longer busy() takes in the logged steps.
    """
    count, best = 1, 0.0
    while best < busy_ms / 1e3:  # find the count that takes busy_ms without logging
        count = int(count * 1.2) + 1
        best = min(timed(busy, count) for _ in range(5))
    calls, parts = [], {True: [], False: []}
    for i in range(steps):
        time.sleep(0.02 - busy_ms / 1e3)
        logged, start = random.random() < 0.5, time.perf_counter()
        if logged:
            calls.append(record(log, i))
        busy(count)
        parts[logged].append(time.perf_counter() - start)
    row(f'20 ms steps, {busy_ms} ms of {busy.__name__}: the call', calls)
    quarters = {logged: statistics.quantiles(times, n=4) for logged, times in parts.items()}
    lost = [1e6 * (with_log - without) for with_log, without in zip(quarters[True], quarters[False])]
    print('  the busy part is longer by, at its quartiles: {:.0f}, {:.0f}, {:.0f} us'.format(*lost))


def timed(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def on_gpu(folder, steps, dry_run, batch_size=8):
    """
    Times training steps that end as train.py's do with --log_interval=1. Before each step comes one of three things,
    drawn at random: no record, a record written at once, or a record written while the GPU works, as in train.py.
    """
    from trainer import SIZES, Trainer, hardware, random_batch

    device = 'cpu' if dry_run else 'cuda'
    options = dict(batch_size=2, block_size=32, compile=False) if dry_run else dict(batch_size=batch_size)
    trainer = Trainer('ddp', SIZES['tiny' if dry_run else '124M'] | dict(vocab_size=50304), device, **options)
    trainer.feed(random_batch)
    log = TrainingLogger(folder, {'dataset': 'none'}, {'phase': 'benchmark'})

    def next_batch(trainer):
        log.flush()  # the GPU's work has been launched
        return trainer.batch

    trainer.next_batch = next_batch

    def step():
        loss = trainer.step()
        return trainer.step_guard.measure(loss, trainer.grad_norm)[:2]  # waits for the GPU

    seconds = {'no record': [], 'written at once': [], 'written while the GPU works': []}
    loss, norm, ms = *step(), 20.0
    warmup = 50 if not dry_run else 2
    for i in range(steps + warmup):
        arm = random.choice(list(seconds))
        log.wait()
        start = time.perf_counter()
        if arm != 'no record':
            peak = hardware.peak_memory_bytes(device)
            log.iteration(
                i,
                loss=loss,
                lr=6e-4,
                time_ms=ms,
                tokens_per_sec=1024e3 * batch_size / ms,
                mfu=0.4,
                grad_norm=norm,
                peak_memory_bytes=peak,
            )
            if arm == 'written at once':
                log.flush()
        loss, norm = step()
        taken = time.perf_counter() - start
        ms = taken * 1e3
        if i >= warmup:
            seconds[arm].append(taken)
    log.close('completed')
    print(f'{trainer.parameters:,} parameters, batch of {trainer.batch_size}, {hardware.device_name(device)}')
    for arm, times in seconds.items():
        row(f'training step, {arm}', times)
    without = seconds['no record']
    for arm, times in list(seconds.items())[1:]:
        quarters = [statistics.quantiles(t, n=4) for t in (times, without)]
        lost = [1e6 * (a - b) for a, b in zip(*quarters)]
        # standard error of a difference of medians; the deviation comes from the quartiles, because on a shared machine
        # a few steps take 4 times as long
        error = 1.25e6 * sum(((q[2] - q[0]) / 1.35) ** 2 / len(t) for q, t in zip(quarters, (times, without))) ** 0.5
        share = lost[1] / 1e6 / statistics.median(without)
        quartiles = ', '.join(f'{us:.0f}' for us in lost)
        print(f'{arm}: longer at the quartiles by {quartiles} us (+- {error:.0f}): {share:.2%} of a step')


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--records', type=int, default=1_000_000)
    parser.add_argument('--steps', type=int, default=1000, help='steps of each loop')
    parser.add_argument('--gpu', action='store_true')
    parser.add_argument('--dir', default='.')
    parser.add_argument('--dry-run', action='store_true', help='few records, and tiny steps on a CPU')
    args = parser.parse_args()
    if args.dry_run:
        args.records, args.steps = 4000, 20
    with open('/proc/cpuinfo') as file:
        cpu = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), platform.machine())
    system = f'Linux {platform.release()}, Python {platform.python_version()}'
    print(f'{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {system}')
    print(
        f'{"microseconds per record":<44} {"records":>9} {"median":>8} {"5%":>8} {"95%":>8} {"mean":>8} {"max (ms)":>9}'
    )
    if args.gpu:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            return on_gpu(folder, args.steps, args.dry_run)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        log = TrainingLogger(folder, {'dataset': 'none'}, {'phase': 'benchmark'})
        for busy, busy_ms in ((python, 0), (python, 4), (products, 4), (products, 18)):
            loop(log, busy, busy_ms, args.steps)
        plain = []
        with open(os.path.join(folder, 'plain'), 'w', buffering=1) as file:
            for i in range(args.steps):
                time.sleep(0.02)
                values = {'iter': i, 'loss': 1 / (i + 1), 'lr': 6e-4 / (i + 1), 'time_ms': 20 + i % 97 / 71}
                plain.append(timed(lambda values=values: file.write(json.dumps(values) + '\n')))
        row('for scale: json.dumps and write of 4 numbers', plain)
        log.close('completed')

        # without a pause between the calls, each waits for the one before
        log = TrainingLogger(folder, {'dataset': 'none'}, {'phase': 'benchmark'})
        row('back to back: at the start', [record(log, i) for i in range(2000)])
        row(f'all up to record {args.records:,}', [record(log, i) for i in range(2000, args.records)])
        row('after them', [record(log, args.records + i) for i in range(2000)])
        log.wait()
        size, closing = os.path.getsize(log.path), timed(log.close, 'completed')
        print(
            f'{size / 1e6:.0f} MB while open, {os.path.getsize(log.path) / 1e6:.0f} MB closed in {closing:.2f} s: '
            f'{os.path.getsize(log.path) / (args.records + 2000):.0f} bytes per record'
        )


if __name__ == '__main__':
    main()
