"""
Phase 2's model against the reference's on one GPU, in one process: speed of training GPT-2, and loss curves.

    python benchmarks/bench_phase2.py ladder --out=benchmarks/results/phase2_ladder.json    # about 3 minutes on an H200
    python benchmarks/bench_phase2.py ladder --only='compiled;half_residual' --batch_size=32 --out=...
    python benchmarks/bench_phase2.py curves --out=benchmarks/results/phase2_curves.json    # about 5 minutes; needs data/python_gpt2
    python benchmarks/bench_phase2.py largest --out=benchmarks/results/phase2_largest.json  # about 5 minutes
    python benchmarks/bench_phase2.py profile --out=benchmarks/results/phase2_profile.json  # about 1 minute

ladder: tokens/s of train.py's iteration (bfloat16 autocast, 8 micro-steps of 12 x 1024 random tokens, clipping, fused AdamW) with one change
after the other. Each variant takes turns with the compiled reference, five times; its ratio is the median of those of the turns. Clock and
power are nvidia-smi's during its own turns: a GPU at its power limit slows down, and the more the better it is used.
largest: the most sequences of 1024 tokens in a micro-step that fit into the GPU's memory, found by trying, and tokens/s with them.
profile: where the time of a micro-step goes, by kernel, the optimizer's share included.
curves: 1,000 steps of GPT-2 124M on the sources of Python's standard library, three seeds, for the reference and phase 2.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import tables
from common import facts, write_json
from tables import cite, commit_of, gib, markdown, number, short, table, times

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'phase2_triton'))
import hardware
import kernels.cross_entropy
import kernels.linear
import kernels.modules
from cuda_graph import MicroStep, use_side_stream
from errors import out_of_memory


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, root / folder / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sizes = {
    '124M': dict(n_layer=12, n_head=12, n_embd=768),
    '350M': dict(n_layer=24, n_head=16, n_embd=1024),
    '1.5B': dict(n_layer=48, n_head=25, n_embd=1600),
}


def off(*names):
    """PyTorch's own functions instead of the named ones of the kernel package, as {name: function}."""

    def add_layer_norm(x, branch, weight, bias, eps, dtype):
        total = x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)

    own = dict(
        layer_norm=lambda x, weight, bias, eps, dtype: F.layer_norm(x, weight.shape, weight, bias, eps),
        add_layer_norm=add_layer_norm,
        linear_cross_entropy=lambda x, weight, targets, **_: F.cross_entropy(
            F.linear(x, weight).flatten(0, -2), targets.flatten(), ignore_index=-1
        ),
        gelu=F.gelu,
        linear=F.linear,
        embedding=F.embedding,
        rounded=lambda weight, dtype: weight.to(dtype),  # in each micro-step
    )
    return {name: own[name] for name in names}


# name: (folder, options of GPTConfig, compiled, recorded as a CUDA graph, functions switched off)
variants = {
    'reference, eager': ('nanoGPT', {}, False, False, ()),
    'reference, compiled': ('nanoGPT', {}, True, False, ()),
    'reference, compiled, no logits returned': ('nanoGPT', {'no_logits': True}, True, False, ()),
    'reference, compiled, cuda_graph': ('nanoGPT', {}, True, True, ()),
    'phase 2, no cuda_graph': ('phase2_triton', {}, False, False, ()),
    'cuda_graph, PyTorch only': (
        'phase2_triton',
        {},
        False,
        True,
        ('layer_norm', 'add_layer_norm', 'linear_cross_entropy', 'gelu', 'linear', 'embedding'),
    ),
    '+ cross-entropy in place of the logits': (
        'phase2_triton',
        {},
        False,
        True,
        ('layer_norm', 'add_layer_norm', 'gelu', 'linear', 'embedding', 'rounded'),
    ),
    '+ residual and LayerNorm in one': ('phase2_triton', {}, False, True, ('gelu', 'linear', 'embedding', 'rounded')),
    '+ GELU': ('phase2_triton', {}, False, True, ('linear', 'embedding', 'rounded')),
    '+ float32 weight gradients from the matmul': ('phase2_triton', {}, False, True, ('embedding', 'rounded')),
    "+ embedding adds to the head's gradient": ('phase2_triton', {}, False, True, ('rounded',)),
    '+ weights rounded once an iteration': ('phase2_triton', {}, False, True, ()),
    '+ half_residual': ('phase2_triton', {'half_residual': True}, False, True, ()),
    'loss_rows=4096': ('phase2_triton', {'half_residual': True, 'loss_rows': 4096}, False, True, ()),
}


class Sensors:
    """Samples of the GPU's clock (MHz) and power (W) while the benchmark runs, ten a second."""

    def __init__(self):
        gpu = f'GPU-{torch.cuda.get_device_properties(0).uuid}'  # by number it would be another one under CUDA_VISIBLE_DEVICES
        command = [
            'nvidia-smi',
            '-i',
            gpu,
            '--query-gpu=clocks.sm,power.draw',
            '--format=csv,noheader,nounits',
            '-lms',
            '100',
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.samples = []
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.samples.append((time.perf_counter(), *map(float, line.split(','))))

    def median(self, intervals):
        """Medians of clock and power over intervals of time.perf_counter(); None where there is no sample."""
        during = [sample[1:] for sample in list(self.samples) if any(a <= sample[0] <= b for a, b in intervals)]
        return [statistics.median(column) for column in zip(*during)] if during else [None, None]


class Variant:
    """One variant, ready to run: iteration() is an iteration of train.py. peak_bytes: of its memory, parameters and all."""

    def __init__(self, name, size, batches, micro_steps, seed=1337, warm=True):
        folder, options, compiled, graph, switched_off = variants[name]
        self.module, self.functions = load(folder, folder + str(id(self))), off(*switched_off)
        self.batches, self.micro_steps, self.turns = batches, micro_steps, []
        options = dict(options)
        no_logits = options.pop('no_logits', False)
        if compiled:
            torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.manual_seed(seed)
        with contextlib.redirect_stdout(None):
            self.model = self.module.GPT(
                self.module.GPTConfig(dropout=0.0, bias=False, **sizes[size], **options)
            ).cuda()
            self.optimizer = self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cuda')
        forward = (lambda x, y: (None, self.model(x, y)[1])) if no_logits else self.model
        forward = torch.compile(forward) if compiled else forward

        def forward_backward(x, y):
            with torch.autocast('cuda', dtype=torch.bfloat16):
                loss = forward(x, y)[1] / micro_steps
            loss.backward()
            return loss.detach()

        self.micro_step = MicroStep(forward_backward, self.model, capture=graph)
        began = time.perf_counter()
        with contextlib.redirect_stdout(None):
            self.loss = sum(self.iteration().item() for _ in range(3)) if warm else None
        self.start_s = time.perf_counter() - began
        self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def iteration(self):
        loss = torch.zeros((), device='cuda')
        with contextlib.ExitStack() as stack:
            for name, function in self.functions.items():
                for module in (self.module, kernels.modules, kernels.linear, kernels.cross_entropy):
                    if hasattr(module, name):
                        stack.enter_context(replaced(module, name, function))
            for _ in range(self.micro_steps):
                self.batches.append(self.batches.pop(0))
                loss += self.micro_step(*self.batches[0])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def ms(self, iterations):
        """Mean milliseconds of an iteration, after one that does not count."""
        self.iteration()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(iterations):
            self.iteration()
        torch.cuda.synchronize()
        self.turns.append((began, time.perf_counter()))
        return (self.turns[-1][1] - began) / iterations * 1e3


@contextlib.contextmanager
def replaced(module, name, function):
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def chosen(args, names):
    """The names, with --only those that have one of its parts."""
    return [name for name in names if not args.only or any(part in name for part in args.only.split(';'))]


def ladder(args, rows, save):
    use_side_stream('cuda')
    generator = torch.Generator('cuda').manual_seed(0)
    tokens = torch.randint(50257, (16, args.batch_size, 1025), device='cuda', generator=generator)
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    make = lambda name: Variant(name, args.size, list(batches), args.micro_steps)
    base, lines, sensors = make('reference, compiled'), [], Sensors()
    for name in chosen(args, variants):
        variant = None  # the one before goes, however it has ended, and with it its memory
        try:
            variant = base if name == 'reference, compiled' else make(name)
            pairs = [(base.ms(args.iterations), variant.ms(args.iterations)) for _ in range(args.repetitions)]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            lines.append(f'{name:42s} out of memory')
            continue
        ms, ratios = [own for _, own in pairs], [ref / own for ref, own in pairs]
        median, tokens_per_s = (
            statistics.median(ms),
            args.batch_size * 1024 * args.micro_steps / statistics.median(ms) * 1e3,
        )
        clock, power = sensors.median(variant.turns)
        rows.append(
            dict(
                name=name,
                ms=ms,
                ms_reference=[ref for ref, _ in pairs],
                tokens_per_s=tokens_per_s,
                ratio=statistics.median(ratios),
                ratios=ratios,
                peak_memory_bytes=variant.peak_bytes,
                clock_mhz=clock,
                power_w=power,
                start_s=variant.start_s,
                loss_of_3_iterations=variant.loss,
            )
        )
        lines.append(
            f'{name:42s} {median:8.2f} ms ({min(ms):.2f} to {max(ms):.2f}) {tokens_per_s:9,.0f} tokens/s x {statistics.median(ratios):.3f} '
            f'({min(ratios):.3f} to {max(ratios):.3f}) {variant.peak_bytes / 2**30:6.2f} GiB  start {variant.start_s:3.0f} s  '
            f'{clock or 0:.0f} MHz {power or 0:.0f} W  loss {variant.loss:.4f}'
        )
        print(lines[-1], flush=True)
        save()
    sensors.process.kill()
    return (
        f'{args.size}, {args.micro_steps} micro-steps of {args.batch_size} x 1024, {torch.cuda.get_device_name()}\n'
        + '\n'.join(lines)
    )


def largest(args, rows, save):
    """Peaks at two batch sizes give a guess, from which bisection finds one that fits while the next does not."""
    use_side_stream('cuda')
    memory = torch.cuda.get_device_properties(0).total_memory
    if args.gib:
        torch.cuda.set_per_process_memory_fraction(args.gib * 2**30 / memory)
        memory = args.gib * 2**30

    def tokens_per_s(name, batch_size):
        """And the peak in bytes; None if it does not fit."""
        tokens = torch.randint(50257, (batch_size, 1025), device='cuda')
        batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
        try:
            variant = Variant(name, args.size, batches, 1)
            return batch_size * 1024 / variant.ms(args.iterations) * 1e3, variant.peak_bytes
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            print(f'{name}, {batch_size} sequences: out of memory', flush=True)
            return None

    lines = []
    names = (
        'reference, eager',
        'reference, compiled',
        'reference, compiled, cuda_graph',
        '+ weights rounded once an iteration',
        '+ half_residual',
        'loss_rows=4096',
    )
    for name in chosen(args, names):
        tried = {}
        for double in (16, 8, 4, 2):  # the smaller ones where the others do not fit
            tried[double] = tokens_per_s(name, double)
            if tried[double]:
                break
        few = double // 2
        tried[few] = tried[double] and tokens_per_s(name, few)
        if not tried[few]:
            lines.append(f'{name:42s} not even 2 x 1024')
            print(lines[-1], flush=True)
            continue
        per_sequence = (tried[double][1] - tried[few][1]) / few
        fits, too_many = double, None
        batch_size = max(double + 1, int((0.97 * memory - tried[few][1]) / per_sequence) + few)
        while too_many != fits + 1:
            tried[batch_size] = tokens_per_s(name, batch_size)
            if tried[batch_size]:
                fits = batch_size
            else:
                too_many = batch_size
            batch_size = (fits + too_many) // 2 if too_many else fits + max(1, fits // 20)
        speed, peak = tried[fits]
        rows.append(
            dict(
                name=name, batch_size=fits, tokens_per_s=speed, peak_memory_bytes=peak, bytes_per_sequence=per_sequence
            )
        )
        lines.append(
            f'{name:42s} {fits:4d} x 1024 {speed:9,.0f} tokens/s {peak / 2**30:6.2f} GiB, {per_sequence / 2**20:,.0f} MiB a sequence'
        )
        print(lines[-1], flush=True)
        save()
    return f'{args.size}, {torch.cuda.get_device_name()}, {memory / 2**30:.1f} GiB\n' + '\n'.join(lines)


def profile(args, rows, save):
    use_side_stream('cuda')
    tokens = torch.randint(50257, (16, args.batch_size, 1025), device='cuda')
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    lines = []
    three = ('reference, compiled', '+ weights rounded once an iteration', '+ half_residual')
    for name in chosen(args, variants if args.only else three):
        variant = Variant(name, args.size, list(batches), args.micro_steps)
        for _ in range(20):  # until the clock has settled
            variant.iteration()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(args.iterations):
                variant.iteration()
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        count, by_name = args.iterations * args.micro_steps, {}
        for event in kernels:
            by_name.setdefault(event.name, []).append(event.time_range.elapsed_us())
        span = max(event.time_range.end for event in kernels) - min(event.time_range.start for event in kernels)
        table = sorted(([sum(us) / count, len(us) / count, kernel] for kernel, us in by_name.items()), reverse=True)
        rows.append(dict(name=name, ms=sum(us for us, _, _ in table) / 1e3, span_ms=span / count / 1e3, kernels=table))
        lines.append(f'{name}: {rows[-1]["ms"]:.2f} ms of kernels in a micro-step of {rows[-1]["span_ms"]:.2f} ms')
        lines += [f'{us:9.1f} us {times:6.1f} x  {kernel[:100]}' for us, times, kernel in table if us > 10]
        save()
        del variant
    return '\n'.join(lines)


def curves(args, rows, save):
    use_side_stream('cuda')
    data = torch.from_numpy(
        np.fromfile(root / 'nanoGPT' / 'data' / 'python_gpt2' / 'train.bin', np.uint16).astype(np.int64)
    ).cuda()
    kinds = {
        'reference': 'reference, compiled',
        'phase 2': '+ weights rounded once an iteration',  # with all of its kernels
        'phase 2, half_residual': '+ half_residual',
    }
    for seed in args.seeds:
        for kind in chosen(args, kinds):
            torch.manual_seed(seed)
            starts = torch.randint(len(data) - 1025, (args.curve_steps, args.batch_size, 1), device='cuda')
            train = Variant(
                kinds[kind],
                args.size,
                [(data[:1024].expand(args.batch_size, -1).contiguous(),) * 2],
                1,
                seed,
                warm=False,
            )
            losses = []
            for i, start in enumerate(starts):
                batch = data[start + torch.arange(1025, device='cuda')]
                train.batches[0] = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
                for group in train.optimizer.param_groups:
                    group['lr'] = 6e-4 * min(1.0, (i + 1) / 100)
                losses.append(train.iteration())
            rows.append(dict(kind=kind, seed=seed, losses=[round(loss, 5) for loss in torch.stack(losses).tolist()]))
            save()
            print(f'{kind}, seed {seed}: last 100 steps {statistics.fmean(rows[-1]["losses"][-100:]):.4f}', flush=True)
            del train
    return compared(rows)


def compared(rows):
    """What curves say: how far phase 2 is from the reference at the same seed, beside how far the reference's own seeds are apart."""
    curves = {(row['kind'], row['seed']): row['losses'] for row in rows}
    # means of 25 steps, so that batches do not hide the models; each seed has its own batches, the same for all kinds
    smooth = {key: torch.tensor(losses).unfold(0, 25, 25).mean(-1) for key, losses in curves.items()}
    seeds = sorted(seed for kind, seed in curves if kind == 'reference')
    lines = []
    if len(seeds) > 1:
        noise = torch.stack(
            [smooth['reference', a] - smooth['reference', b] for a in seeds for b in seeds if b < a]
        ).abs()
        lines.append(f'between seeds of the reference: mean {noise.mean():.4f}, largest {noise.max():.4f}')
    for kind in sorted({kind for kind, _ in curves} - {'reference'}):
        both = [seed for seed in seeds if (kind, seed) in curves]
        if both:
            apart = torch.stack([smooth[kind, seed] - smooth['reference', seed] for seed in both])
            last = [
                statistics.fmean(curves[kind, s][-100:]) - statistics.fmean(curves['reference', s][-100:]) for s in both
            ]
            lines.append(
                f'{kind} - reference at the same seed: mean {apart.mean():+.4f}, mean size {apart.abs().mean():.4f}, '
                f'largest {apart.abs().max():.4f}; last 100 steps: {", ".join(f"{d:+.4f}" for d in last)}'
            )
    return '\n'.join(lines)


# the tables


def shown(name):
    """Returns a variant's name as the documents have it; result files keep the one of their day."""
    return name.replace('phase 2', 'Triton').replace('cuda_graph', 'CUDA graph')


def work_of(report):
    """Returns size, sequences in a micro-step and micro-steps; the first files do not say."""
    return report.get('size', '124M'), report.get('batch_size', 12), report.get('micro_steps', 8)


def speed_of(row, report, ms):
    """Returns tokens/s for milliseconds of an iteration: {'median', 'min', 'max'}."""
    _, batch_size, micro_steps = work_of(report)
    tokens = batch_size * 1024 * micro_steps
    return dict(median=tokens / statistics.median(ms) * 1e3, min=tokens / max(ms) * 1e3, max=tokens / min(ms) * 1e3)


def changes(report):
    """Returns the ladder's rows {short name: row}: the references, the last change of the Triton step, and half_residual."""
    rows = {row['name']: row for row in report['rows']}
    steps = [name for name in rows if name.startswith('+ ') and name != '+ half_residual']
    names = {
        'reference, eager': 'reference, eager',
        'reference, compiled': 'reference, compiled',
        'reference, CUDA graph': 'reference, compiled, cuda_graph',
        'Triton': steps[-1] if steps else '',
        'Triton, 16-bit residual': '+ half_residual',
    }
    return {label: rows[name] for label, name in names.items() if name in rows}


@table('phase2_ladder_*')
def phase2_ladder(report):
    size, batch_size, micro_steps = work_of(report)
    cells = []
    for row in report['rows']:
        ms = row['ms']
        speed, base = speed_of(row, report, ms), speed_of(row, report, row['ms_reference'])
        spread = f'{statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})'
        numbers = (f'{speed["median"]:,.0f}', f'{base["median"]:,.0f}', times(speed, base))
        cells.append((shown(row['name']), spread, *numbers, gib(row['peak_memory_bytes'])))
    header = [f'{size}, {micro_steps} micro-steps of {batch_size} × 1024', 'ms of an iteration', 'tokens/s']
    return markdown([*header, 'compiled reference in the same turns', '× the reference', 'peak, GiB'], cells)


@table('phase2_ladder_*', together=True)
def measured(reports):
    """README's table of one GPU: the ladders of the usual work."""
    rows = []
    for file, report in reports.items():
        if work_of(report) != ('124M', 12, 8):
            continue
        its = changes(report)
        graph = its.get('reference, CUDA graph')
        for label, row in its.items():
            if label == 'reference, eager':
                continue
            speed, base = speed_of(row, report, row['ms']), speed_of(row, report, row['ms_reference'])
            of_graph = (
                times(speed, speed_of(graph, report, graph['ms'])) if graph and label.startswith('Triton') else ''
            )
            ratio = times(speed, base) if label != 'reference, compiled' else ''
            numbers = (f'{speed["median"]:,.0f}', f'{base["median"]:,.0f}', ratio, of_graph)
            where = f'{cite(file)}, {commit_of(report)}'
            rows.append((label, short(report), *numbers, gib(row['peak_memory_bytes'], 1), where))
    header = ['', 'GPU', 'tokens/s', 'compiled reference in the same turns', '× that', '× reference with CUDA graph']
    return markdown([*header, 'peak, GiB', 'result file'], rows)


def ladder_in_short():
    """Returns {short name: thousands of tokens/s} on one H100."""
    rows = changes(tables.load('phase2_ladder_h100'))
    return {label: row['tokens_per_s'] / 1000 for label, row in rows.items()}


@table('phase2_curves_*')
def phase2_curves(report):
    return f'```\n{shown(chr(10).join(report["summary"]))}\n```' if 'summary' in report else ''


@table('phase2_profile_*')
def phase2_profile(report):
    """The kernels that take more than 0.1 ms of a micro-step."""
    blocks = []
    for row in report['rows']:
        name = shown(row['name'])
        blocks.append(f'{name}: {row["ms"]:.2f} ms of kernels in a micro-step of {row["span_ms"]:.2f} ms')
        kernels = [(us / 1e3, times, kernel[:60].replace('|', '/')) for us, times, kernel in row['kernels'] if us > 100]
        blocks.append(markdown(['ms', 'times', 'kernel'], [(f'{a:.2f}', f'{b:.1f}', f'`{c}`') for a, b, c in kernels]))
    return '\n\n'.join(blocks)


@table('phase2_largest_*')
def phase2_largest(report):
    cells = [
        (
            shown(row['name']),
            row['batch_size'],
            f'{row["tokens_per_s"]:,.0f}',
            gib(row['peak_memory_bytes'], 1),
            f'{row["bytes_per_sequence"] / 2**20:,.0f}',
        )
        for row in report['rows']
    ]
    limit = f' in {report["gib"]:g} GiB' if report.get('gib') else ''
    header = [f'the most that fits into a micro-step{limit}', 'sequences of 1024', 'tokens/s', 'peak, GiB']
    return markdown([*header, 'MiB a sequence'], cells)


@number
def largest_batch(file, *name):
    """Sequences of 1024 tokens that fit into a micro-step of the variant whose name ends with these words."""
    rows = tables.load(file)['rows']
    return str(next(row['batch_size'] for row in rows if row['name'].endswith(' '.join(name))))


def join(names):
    """One report of the curves in several files, such as those of two GPUs that have shared the work."""
    reports = [json.loads(Path(name).read_text()) for name in names]
    for key in ('device', 'versions', 'size', 'batch_size', 'micro_steps'):
        if any(report.get(key) != reports[0].get(key) for report in reports):
            sys.exit(f'bench_phase2.py: --join: the files differ in {key}')
    command = ' & '.join(report['command'] for report in reports)
    return {**reports[0], 'command': command, 'rows': [row for report in reports for row in report['rows']]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', choices=['ladder', 'curves', 'largest', 'profile'])
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument('--batch_size', type=int, default=12)
    parser.add_argument('--micro_steps', type=int, default=8)
    parser.add_argument('--size', choices=list(sizes), default='124M')
    parser.add_argument('--iterations', type=int, default=3, help='timed or profiled together')
    parser.add_argument('--repetitions', type=int, default=5, help='turns of every variant')
    parser.add_argument('--only', default='', help='semicolon-separated parts of the names of variants')
    parser.add_argument(
        '--seeds',
        type=lambda text: [int(seed) for seed in text.split(',')],
        default=[0, 1, 2],
        help='of the curves: 0,1,2',
    )
    parser.add_argument('--join', default='', help='curves: run nothing, but join these comma-separated result files')
    parser.add_argument('--curve_steps', type=int, default=1000)
    parser.add_argument(
        '--gib',
        type=float,
        default=0,
        help='largest: of a GPU with this much memory for PyTorch, such as 78.5 for one of 80 GB',
    )
    args = parser.parse_args()
    if args.join:
        report = join(args.join.split(','))
        report['summary'] = compared(report['rows']).splitlines()
        write_json(args.out, report)
        print('\n'.join(report['summary']))
        return
    if not torch.cuda.is_available():
        sys.exit('bench_phase2.py: a benchmark of training on a GPU needs a CUDA GPU')
    hardware.resolve_auto('cuda', 'auto', 'auto', 'auto')  # sets up the GPU's memory as train.py does
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py
    args.micro_steps = args.micro_steps if args.mode in ('ladder', 'profile') else 1
    report = {
        **facts(),
        **{key: getattr(args, key) for key in ('size', 'batch_size', 'micro_steps', 'gib')},
        'rows': [],
    }
    text = dict(ladder=ladder, curves=curves, largest=largest, profile=profile)[args.mode](
        args, report['rows'], lambda: write_json(args.out, report)
    )
    report['summary'] = text.splitlines()
    write_json(args.out, report)
    print(text)


if __name__ == '__main__':
    main()
