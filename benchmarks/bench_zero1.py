"""
Phase 1 (ZeRO-1) against the reference (DDP) on all GPUs of one machine, in one run: speed, memory, saves, loss curves.

    python benchmarks/bench_zero1.py --out=benchmarks/results/zero1.json              # speed, memory: 4 to 5 minutes on 4 H200
    python benchmarks/bench_zero1.py --sizes=124M --curves=200 --profile --out=...    # 200 steps on real text, and where the
                                                                                      # time goes: 3 minutes
    python benchmarks/bench_zero1.py --plot=curves.png --out=FILE                     # draws the curves in FILE
    python benchmarks/bench_zero1.py --dry-run                                        # tiny, 2 processes, on a CPU

It starts its own processes (torchrun). Both trainers use the same model under the same DDP and torch.compile; only the
optimizer is exchanged, back and forth, so that neither gets the warmer GPU. The steps are those of train.py --cuda_graph=False,
which reads the loss after each. Memory is that of the rank with most, without what the CUDA driver and NCCL take.
"""

import argparse
import gc
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
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from common import ROOT, facts, memory, reset_peak, torchrun, write_json

sys.path.insert(0, str(ROOT / 'phase1_zero1'))
import distributed
import hardware
from model import GPT, GPTConfig
from step_guard import StepGuard
from zero1 import Zero1Optimizer, all_gather

# layers, heads, width, batch size; per number of micro-steps: steps in a round, rounds
SIZES = {
    '124M': ((12, 12, 768, 12), {1: (30, 4), 10: (6, 4)}),
    '1.5B': ((48, 25, 1600, 8), {1: (8, 4), 10: (3, 2)}),
    'tiny': ((2, 2, 64, 2), {1: (4, 2), 3: (2, 2)}),
}
BLOCK_SIZE = {'124M': 1024, '1.5B': 1024, 'tiny': 32}


class Trainer:
    """A model under DDP with an exchangeable optimizer, and the training step of train.py."""

    def __init__(self, size, device, compile, tokens, keep_start):
        (n_layer, n_head, n_embd, self.batch_size), _ = SIZES[size]
        self.block_size, self.device, self.tokens = BLOCK_SIZE[size], device, tokens
        self.device_type = device.split(':')[0]
        self.context = hardware.autocast(device, 'bfloat16' if self.device_type == 'cuda' else 'float32')
        torch.manual_seed(1337)
        with redirect_stdout(None):
            self.raw_model = GPT(
                GPTConfig(block_size=self.block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False)
            ).to(device)
        self.start = [p.detach().to('cpu', copy=True) for p in self.raw_model.parameters()] if keep_start else None
        self.compile = compile

    def wrap(self):
        """torch.compile and DDP; again after anything that moves the parameters' memory. The first step afterwards compiles."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.model = None
        model = torch.compile(self.raw_model) if self.compile else self.raw_model
        self.model = DDP(
            model, device_ids=[self.device] if self.device_type == 'cuda' else None, gradient_as_bucket_view=True
        )

    def set_optimizer(self, variant):
        self.optimizer = self.step_guard = None
        gc.collect()
        if self.device_type == 'cuda':
            torch.cuda.empty_cache()
        with redirect_stdout(None):
            optimizer = self.raw_model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), self.device_type)
        if variant == 'zero1':
            optimizer = Zero1Optimizer(optimizer)
        if variant == 'bucket_view':
            from torch.distributed.optim import ZeroRedundancyOptimizer

            groups = [{k: group[k] for k in ('params', 'weight_decay')} for group in optimizer.param_groups]
            options = dict(lr=6e-4, betas=(0.9, 0.95), fused=self.device_type == 'cuda')
            optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, parameters_as_bucket_view=True, **options)
        self.optimizer = optimizer
        if variant != 'bucket_view':  # which does not pass on found_inf
            self.step_guard = StepGuard(self.device, torch.amp.GradScaler(self.device_type, enabled=False))

    def batch(self):
        ix = torch.randint(len(self.tokens) - self.block_size - 1, (self.batch_size,), generator=self.generator)
        rows = torch.stack([torch.from_numpy(self.tokens[i : i + self.block_size + 1].astype(np.int64)) for i in ix])
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        if self.device_type == 'cuda':
            x, y = x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(self.device, non_blocking=True)
        return x, y

    def start_data(self, seed):
        self.generator = torch.Generator().manual_seed(seed * 1000 + dist.get_rank())
        self.next = self.batch()

    def step(self, micro_steps):
        """One iteration; the mean loss."""
        loss_sum = torch.zeros((), device=self.device)
        for micro_step in range(micro_steps):
            self.model.require_backward_grad_sync = micro_step == micro_steps - 1
            with self.context:
                loss = self.model(*self.next)[1] / micro_steps
            self.next = self.batch()
            loss.backward()
            loss_sum += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.step_guard.step(self.optimizer, grad_norm) if self.step_guard else self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return distributed.mean_over_ranks(loss_sum).item()


def most(x):
    """The largest of the ranks' numbers."""
    x = torch.tensor(float(x), dtype=torch.float64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def state_bytes(optimizer):
    inner = getattr(getattr(optimizer, 'zero', optimizer), 'optim', optimizer)
    return sum(v.nbytes for state in inner.state.values() for v in state.values())


def measure(trainer, variant, micro_steps, steps):
    """Milliseconds of each step, and bytes, of a fresh optimizer."""
    trainer.set_optimizer(variant)
    for _ in range(2 if micro_steps == 1 else 1):
        trainer.step(micro_steps)
    reset_peak(trainer.device)
    times = []
    most(0)  # all ranks are here; over the CPU
    t0 = time.perf_counter()
    for _ in range(steps):
        trainer.step(micro_steps)
        t0, t = time.perf_counter(), t0
        times.append((t0 - t) * 1000)
    result = {'peak_bytes': most(memory(trainer.device, peak=True)), 'at_rest_bytes': most(memory(trainer.device))}
    return times, result | {'optimizer_state_bytes': most(state_bytes(trainer.optimizer))}


def speed(trainer, size, left, log):
    """Rounds of the two optimizers in the order A B B A, at each number of micro-steps."""
    results = {}
    world_size = dist.get_world_size()
    n = sum(p.numel() for p in trainer.raw_model.parameters())
    for micro_steps, (steps, rounds) in SIZES[size][1].items():
        times, medians, facts = {'ddp': [], 'zero1': []}, {'ddp': [], 'zero1': []}, {}
        for i in range(rounds):
            if i > 0 and left() < 15:
                log(f'{size}, {micro_steps} micro-steps: {i} of {rounds} rounds, for lack of time')
                break
            for variant in ('ddp', 'zero1') if i % 2 == 0 else ('zero1', 'ddp'):
                t, facts[variant] = measure(trainer, variant, micro_steps, steps)
                times[variant] += t
                medians[variant].append(statistics.median(t))
        tokens = trainer.batch_size * trainer.block_size * micro_steps * world_size
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
        log(
            f'{size}, {micro_steps} micro-steps: DDP {row["ddp"]["tokens_per_sec"]:,.0f}, ZeRO-1 {row["zero1"]["tokens_per_sec"]:,.0f} tokens/s: '
            f'{row["zero1_of_ddp"]:.2%} (by round {", ".join(f"{r:.2%}" for r in row["zero1_of_ddp_by_round"])})'
        )
    return results


def save(trainer, log):
    """Seconds and GPU memory of collecting a checkpoint, with the peak of training beside it; nothing is written."""
    trainer.set_optimizer('zero1')
    for _ in range(2):
        trainer.step(1)
    reset_peak(trainer.device)
    trainer.step(1)
    training = most(memory(trainer.device, peak=True))
    reset_peak(trainer.device)
    most(0)  # all ranks are here; over the CPU
    started = time.perf_counter()
    state = trainer.optimizer.state_dict()
    model = {k: v.cpu() for k, v in trainer.raw_model.state_dict().items()} if dist.get_rank() == 0 else None
    seconds = time.perf_counter() - started
    result = {
        'peak_bytes': most(memory(trainer.device, peak=True)),
        'training_peak_bytes': training,
        'seconds': most(seconds),
    }
    log(
        f'save: {result["seconds"]:.1f} s, peak {result["peak_bytes"] / 2**30:.2f} GiB; training {training / 2**30:.2f} GiB'
    )
    del state, model
    return result


def curves(trainer, steps, log):
    """The same steps from the same weights: DDP twice (its noise from run to run), ZeRO-1, and DDP on other data (from seed to seed)."""
    results = {}
    for name, variant, seed in (
        ('ddp', 'ddp', 1),
        ('zero1', 'zero1', 1),
        ('ddp again', 'ddp', 1),
        ('ddp, other data', 'ddp', 2),
    ):
        with torch.no_grad():
            torch._foreach_copy_(list(trainer.raw_model.parameters()), trainer.start)
        trainer.set_optimizer(variant)
        trainer.start_data(seed)
        results[name] = []
        for step in range(steps):
            for group in trainer.optimizer.param_groups:
                group['lr'] = 6e-4 * min(1, (step + 1) / 50)
            results[name].append(trainer.step(1))
        log(f'{name}: loss {results[name][0]:.4f} to {statistics.mean(results[name][-10:]):.4f} (mean of the last 10)')
    for name in list(results)[1:]:
        log(f'|ddp - {name}| at most {max(abs(a - b) for a, b in zip(results["ddp"], results[name])):.2e}')
    return results


def parts(trainer, log):
    """Milliseconds of the optimizer step's parts, and of other ways to exchange the updated pieces that were considered."""
    results = {}

    def timed(name, function, repeat=8):
        for i in range(repeat + 3):
            if i == 3:
                hardware.now(trainer.device)
                most(0)  # all ranks are here; over the CPU
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
    """Kernel time by kind, gaps between kernels, and numbers of graphs and kernels, per step."""
    trainer.set_optimizer(variant)
    if variant == 'bucket_view':
        trainer.wrap()
    for _ in range(3):
        trainer.step(micro_steps)
    graphs = torch._dynamo.utils.counters['aot_autograd']['total']  # that torch.compile made since wrap()
    cuda = trainer.device != 'cpu'
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    steps = 3
    most(0)  # all ranks are here; over the CPU
    with torch.profiler.profile(activities=activities[-1:]) as prof:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step(micro_steps)
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
        f'profile of {variant}, {micro_steps} micro-steps, graphs {graphs}: {wall:.2f} ms, gaps {result["gaps_ms"]:.2f}, '
        f'exposed nccl {result["exposed_nccl_ms"]:.2f}; ms (kernels) {parts}'
    )
    return result


def covered(events):
    """Microseconds in which at least one of the events runs."""
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
    """GPT-2 tokens of data/python_gpt2 if they are there; else the bytes of Python's standard library: real text either way."""
    path = ROOT / 'nanoGPT' / 'data' / 'python_gpt2' / 'train.bin'
    if path.exists():
        return np.memmap(path, dtype=np.uint16, mode='r'), 'python_gpt2'
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    return np.frombuffer(b''.join(f.read_bytes() for f in files), dtype=np.uint8).astype(
        np.uint16
    ), "bytes of Python's standard library"


def plot(report, path):
    """The loss curves of a report, and how far they are apart beside what the reference itself shows."""
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
            # nothing on a logarithmic axis where the curves are equal
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
    rank = int(os.environ['RANK'])
    device, *_ = hardware.resolve_auto('cuda' if cuda else 'cpu', 'auto', 'auto', 'auto')
    torch.set_num_threads(1 if not cuda else 8)
    distributed.join_ranks('nccl' if cuda else 'gloo', 600)
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
        trainer = Trainer(size, device, args.compile, tokens, keep_start=args.curves)
        trainer.start_data(0)
        trainer.set_optimizer('ddp')
        trainer.wrap()
        t = time.perf_counter()
        trainer.step(1)
        trainer.step(2)  # compiles what accumulation adds
        log(f'{size}: compiled and warm in {time.perf_counter() - t:.0f} s')
        return trainer

    for size in args.sizes:
        if left() < 60:
            log(f'{size} left out, for lack of time')
            continue
        trainer = make(size)
        report.setdefault('speed', {})[size] = speed(trainer, size, left, log)
        write()
        report.setdefault('save', {})[size] = save(trainer, log)
        report.setdefault('parts_ms', {})[size] = parts(trainer, log)
        write()
        if size == args.sizes[0] and args.curves:
            report['curves'] = curves(trainer, args.curves, log)
            write()
        if size == args.sizes[0] and args.profile:
            report['profile'] = {}
            for variant in ('ddp', 'zero1', 'bucket_view'):
                report['profile'][variant] = {
                    micro_steps: profile(trainer, variant, micro_steps, log) for micro_steps in (1, 4)
                }
                write()
        del trainer
        torch._dynamo.reset()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    report['seconds'] = time.perf_counter() - started
    write()
    if rank == 0:
        print(
            f'\n{report["gpus"]} x {report["device"]}, torch {report["versions"]["torch"]}, {report["seconds"]:.0f} s'
        )
        for size, rows in report.get('speed', {}).items():
            for micro_steps, row in rows.items():
                for variant in ('ddp', 'zero1'):
                    r = row[variant]
                    spread = [min(r['tokens_per_sec_by_round']), max(r['tokens_per_sec_by_round'])]
                    print(
                        f'{size:>5} x {micro_steps:2} {variant:>6}: {r["tokens_per_sec"]:12,.0f} tokens/s ({spread[0]:,.0f} to {spread[1]:,.0f}), '
                        f'at rest {r["at_rest_bytes"] / 2**30:6.2f}, peak {r["peak_bytes"] / 2**30:6.2f} GiB'
                    )
                print(
                    f'{"":>11} ZeRO-1 of DDP: {row["zero1_of_ddp"]:.2%}; saved at rest {row["saved_bytes"] / 2**30:.2f} GiB, '
                    f'expected {row["saved_bytes_expected"] / 2**30:.2f}'
                )
        print('\n'.join(lines))
    dist.destroy_process_group()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='', help='JSON file to write')
    parser.add_argument('--sizes', default='124M,1.5B', type=lambda s: [size for size in s.split(',') if size])
    parser.add_argument('--curves', type=int, default=0, help='steps of loss curves to record, at the first size')
    parser.add_argument(
        '--profile', action='store_true', help='kernels and gaps, for both and for parameters_as_bucket_view'
    )
    parser.add_argument('--time_limit', type=float, default=270, help='seconds after which nothing new is begun')
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
        sys.exit(subprocess.call(torchrun(nproc, __file__, *sys.argv[1:])))
    main(args)
