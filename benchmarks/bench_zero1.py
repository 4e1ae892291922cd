"""
Compares ZeRO-1 with DDP on all GPUs of one machine, in one run: speed, memory, saves, loss curves.

    python benchmarks/bench_zero1.py --out=benchmarks/results/zero1.json  # speed and memory: 4 to 5 minutes on 4 H200s
    python benchmarks/bench_zero1.py --sizes=124M --curves=200 --profile --out=...  # also curves and a profile
    python benchmarks/bench_zero1.py --plot=curves.png --out=FILE                   # draws the curves in FILE
    python benchmarks/bench_zero1.py --dry-run                                      # tiny, 2 processes, on a CPU

The script starts its own processes with torchrun. Both trainers use the same model under the same DDP and
torch.compile. Only the optimizer is exchanged, back and forth, so that neither trainer has the warmer GPU. A step is
that of train.py --cuda_graph=False (see trainer.py), and its loss is read each time. Memory is torch's, on the rank
that has most.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import ROOT, facts, memory, reset_peak, torchrun, write_json
from tables import gib, load, markdown, number, percent, table
from trainer import SIZES as SHAPES
from trainer import Trainer, batches_of, hardware, start_ranks

# size: ((batch size, block size), {micro-steps: (steps in a round, rounds)})
SIZES = {
    '124M': ((12, 1024), {1: (30, 4), 10: (6, 4)}),
    '1.5B': ((8, 1024), {1: (8, 4), 10: (3, 2)}),
    'tiny': ((2, 32), {1: (4, 2), 3: (2, 2)}),
}


class Unguarded:
    """Replaces StepGuard, whose found_inf ZeroRedundancyOptimizer does not pass on."""

    def step(self, optimizer, grad_norm):
        optimizer.step()


def exchange_optimizer(trainer, variant):
    """
    Gives the trainer a new optimizer. variant: ddp, zero1, or bucket_view for PyTorch's ZeroRedundancyOptimizer with
    parameters_as_bucket_view.
    """
    if variant != 'bucket_view':
        return trainer.set_optimizer(variant)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    trainer.set_optimizer('ddp')
    groups = [{k: group[k] for k in ('params', 'weight_decay')} for group in trainer.optimizer.param_groups]
    options = dict(lr=6e-4, betas=(0.9, 0.95), fused=trainer.device_type == 'cuda', parameters_as_bucket_view=True)
    trainer.optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    trainer.step_guard = Unguarded()


def start_data(trainer, seed):
    trainer.next_batch.generator = torch.Generator().manual_seed(seed * 1000 + dist.get_rank())
    trainer.feed(trainer.next_batch)


def most(x):
    """Returns the largest x of all ranks, over the CPU; also a barrier."""
    x = torch.tensor(float(x), dtype=torch.float64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def state_bytes(optimizer):
    inner = getattr(getattr(optimizer, 'zero', optimizer), 'optim', optimizer)
    return sum(v.nbytes for state in inner.state.values() for v in state.values())


def measure(trainer, variant, micro_steps, steps):
    """Returns the milliseconds of each step with a new optimizer, and a dict of bytes."""
    exchange_optimizer(trainer, variant)
    trainer.timed_steps(micro_steps, 2 if micro_steps == 1 else 1)
    reset_peak(trainer.device)
    most(0)  # waits for all ranks
    times = [1000 * seconds for seconds in trainer.timed_steps(micro_steps, steps)]
    result = {'peak_bytes': most(memory(trainer.device, peak=True)), 'at_rest_bytes': most(memory(trainer.device))}
    return times, result | {'optimizer_state_bytes': most(state_bytes(trainer.optimizer))}


def speed(trainer, size, left, log):
    """Measures both optimizers in rounds, in the order A B B A, at each number of micro-steps."""
    results = {}
    world_size = dist.get_world_size()
    n = trainer.parameters
    for micro_steps, (steps, rounds) in SIZES[size][1].items():
        times, medians, facts = {'ddp': [], 'zero1': []}, {'ddp': [], 'zero1': []}, {}
        for i in range(rounds):
            if i > 0 and left() < 15:
                log(f'{size}, {micro_steps} micro-steps: no time for more than {i} of {rounds} rounds')
                break
            for variant in ('ddp', 'zero1') if i % 2 == 0 else ('zero1', 'ddp'):
                t, facts[variant] = measure(trainer, variant, micro_steps, steps)
                times[variant] += t
                medians[variant].append(statistics.median(t))
        tokens = trainer.tokens(micro_steps)
        row = {}
        for variant, t in times.items():
            row[variant] = {
                'tokens_per_sec': tokens / statistics.median(t) * 1000,
                'tokens_per_sec_by_round': [tokens / m * 1000 for m in medians[variant]],
                'time_ms': statistics.median(t),
                'time_ms_quartiles': statistics.quantiles(t, n=4)[::2],
                **facts[variant],
            }
        row['zero1_of_ddp'] = row['zero1']['tokens_per_sec'] / row['ddp']['tokens_per_sec']
        row['zero1_of_ddp_by_round'] = [d / z for d, z in zip(medians['ddp'], medians['zero1'])]
        row['saved_bytes'] = row['ddp']['at_rest_bytes'] - row['zero1']['at_rest_bytes']
        row['saved_bytes_expected'] = 8 * n * (1 - 1 / world_size)
        results[micro_steps] = row
        speeds = f'DDP {row["ddp"]["tokens_per_sec"]:,.0f}, ZeRO-1 {row["zero1"]["tokens_per_sec"]:,.0f} tokens/s'
        by_round = ', '.join(f'{ratio:.2%}' for ratio in row['zero1_of_ddp_by_round'])
        log(f'{size}, {micro_steps} micro-steps: {speeds}: {row["zero1_of_ddp"]:.2%} (by round {by_round})')
    return results


def save(trainer, log):
    """
    Measures collecting a checkpoint, without writing it. Returns its seconds and peak memory, and training's peak, in
    bytes.
    """
    trainer.set_optimizer('zero1')
    trainer.timed_steps(1, 2)
    reset_peak(trainer.device)
    trainer.timed_steps(1, 1)
    training = most(memory(trainer.device, peak=True))
    reset_peak(trainer.device)
    most(0)  # waits for all ranks
    started = time.perf_counter()
    state = trainer.optimizer.state_dict()
    model = {k: v.cpu() for k, v in trainer.raw_model.state_dict().items()} if dist.get_rank() == 0 else None
    seconds = time.perf_counter() - started
    result = {
        'peak_bytes': most(memory(trainer.device, peak=True)),
        'training_peak_bytes': training,
        'seconds': most(seconds),
    }
    peaks = f'peak {gib(result["peak_bytes"])} GiB; training {gib(training)} GiB'
    log(f'save: {result["seconds"]:.1f} s, {peaks}')
    del state, model
    return result


def curves(trainer, start, steps, log):
    """
    Runs the same steps from the weights `start` with DDP, ZeRO-1, DDP again (noise between runs), and DDP on other data
    (noise between seeds). Returns {name: losses}.
    """
    results = {}
    for name, variant, seed in (
        ('ddp', 'ddp', 1),
        ('zero1', 'zero1', 1),
        ('ddp again', 'ddp', 1),
        ('ddp, other data', 'ddp', 2),
    ):
        with torch.no_grad():
            torch._foreach_copy_(list(trainer.raw_model.parameters()), start)
        exchange_optimizer(trainer, variant)
        start_data(trainer, seed)
        results[name] = []
        for step in range(steps):
            for group in trainer.optimizer.param_groups:
                group['lr'] = 6e-4 * min(1, (step + 1) / 50)
            results[name].append(trainer.step(1).item())
        log(f'{name}: loss {results[name][0]:.4f} to {statistics.mean(results[name][-10:]):.4f} (mean of the last 10)')
    for name in list(results)[1:]:
        log(f'|ddp - {name}| at most {max(abs(a - b) for a, b in zip(results["ddp"], results[name])):.2e}')
    return results


def parts(trainer, log):
    """
    Returns the milliseconds of each part of the optimizer step, and of alternative ways to exchange the updated pieces.
    """
    results = {}

    def timed(name, function, repeat=8):
        for i in range(repeat + 3):
            if i == 3:
                hardware.now(trainer.device)
                most(0)  # waits for all ranks
                started = hardware.now(trainer.device)
            function()
        results[name] = (hardware.now(trainer.device) - started) / repeat * 1000

    def zero_gradients(params):
        for p in params:
            p.grad = torch.zeros_like(p)

    trainer.set_optimizer('ddp')
    zero_gradients(trainer.raw_model.parameters())
    timed('AdamW', trainer.optimizer.step)
    trainer.set_optimizer('zero1')
    timed('step', trainer.optimizer.step)
    trainer.optimizer.zero_grad()
    zero = trainer.optimizer.zero
    zero_gradients(piece.shard for piece in trainer.optimizer.own)
    timed('step: AdamW of the shards', zero._local_step)
    timed('step: all-gather in place', zero._sync_params)

    from zero1 import all_gather

    def one_by_one():
        for work in [all_gather(whole, own, async_op=True) for whole, own in zero.in_place]:
            work.wait()

    def by_way_of_a_buffer():
        n = sum(own.numel() for _, own in zero.in_place)
        buffer = zero.in_place[0][0].new_empty(zero.world_size, n)
        sizes = [own.numel() for _, own in zero.in_place]
        torch._foreach_copy_(list(buffer[zero.rank].split(sizes)), [own for _, own in zero.in_place])
        all_gather(buffer.view(-1), buffer[zero.rank])
        parts = [part for row in zip(*(whole.chunk(zero.world_size) for whole, _ in zero.in_place)) for part in row]
        torch._foreach_copy_(parts, [view for row in buffer for view in row.split(sizes)])

    def broadcasts():
        for rank in range(zero.world_size):
            for work in zero._broadcast_params_from_rank(rank):
                work.wait()

    with torch.no_grad():
        timed('instead: an all-gather for each parameter', one_by_one)
        timed('instead: one all-gather of a buffer', by_way_of_a_buffer)
        timed("instead: ZeroRedundancyOptimizer's broadcasts", broadcasts)
    log(', '.join(f'{name} {ms:.2f} ms' for name, ms in results.items()))
    for p in trainer.raw_model.parameters():
        p.grad = None
    return results


KINDS = (
    ('nccl', 'nccl'),
    ('adam', 'adam'),
    ('matmul', 'gemm|nvjet|cutlass|xmma'),
    ('attention', 'flash|fmha|sdpa|attn'),
    ('triton', '^triton'),
    ('copies', 'memcpy|memset'),
)


def profile(trainer, variant, micro_steps, log):
    """Returns kernel time by kind, gaps between kernels, and numbers of graphs and kernels, per step."""
    exchange_optimizer(trainer, variant)
    if variant == 'bucket_view':
        trainer.wrap()  # the optimizer has moved the parameters
    trainer.timed_steps(micro_steps, 3)
    graphs = torch._dynamo.utils.counters['aot_autograd']['total']  # compiled since wrap()
    cuda = trainer.device != 'cpu'
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    steps = 3
    most(0)  # waits for all ranks
    with torch.profiler.profile(activities=activities[-1:]) as prof:
        started = time.perf_counter()
        trainer.timed_steps(micro_steps, steps)
        wall = (time.perf_counter() - started) * 1e3 / steps
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in prof.events()
        if e.device_type == wanted and not e.is_user_annotation
    ]
    times, counts = Counter(), Counter()
    for name, a, b in events:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), 'other')
        times[kind] += (b - a) / 1e3 / steps
        counts[kind] += 1 / steps
    busy, busy_without_nccl = covered(events), covered([e for e in events if 'nccl' not in e[0].lower()])
    result = {
        'micro_steps': micro_steps,
        'wall_ms': wall,
        'gaps_ms': wall - busy / 1e3 / steps,
        'exposed_nccl_ms': (busy - busy_without_nccl) / 1e3 / steps,
        'kernel_ms': dict(times),
        'kernels': dict(counts),
        'graphs': graphs,
        'longest': [(name[:100], ms, count) for name, ms, count in longest(events, steps)],
    }
    parts = ', '.join(f'{kind} {ms:.2f} ({counts[kind]:.0f})' for kind, ms in times.most_common())
    log(
        f'profile of {variant}, {micro_steps} micro-steps, graphs {graphs}: {wall:.2f} ms, '
        f'gaps {result["gaps_ms"]:.2f}, exposed nccl {result["exposed_nccl_ms"]:.2f}; ms (kernels) {parts}'
    )
    return result


def covered(events):
    """Returns the microseconds during which at least one of the events runs."""
    total, end = 0.0, 0.0
    for _, a, b in sorted(events, key=lambda e: e[1]):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def longest(events, steps, count=25):
    times, counts = Counter(), Counter()
    for name, a, b in events:
        times[name] += (b - a) / 1e3 / steps
        counts[name] += 1
    return [(name, ms, counts[name] / steps) for name, ms in times.most_common(count)]


def read_tokens():
    """Returns (tokens, name): GPT-2 tokens of data/python_gpt2, or else the bytes of Python's standard library."""
    path = ROOT / 'nanoGPT' / 'data' / 'python_gpt2' / 'train.bin'
    if path.exists():
        return np.memmap(path, dtype=np.uint16, mode='r'), 'python_gpt2'
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    text = np.frombuffer(b''.join(f.read_bytes() for f in files), dtype=np.uint8)
    return text.astype(np.uint16), "bytes of Python's standard library"


def plot(report, path):
    """Draws the loss curves of a report, and their differences from DDP's."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    curves = report['curves']
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2), layout='constrained')
    styles = {
        'ddp': ('#000000', '-', 3.5),
        'zero1': ('#E69F00', '-', 1.5),
        'ddp again': ('#0072B2', ':', 1.5),
        'ddp, other data': ('#009E73', '-', 1),
    }
    labels = {'ddp': 'DDP', 'zero1': 'ZeRO-1', 'ddp again': 'DDP again', 'ddp, other data': 'DDP, other data order'}
    for name, losses in curves.items():
        color, line, width = styles[name]
        upper.plot(losses, color=color, linestyle=line, linewidth=width, label=labels[name])
        if name != 'ddp':
            # a logarithmic axis cannot show a difference of 0
            difference = [abs(a - b) or math.nan for a, b in zip(losses, curves['ddp'])]
            equal = sum(a == b for a, b in zip(losses, curves['ddp']))
            label = f'{labels[name]} (equal in {equal} of {len(losses)} steps)'
            lower.plot(difference, color=color, linestyle=line, linewidth=1.5, label=label)
    size = next(iter(report['speed']))
    upper.set(ylabel='training loss (nats per token)')
    upper.set_title(f'GPT-2 {size} on {report["gpus"]} x {report["device"]}, {report["dtype"]}, {report["data"]}')
    lower.set(ylabel='|loss - loss of DDP|', xlabel='step', yscale='log')
    for axes in (upper, lower):
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(args):
    started = time.perf_counter()
    cuda = not args.dry_run
    torch.set_num_threads(1 if not cuda else 8)
    device, rank, _ = start_ranks(cpu=not cuda)
    tokens, data = read_tokens()

    def left():
        seconds = torch.tensor(args.time_limit - (time.perf_counter() - started))
        dist.broadcast(seconds, src=0)
        return seconds.item()

    lines = []

    def log(line):
        if rank == 0:
            lines.append(line)
            print(f'[{time.perf_counter() - started:.0f} s] {line}', flush=True)

    report = facts(cpu=args.dry_run) | {
        'gpus': dist.get_world_size(),
        'data': data,
        'dtype': 'bfloat16' if cuda else 'float32',
    }

    def write():
        if rank == 0 and args.out:
            write_json(args.out, report)

    def make(size):
        (batch_size, block_size), _ = SIZES[size]
        shape = SHAPES[size] | dict(vocab_size=50304)
        options = dict(batch_size=batch_size, block_size=block_size, compile=args.compile)
        trainer = Trainer('ddp', shape, device, **options)
        start = [p.detach().to('cpu', copy=True) for p in trainer.raw_model.parameters()] if args.curves else None
        trainer.next_batch = batches_of(tokens)
        start_data(trainer, 0)
        t = time.perf_counter()
        trainer.timed_steps(1, 1)
        trainer.timed_steps(2, 1)  # compiles the micro-steps that accumulate
        log(f'{size}: compiled and warm in {time.perf_counter() - t:.0f} s')
        return trainer, start

    for size in args.sizes:
        if left() < 60:
            log(f'{size}: left out, no time left')
            continue
        trainer, start = make(size)
        report.setdefault('speed', {})[size] = speed(trainer, size, left, log)
        write()
        report.setdefault('save', {})[size] = save(trainer, log)
        report.setdefault('parts_ms', {})[size] = parts(trainer, log)
        write()
        if size == args.sizes[0] and args.curves:
            report['curves'] = curves(trainer, start, args.curves, log)
            write()
        if size == args.sizes[0] and args.profile:
            report['profile'] = {}
            for variant in ('ddp', 'zero1', 'bucket_view'):
                report['profile'][variant] = {
                    micro_steps: profile(trainer, variant, micro_steps, log) for micro_steps in (1, 4)
                }
                write()
        trainer.free()
    report['seconds'] = time.perf_counter() - started
    write()
    if rank == 0:
        print(f'\n{report["seconds"]:.0f} s\n\n{zero1_speed(report)}\n\n{zero1_parts(report)}\n')
        print('\n'.join(lines))
    dist.destroy_process_group()


@table('zero1_h200x4')
def zero1_speed(report):
    rows = []
    for size, by_micro_steps in report['speed'].items():
        for micro_steps, row in by_micro_steps.items():
            speed = {key: row[key]['tokens_per_sec'] for key in ('ddp', 'zero1')}
            rounds = row['zero1']['tokens_per_sec_by_round']
            its = dict(median=speed['zero1'], min=min(rounds), max=max(rounds))
            arrows = [
                ' → '.join(gib(row[variant][key]) for variant in speed) for key in ('at_rest_bytes', 'peak_bytes')
            ]
            of_ddp = percent(its, dict(median=speed['ddp'], min=0, max=0), runs=len(rounds))
            rows.append((f'{size} × {micro_steps}', *(f'{v:,.0f}' for v in speed.values()), of_ddp, *arrows))
    header = [
        'model × micro-steps',
        'DDP, tokens/s',
        'ZeRO-1, tokens/s',
        'ZeRO-1 in % of DDP (range of rounds)',
        'at rest, GiB',
        'peak, GiB',
    ]
    return markdown(header, rows)


@table('zero1_h200x4')
def zero1_parts(report):
    names = {
        'AdamW': 'AdamW of all parameters (DDP)',
        'step: AdamW of the shards': "a rank's share of it",
        'step: all-gather in place': 'all-gather in place',
        'instead: one all-gather of a buffer': 'instead: one all-gather of a buffer, with copies',
        'instead: an all-gather for each parameter': 'instead: an all-gather for each parameter',
    }
    broadcasts = "instead: ZeroRedundancyOptimizer's broadcasts"
    names[broadcasts] = 'instead: a broadcast for each piece, as ZeroRedundancyOptimizer does'
    parts = report['parts_ms']
    rows = [(text, *(f'{its[name]:.2f}' for its in parts.values())) for name, text in names.items()]
    return markdown(['the optimizer step, ms', *parts], rows)


def of_first_micro_steps(size):
    return load('zero1_h200x4')['speed'][size]['1']


@number
def zero1_saved(size, key):
    """Returns the GiB that ZeRO-1 saves at rest. key: saved_bytes (measured) or saved_bytes_expected (computed)."""
    return gib(of_first_micro_steps(size)[key])


@number
def zero1_less():
    """Returns the share of DDP's memory at rest that ZeRO-1 saves, over both sizes."""
    rows = [of_first_micro_steps(size) for size in ('124M', '1.5B')]
    less = [100 * row['saved_bytes'] / row['ddp']['at_rest_bytes'] for row in rows]
    return f'{min(less):.0f}% to {max(less):.0f}%'


@number
def zero1_range():
    """Returns the speed of ZeRO-1 in percent of DDP's, over both sizes and numbers of micro-steps."""
    ratios = [100 * row['zero1_of_ddp'] for its in load('zero1_h200x4')['speed'].values() for row in its.values()]
    return f'{min(ratios):.1f}% to {max(ratios):.1f}%'


@number
def zero1_save(size, key):
    """Returns the peak in GiB (peak_bytes) or the seconds of collecting the state for a checkpoint."""
    saved = load('zero1_h200x4')['save'][size]
    return gib(saved[key]) if key == 'peak_bytes' else f'{saved[key]:.1f}'


@number
def zero1_curve(what, *name):
    """Returns a curve's largest difference from DDP's (apart), or the mean of its last ten losses (last)."""
    curves = load('zero1_124M_curves_h200x4')['curves']
    losses = curves[' '.join(name)]
    if what == 'last':
        return f'{statistics.mean(losses[-10:]):.3f}'
    return f'{max(abs(a - b) for a, b in zip(curves["ddp"], losses)):.3f}'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='', help='JSON file to write')
    parser.add_argument('--sizes', default='124M,1.5B', type=lambda s: [size for size in s.split(',') if size])
    parser.add_argument('--curves', type=int, default=0, help='steps of loss curves to record, at the first size')
    parser.add_argument(
        '--profile', action='store_true', help='kernels and gaps, for both and for parameters_as_bucket_view'
    )
    parser.add_argument('--time_limit', type=float, default=270, help='seconds after which no new measurement starts')
    parser.add_argument('--nproc', type=int, default=0, help='GPUs (default: all)')
    parser.add_argument('--compile', type=lambda s: s.lower() == 'true', default=True)
    parser.add_argument('--plot', default='', help='image to draw from --out, instead of measuring')
    parser.add_argument('--dry-run', action='store_true', help='tiny, on a CPU')
    args = parser.parse_args()
    if args.dry_run:
        args.sizes, args.compile, args.curves, args.profile = ['tiny'], False, args.curves or 5, True
    if args.plot:
        plot(json.loads(Path(args.out).read_text()), args.plot)
        sys.exit()
    if 'RANK' not in os.environ:
        nproc = args.nproc or (2 if args.dry_run else torch.cuda.device_count())
        if not nproc:
            sys.exit('bench_zero1.py: needs a CUDA GPU; --dry-run tries it without')
        sys.exit(subprocess.call(torchrun(nproc, __file__, *sys.argv[1:])))
    main(args)
