"""
Phase 2's model against the reference's on one GPU, in one process: speed of training GPT-2, and loss curves.

    python benchmarks/bench_phase2.py ladder --out=benchmarks/results/phase2_ladder.json    # about 3 minutes on an H200
    python benchmarks/bench_phase2.py ladder --only='compiled;half_residual' --batch_size=32 --out=...
    python benchmarks/bench_phase2.py curves --out=benchmarks/results/phase2_curves.json    # about 5 minutes; needs data/python_gpt2
    python benchmarks/bench_phase2.py largest --out=benchmarks/results/phase2_largest.json  # about 5 minutes
    python benchmarks/bench_phase2.py profile --out=benchmarks/results/phase2_profile.json  # about 1 minute
    python benchmarks/bench_phase2.py gradients --batch_size=2 --out=benchmarks/results/phase2_gradients.json  # about 1 minute
    python benchmarks/bench_phase2.py matmuls --out=benchmarks/results/phase2_matmuls.json  # about 10 seconds

ladder: tokens/s of train.py's iteration (bfloat16 autocast, 8 micro-steps of 12 x 1024 random tokens, clipping, fused AdamW) with one change
after the other. Each variant takes turns with the compiled reference, five times; its ratio is the median of those of the turns. With
--together=6, five variants at a time take turns with it, which compares them better and needs memory for six. Clock and power are
nvidia-smi's during its own turns: a GPU at its power limit slows down, and the more the better it is used.
gradients: those of one micro-step against float64.
matmuls: each matmul of the model by cuBLAS and by cuBLASLt, in turns: where the table in kernels/linear.py comes from.
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
from common import facts, write_json
from torch.nn import functional as F

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'phase2_triton'))
from cuda_graph import MicroStepGraph, use_side_stream
from errors import out_of_memory
from step_guard import clip_gradients

import hardware
import kernels.attention
import kernels.cross_entropy
import kernels.embedding
import kernels.layer_norm_gradients
import kernels.linear
import kernels.modules


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
        total = x if branch is None else x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)

    own = dict(
        add_layer_norm=add_layer_norm,
        linear_cross_entropy=lambda x, weight, targets, **_: F.cross_entropy(
            F.linear(x, weight).flatten(0, -2), targets.flatten(), ignore_index=-1
        ),
        gelu=F.gelu,
        linear=F.linear,
        embeddings=lambda idx, wte, wpe, dtype=None, use_triton=True: embeddings(idx, wte, wpe, dtype, False),
        scaled=lambda x, scale, out=None: torch.mul(x, scale, out=out),
        may_wait=lambda *_: False,
        packed_plan=lambda *_: None,
        takes_cublaslt=lambda *_: False,
        clip=None,
        rounded=lambda weight, dtype: weight.to(dtype),  # in each micro-step
    )
    return {name: own[name] for name in names}


def steps():
    """(name, functions switched off) of the model with one change after the other."""
    changes = [
        ('+ cross-entropy in place of the logits', 'linear_cross_entropy'),
        ('+ residual and LayerNorm in one', 'add_layer_norm'),
        ('+ GELU', 'gelu'),
        ('+ float32 weight gradients from the matmul', 'linear'),
        ("+ embeddings in one, added to the head's gradient", 'embeddings'),
        ('+ weights rounded once an iteration', 'rounded'),
        ('+ scaling of the loss by a kernel', 'scaled'),
        ('+ LayerNorm gradients summed together', 'may_wait'),
        ("+ attention's gradients packed by cuDNN", 'packed_plan'),
        ('+ cuBLASLt where it is faster', 'takes_cublaslt'),
        ('+ clipping by AdamW', 'clip'),
    ]
    later = ' '.join(names for _, names in changes)
    yield 'cuda_graph, PyTorch only', tuple(later.split())
    for name, names in changes:
        later = later.removeprefix(names).lstrip()
        yield name, tuple(later.split())


# name: (folder, options of GPTConfig, compiled, recorded as a CUDA graph, functions switched off)
variants = {
    'reference, eager': ('nanoGPT', {}, False, False, ('clip',)),
    'reference, compiled': ('nanoGPT', {}, True, False, ('clip',)),
    'reference, compiled, no logits returned': ('nanoGPT', {'no_logits': True}, True, False, ('clip',)),
    'reference, compiled, cuda_graph': ('nanoGPT', {}, True, True, ('clip',)),
    'phase 2, no cuda_graph': ('phase2_triton', {}, False, False, ()),
    **{name: ('phase2_triton', {}, False, True, switched_off) for name, switched_off in steps()},
    '+ half_residual': ('phase2_triton', {'half_residual': True}, False, True, ()),
    'loss_rows=4096': ('phase2_triton', {'half_residual': True, 'loss_rows': 4096}, False, True, ()),
}


embeddings = kernels.embedding.embeddings
kernel_modules = [module for name, module in sys.modules.items() if name.startswith('kernels.')]


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
            with torch.device('cuda'):  # the initial weights of 1.5 billion parameters would take the CPU half a minute
                self.model = self.module.GPT(self.module.GPTConfig(dropout=0.0, bias=False, **sizes[size], **options))
            self.optimizer = self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cuda')
        forward = (lambda x, y: (None, self.model(x, y)[1])) if no_logits else self.model
        forward = torch.compile(forward) if compiled else forward

        def forward_backward(x, y):
            with torch.autocast('cuda', dtype=torch.bfloat16):
                loss = forward(x, y)[1] / micro_steps
            loss.backward()
            return loss.detach()

        self.scaler = torch.amp.GradScaler('cuda', enabled=False)
        self.micro_step = MicroStepGraph(forward_backward, self.model) if graph else forward_backward
        began = time.perf_counter()
        with contextlib.redirect_stdout(None):
            self.loss = sum(self.iteration().item() for _ in range(3)) if warm else None
        self.start_s = time.perf_counter() - began
        self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def iteration(self):
        loss = torch.zeros((), device='cuda')
        with self.switched_off():
            for _ in range(self.micro_steps):
                self.batches.append(self.batches.pop(0))
                loss += self.micro_step(*self.batches[0])
        if 'clip' in self.functions:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        else:
            clip_gradients(self.optimizer, list(self.model.parameters()), 1.0, self.scaler)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    @contextlib.contextmanager
    def switched_off(self):
        """With PyTorch's functions instead of those that the variant does without."""
        with contextlib.ExitStack() as stack:
            for name, function in self.functions.items():
                for module in (self.module, *kernel_modules):
                    if hasattr(module, name):
                        stack.enter_context(replaced(module, name, function))
            yield

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
    base, lines, sensors, names = make('reference, compiled'), [], Sensors(), chosen(args, variants)
    for first in range(0, len(names), args.together - 1):
        group = None  # the variants before are dropped, and with them their memory
        try:
            group = {
                name: base if name == 'reference, compiled' else make(name)
                for name in names[first : first + args.together - 1]
            }
            turns = []
            for _ in range(args.repetitions):
                reference = base.ms(args.iterations)
                turns.append((reference, [variant.ms(args.iterations) for variant in group.values()]))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            lines.append(f'{", ".join(names[first : first + args.together - 1])}: out of memory')
            print(lines[-1], flush=True)
            continue
        for i, (name, variant) in enumerate(group.items()):
            ms, ratios = [own[i] for _, own in turns], [reference / own[i] for reference, own in turns]
            median = statistics.median(ms)
            tokens_per_s = args.batch_size * 1024 * args.micro_steps / median * 1e3
            clock, power = sensors.median(variant.turns)
            rows.append(
                dict(
                    name=name,
                    ms=ms,
                    ms_reference=[reference for reference, _ in turns],
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
                f'{name:50s} {median:8.2f} ms ({min(ms):.2f} to {max(ms):.2f}) {tokens_per_s:9,.0f} tokens/s '
                f'x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) {variant.peak_bytes / 2**30:6.2f} GiB  '
                f'start {variant.start_s:3.0f} s  {clock or 0:.0f} MHz {power or 0:.0f} W  loss {variant.loss:.4f}'
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
        '+ clipping by AdamW',
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
    three = ('reference, compiled', '+ clipping by AdamW', '+ half_residual')
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


def matmuls(args, rows, save):
    """Forward, dx and dw (added to float32) of each weight, by both libraries in turns; medians of CUDA-graph replays of 12 calls."""
    from bench_layer_norm import graph_us

    C, M, lines = sizes[args.size]['n_embd'], args.batch_size * 1024, []
    random = lambda *shape: torch.randn(*shape, device='cuda').bfloat16()
    weights = {'qkv': (3 * C, C), 'proj': (C, C), 'fc': (4 * C, C), 'proj2': (C, 4 * C), 'head': (50304, C)}
    for name, (out, into) in weights.items():
        w, x, dy, dw = random(out, into), random(M, into), random(M, out), torch.zeros(out, into, device='cuda')
        calls = {
            'forward': lambda x=x, w=w: x @ w.t(),
            'dx': lambda dy=dy, w=w: dy @ w,
            'dw': lambda dy=dy, x=x, dw=dw: torch.addmm(dw, dy.t(), x, out_dtype=torch.float32, out=dw),
        }
        for kind, call in calls.items():
            us = {'cublas': [], 'cublaslt': []}
            for _ in range(args.repetitions):
                for library, context in (('cublas', contextlib.nullcontext), ('cublaslt', kernels.linear.cublaslt)):
                    with context():
                        us[library].append(graph_us([call] * (12 if name != 'head' else 3))[0])
            medians = {library: statistics.median(values) for library, values in us.items()}
            rows.append(dict(weight=name, shape=[out, into], tokens=M, kind=kind, us=us))
            lines.append(
                f'{name:6s} {kind:8s} {medians["cublas"]:8.1f} us by cublas ({min(us["cublas"]):.1f} to {max(us["cublas"]):.1f})  '
                f'{medians["cublaslt"]:8.1f} by cublaslt ({min(us["cublaslt"]):.1f} to {max(us["cublaslt"]):.1f})  '
                f'{medians["cublaslt"] / medians["cublas"]:.3f}  {2 * M * out * into / medians["cublas"] / 1e6:.0f} TFLOP/s'
            )
            save()
    return f'{args.size}, {M} tokens\n' + '\n'.join(lines)


def gradients(args, rows, save):
    """Gradients of one micro-step in bfloat16 against the reference's in float64: the relative error of each parameter's, by norm."""
    tokens = torch.randint(
        50257, (args.batch_size, 1025), device='cuda', generator=torch.Generator('cuda').manual_seed(0)
    )
    batches, all_errors, lines = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())], {}, []
    truth = Variant('reference, eager', args.size, list(batches), 1, warm=False).model.double()
    truth(*batches[0])[1].backward()
    exact = {name: p.grad.cpu() for name, p in truth.named_parameters()}
    del truth
    for name in ('reference, eager', 'reference, compiled', '+ clipping by AdamW', '+ half_residual'):
        variant = Variant(name, args.size, list(batches), 1, warm=False)
        for _ in range(5):  # the last is a replay, where the variant has CUDA graphs
            variant.model.zero_grad(set_to_none=True)
            with variant.switched_off():
                variant.micro_step(*batches[0])
        errors = {
            k: ((p.grad.double() - exact[k].cuda()).norm() / exact[k].norm()).item()
            for k, p in variant.model.named_parameters()
        }
        all_errors[name] = errors
        ratios = [errors[k] / all_errors['reference, compiled'][k] for k in errors] if len(all_errors) > 1 else [1.0]
        rows.append(dict(name=name, errors=errors))
        lines.append(
            f'{name:28s} mean error {statistics.fmean(errors.values()):.2e}, largest {max(errors.values()):.2e}; of the compiled '
            f"reference's {statistics.median(ratios):.3f} in the median, at most {max(ratios):.3f}"
        )
        save()
    return '\n'.join(lines)


def curves(args, rows, save):
    use_side_stream('cuda')
    data = torch.from_numpy(
        np.fromfile(root / 'nanoGPT' / 'data' / 'python_gpt2' / 'train.bin', np.uint16).astype(np.int64)
    ).cuda()
    kinds = {
        'reference': 'reference, compiled',
        'phase 2': '+ clipping by AdamW',  # with all of its kernels
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


def join(names):
    """One report of the curves in several files, such as those of two GPUs that have shared the work."""
    reports = [json.loads(Path(name).read_text()) for name in names]
    for key in ('device', 'versions', 'size', 'batch_size', 'micro_steps'):
        if any(report.get(key) != reports[0].get(key) for report in reports):
            sys.exit(f'bench_phase2.py: --join: the files differ in {key}')
    command = ' & '.join(report['command'] for report in reports)
    return {**reports[0], 'command': command, 'rows': [row for report in reports for row in report['rows']]}


def main():
    modes = dict(ladder=ladder, curves=curves, largest=largest, profile=profile, matmuls=matmuls, gradients=gradients)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', choices=list(modes))
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument('--batch_size', type=int, default=12)
    parser.add_argument('--micro_steps', type=int, default=8)
    parser.add_argument('--size', choices=list(sizes), default='124M')
    parser.add_argument('--iterations', type=int, default=3, help='timed or profiled together')
    parser.add_argument('--repetitions', type=int, default=5, help='turns of every variant')
    parser.add_argument(
        '--together', type=int, default=2, help='ladder: models in memory at a time, with the reference'
    )
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
    hardware.choose('cuda', 'auto', 'auto', 'auto')  # sets up the GPU's memory as train.py does
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py
    args.micro_steps = args.micro_steps if args.mode in ('ladder', 'profile') else 1
    report = {
        **facts(),
        **{key: getattr(args, key) for key in ('size', 'batch_size', 'micro_steps', 'gib')},
        'rows': [],
    }
    text = modes[args.mode](args, report['rows'], lambda: write_json(args.out, report))
    report['summary'] = text.splitlines()
    write_json(args.out, report)
    print(text)


if __name__ == '__main__':
    main()
