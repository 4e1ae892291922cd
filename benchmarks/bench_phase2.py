"""
Compares the Triton model with the reference's on one GPU, in one process: speed of training GPT-2, memory, gradients,
loss curves.

    python benchmarks/bench_phase2.py ladder --out=ladder.json                # about 3 minutes on an H200
    python benchmarks/bench_phase2.py ladder --only='compiled;half_residual' --batch_size=32 --out=...
    python benchmarks/bench_phase2.py ladder --nanogpt=$HOME/nanoGPT --together=8 --out=...  # upstream in each turn
    python benchmarks/bench_phase2.py ladder --only='+ half_residual;fp8' --together=7 --out=fp8_ladder.json
    python benchmarks/bench_phase2.py ladder --dry-run --out=ladder.json      # tiny, on a CPU; gradients --dry-run too
    python benchmarks/bench_phase2.py curves --out=phase2_curves.json         # 5 minutes; needs data/python_gpt2
    python benchmarks/bench_phase2.py curves --only='Triton, half_residual;Triton, fp8' --curve_steps=1500 --out=...
    python benchmarks/bench_phase2.py largest --out=phase2_largest.json       # about 5 minutes
    python benchmarks/bench_phase2.py profile --out=phase2_profile.json       # about 1 minute
    python benchmarks/bench_phase2.py gradients --batch_size=2 --out=...      # about 1 minute
    python benchmarks/bench_phase2.py matmuls --out=phase2_matmuls.json       # about 10 seconds
    python benchmarks/bench_phase2.py hopper --out=phase2_hopper.json         # about 10 seconds
    python benchmarks/bench_phase2.py fp8 --out=fp8_matmuls.json              # about 10 seconds
    python benchmarks/bench_phase2.py widths --out=phase2_widths.json         # about 20 seconds

ladder: tokens/s of train.py's iteration (trainer.py; bfloat16 autocast, 8 micro-steps of 12 x 1024 random tokens,
clipping, fused AdamW) with one change after the other. Each variant takes turns with the compiled reference, five
times. With --together=6, five variants at a time take turns with it, which compares them better and needs memory for
six. With --nanogpt, upstream's model takes its turn with them, in the same training step. nvidia-smi reports clock and
power during each variant's own turns: at its power limit, a GPU lowers its clock, and a busier GPU lowers it more.
gradients: those of one micro-step against float64.
matmuls: each matmul of the model by cuBLAS and by cuBLASLt, in turns: where the table in kernels/linear.py comes from.
hopper: the model's matmuls by cuBLAS and by the Gluon matmul, the output layer's also with the loss.
fp8: each matmul of the forward and of the input gradients in bfloat16 and in FP8, and kernels that only quantize.
widths: the matmuls of 1.5B, whose 1,600 columns are not a multiple of 128, and those of a model with 1,664 columns.
largest: the most sequences of 1024 tokens in a micro-step that fit into the GPU's memory, found by bisection, and
tokens/s with them.
profile: where the time of a micro-step goes, by kernel, the optimizer's share included.
curves: 1,000 steps of GPT-2 124M on the sources of Python's standard library, three seeds, for the reference and
Triton.
"""

import argparse
import contextlib
import functools
import json
import math
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import ROOT, facts, output_of, write_json
from tables import cite, commit_of, gib, load, markdown, number, short, table, times, with_spread
from trainer import SIZES, Trainer, collect, hardware, out_of_memory, use_side_stream

sys.path.append(str(ROOT / 'phase2_triton'))
import kernels.attention
import kernels.cross_entropy
import kernels.embedding
import kernels.fp8
import kernels.fp8_linear
import kernels.layer_norm_gradients
import kernels.linear
import kernels.modules

device = 'cuda'  # 'cpu' with --dry-run
BLOCK_SIZE = {'cuda': 1024, 'cpu': 32}


def clip_gradients(optimizer, parameters, max_norm):
    """
    Clips gradients through fused AdamW's grad_scale, which divides each gradient as AdamW reads it and so saves a pass
    over all gradients. Returns their norm. The gain was within the spread, so train.py clips as usual (NOTEBOOK.md).
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)
    return norm


def off(*names):
    """Returns PyTorch's own functions for the named ones of the kernel package, as {name: function}."""

    def add_layer_norm(x, branch, weight, bias, eps, dtype, *slots):
        total = x if branch is None else x + branch
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)

    own = dict(
        add_layer_norm=add_layer_norm,
        linear_cross_entropy=lambda x, weight, targets, **_: F.cross_entropy(
            F.linear(x, weight).flatten(0, -2), targets.flatten(), ignore_index=-1
        ),
        gelu=lambda x, approximate='none', *slots: F.gelu(x, approximate=approximate),
        linear=F.linear,
        embeddings=lambda idx, wte, wpe, dtype=None, use_triton=True: embeddings(idx, wte, wpe, dtype, False),
        scaled=lambda x, scale, out=None: torch.mul(x, scale, out=out),
        may_wait=lambda *_: False,
        packed_plan=lambda *_: None,
        takes_cublaslt=lambda *_: False,
        supports=lambda *_: False,  # exp_cross_entropy's: whether exponentials can be written
        clip=None,
        rounded=lambda weight, dtype: weight.to(dtype),  # in each micro-step
    )
    return {name: own[name] for name in names}


TRITON = '+ exponentials written by the last matmul'  # the last change: the Triton model as train.py runs it
UPSTREAM = 'upstream nanoGPT, compiled'


def steps():
    """Returns (name, functions switched off) of the model with one change after the other."""
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
        (TRITON, 'supports'),
    ]
    later = [name for _, name in changes]
    yield 'cuda_graph, PyTorch only', (*later, 'clip')
    for i, (name, _) in enumerate(changes):
        yield name, (*later[i + 1 :], 'clip')


# name: (folder, options of GPTConfig, compiled, recorded as a CUDA graph, functions switched off)
variants = {
    'reference, eager': ('nanoGPT', {}, False, False, ('clip',)),
    'reference, compiled': ('nanoGPT', {}, True, False, ('clip',)),
    'reference, compiled, no logits returned': ('nanoGPT', {'no_logits': True}, True, False, ('clip',)),
    'reference, compiled, cuda_graph': ('nanoGPT', {}, True, True, ('clip',)),
    'phase 2, no cuda_graph': ('phase2_triton', {}, False, False, ('clip',)),
    **{name: ('phase2_triton', {}, False, True, switched_off) for name, switched_off in steps()},
    'not kept: clipping by AdamW': ('phase2_triton', {}, False, True, ()),
    '+ half_residual': ('phase2_triton', {'half_residual': True}, False, True, ('clip',)),
    'fp8': ('phase2_triton', {'half_residual': True, 'fp8': True}, False, True, ('clip',)),
    'fp8, blocks alone': ('phase2_triton', {'half_residual': True, 'fp8': 'blocks'}, False, True, ('clip',)),
    'fp8, head alone': ('phase2_triton', {'half_residual': True, 'fp8': 'head'}, False, True, ('clip',)),
    'fp8, without kernels of its own': (
        'phase2_triton',
        {'half_residual': True, 'fp8': math.inf},
        False,
        True,
        ('clip',),
    ),
    'fp8, every matmul': ('phase2_triton', {'half_residual': True, 'fp8': 0}, False, True, ('clip',)),
    'loss_rows=4096': ('phase2_triton', {'half_residual': True, 'loss_rows': 4096}, False, True, ('clip',)),
}


embeddings = kernels.embedding.embeddings
kernel_modules = [module for name, module in sys.modules.items() if name.startswith('kernels.')]


class Sensors:
    """Samples of the GPU's clock (MHz) and power (W) while the benchmark runs, ten a second."""

    def __init__(self):
        self.samples, self.process = [], None
        if device == 'cpu':
            return
        # by number it would be another one under CUDA_VISIBLE_DEVICES
        gpu = f'GPU-{torch.cuda.get_device_properties(0).uuid}'
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
        threading.Thread(target=self.read, daemon=True).start()

    def stop(self):
        if self.process:
            self.process.kill()

    def read(self):
        for line in self.process.stdout:
            self.samples.append((time.perf_counter(), *map(float, line.split(','))))

    def median(self, intervals):
        """Medians of clock and power over intervals of time.perf_counter(); None where there is no sample."""
        during = [sample[1:] for sample in list(self.samples) if any(a <= sample[0] <= b for a, b in intervals)]
        return [statistics.median(column) for column in zip(*during)] if during else [None, None]


class Variant(Trainer):
    """
    One variant, ready to run. batches: pairs (X, Y), which it takes in turn. peak_bytes: the peak of its memory,
    parameters included.
    """

    def __init__(self, name, size, batches, micro_steps, seed=1337, warm=True):
        folder, options, compiled, graph, switched_off = variants[name]
        self.functions, self.batches, self.turns = off(*switched_off), batches, []
        options = dict(options)
        options['logits'] = not options.pop('no_logits', False)
        fp8 = options.pop('fp8', None)
        if fp8 is not None:
            options['fp8'] = True
        min_width = fp8 if type(fp8) in (int, float) else kernels.fp8_linear.OWN_KERNEL_MIN_WIDTH
        options |= dict(model=folder, compile=compiled and device == 'cuda', cuda_graph=graph and device == 'cuda')
        collect()
        shape, (batch_size, block_size) = SIZES[size], batches[0][0].shape
        options |= dict(batch_size=batch_size, block_size=block_size, seed=seed, init='gpu')
        with replaced(kernels.fp8_linear, 'OWN_KERNEL_MIN_WIDTH', min_width):
            super().__init__('ddp', shape | dict(vocab_size=50304, dropout=0.0), device, **options)
        if isinstance(fp8, str):  # the other part stays in bfloat16
            head = [self.raw_model.lm_head, self.raw_model.transformer.ln_f]
            modules = head if fp8 == 'blocks' else self.raw_model.transformer.h.modules()
            layers = [layer for module in modules if (layer := getattr(module, 'fp8', None))]
            for module in self.raw_model.modules():
                for name in ('fp8', 'fp8_before'):
                    if getattr(module, name, None) in layers:
                        setattr(module, name, None)
        self.feed(Variant.take)
        self.per_iteration, began = micro_steps, time.perf_counter()
        self.loss = sum(self.iteration().item() for _ in range(3)) if warm else None
        self.start_s = time.perf_counter() - began
        self.peak_bytes = torch.cuda.max_memory_allocated() - self.base_bytes if device == 'cuda' else 0

    def iteration(self):
        """Returns the mean loss, shape (), on the device."""
        return self.step(self.per_iteration)

    def take(self):
        self.batches.append(self.batches.pop(0))
        return self.batches[0]

    def forward_backward(self, X, Y):
        with self.switched_off():
            return super().forward_backward(X, Y)

    def clip_and_step(self):
        if 'clip' in self.functions or device == 'cpu':
            return super().clip_and_step()
        self.grad_norm = clip_gradients(self.optimizer, list(self.model.parameters()), 1.0)
        self.step_guard.step(self.optimizer, self.grad_norm)

    @contextlib.contextmanager
    def switched_off(self):
        """Replaces the kernels' functions that the variant does not use with PyTorch's."""
        with contextlib.ExitStack() as stack:
            for name, function in self.functions.items():
                modules = [module for module in (self.module, *kernel_modules) if hasattr(module, name)]
                assert modules or name == 'clip', f'no module has a function {name}'
                for module in modules:
                    stack.enter_context(replaced(module, name, function))
            yield

    def ms(self, iterations):
        """Returns the mean milliseconds of an iteration, after one that does not count."""
        self.iteration()
        began = hardware.now(device)  # waits for the GPU
        for _ in range(iterations):
            self.iteration()
        ended = hardware.now(device)
        self.turns.append((began, ended))
        return (ended - began) / iterations * 1e3


@contextlib.contextmanager
def replaced(module, name, function):
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def chosen(args, names):
    """Returns the names that --only selects: by a full name, or by a part of a name; all without --only."""
    wanted = lambda name: any(part == name if part in names else part in name for part in args.only.split(';'))
    return [name for name in names if not args.only or wanted(name)]


def ladder(args, rows, save):
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randint(50257, (16, args.batch_size, BLOCK_SIZE[device] + 1), device=device, generator=generator)
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    make = lambda name: Variant(name, args.size, list(batches), args.micro_steps)
    bases = {name: make(name) for name in (args.base, UPSTREAM) if name in variants}
    sensors, names = Sensors(), chosen(args, variants)
    for first in range(0, len(names), args.together - 1):
        group = variant = None  # frees the memory of the variants before
        try:
            group = {name: bases.get(name) or make(name) for name in names[first : first + args.together - 1]}
            turns = []  # {name: ms} of each
            for _ in range(args.repetitions):
                turns.append({name: variant.ms(args.iterations) for name, variant in (bases | group).items()})
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            print(f'{", ".join(names[first : first + args.together - 1])}: out of memory', flush=True)
            continue
        for name, variant in group.items():
            ms, ms_reference = ([turn[key] for turn in turns] for key in (name, args.base))
            ratios = [reference / own for reference, own in zip(ms_reference, ms)]
            tokens_per_s = variant.tokens(args.micro_steps) / statistics.median(ms) * 1e3
            clock, power = sensors.median(variant.turns)
            rows.append(
                dict(
                    name=name,
                    ms=ms,
                    ms_reference=ms_reference,
                    **({'ms_upstream': [turn[UPSTREAM] for turn in turns]} if UPSTREAM in bases else {}),
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
            print(f'{name}: {statistics.median(ms):.1f} ms, loss {variant.loss:.4f}', flush=True)
        save()
    sensors.stop()


def largest(args, rows, save):
    """Finds the largest batch that fits, by bisection from a guess that the peaks at two batch sizes give."""
    memory = torch.cuda.get_device_properties(0).total_memory
    if args.gib:
        torch.cuda.set_per_process_memory_fraction(args.gib * 2**30 / memory)
        memory = args.gib * 2**30

    def tokens_per_s(name, batch_size):
        """Returns (tokens per second, peak in bytes), or None if it does not fit."""
        tokens = torch.randint(50257, (batch_size, 1025), device=device)
        batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
        try:
            variant = Variant(name, args.size, batches, 1)
            return variant.tokens(1) / variant.ms(args.iterations) * 1e3, variant.peak_bytes
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            print(f'{name}, {batch_size} sequences: out of memory', flush=True)
            return None

    names = (
        'reference, eager',
        'reference, compiled',
        'reference, compiled, cuda_graph',
        TRITON,
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
            print(f'{name}: not even 2 sequences fit', flush=True)
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
        print(f'{name}: {fits} sequences', flush=True)
        save()


def profile(args, rows, save):
    tokens = torch.randint(50257, (16, args.batch_size, BLOCK_SIZE[device] + 1), device=device)
    batches = [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    three = ('reference, compiled', TRITON, '+ half_residual')
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
        by_time = sorted(([sum(us) / count, len(us) / count, kernel] for kernel, us in by_name.items()), reverse=True)
        rows.append(
            dict(name=name, ms=sum(us for us, _, _ in by_time) / 1e3, span_ms=span / count / 1e3, kernels=by_time)
        )
        save()
        del variant


def matmuls(args, rows, save):
    """
    Times forward, dx and dw (added to float32) of each weight, by both libraries in turns; medians of CUDA-graph
    replays of 12 calls.
    """
    from bench_layer_norm import graph_us

    C, M = SIZES[args.size]['n_embd'], args.batch_size * 1024
    random = lambda *shape: torch.randn(*shape, device=device).bfloat16()
    weights = {'qkv': (3 * C, C), 'proj': (C, C), 'fc': (4 * C, C), 'proj2': (C, 4 * C), 'head': (50304, C)}
    for name, (out, into) in weights.items():
        w, x, dy, dw = random(out, into), random(M, into), random(M, out), torch.zeros(out, into, device=device)
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
            rows.append(dict(weight=name, shape=[out, into], tokens=M, kind=kind, us=us))
            save()


def hopper(args, rows, save):
    """
    Times forward matmuls by cuBLAS and by the Gluon matmul, the output layer's also with the loss, in turns; medians of
    CUDA-graph replays of 12 calls.
    """
    from bench_layer_norm import graph_us
    from kernels import cross_entropy, exp_cross_entropy

    gluon, programs = exp_cross_entropy.load_matmul_hopper(), kernels.device.num_multiprocessors(device)
    C, M = SIZES[args.size]['n_embd'], args.batch_size * 1024
    random = lambda *shape: torch.randn(*shape, device=device).bfloat16()
    weights = {'qkv': (3 * C, C), 'proj': (C, C), 'fc': (4 * C, C), 'proj2': (C, 4 * C), 'head': (50304, C)}

    def loss(x, w, targets):
        cross_entropy.launch_cross_entropy(x @ w.t(), targets, -1, True)

    def exponential_loss(x, w, targets):
        exps, sums = exp_cross_entropy.exponentials(x, w, exp_cross_entropy.target_logits(x, w, targets))
        exp_cross_entropy.losses_of(exps, sums, targets, -1)

    for name, (out, into) in weights.items():
        w, x = random(out, into) * into**-0.5, random(M, into)
        kinds = {'forward': (lambda: x @ w.t(), lambda: gluon.matmul(x, w, programs))}
        if name == 'head':
            targets = torch.randint(out, (M,), device=device)
            kinds['forward, loss'] = lambda: loss(x, w, targets), lambda: exponential_loss(x, w, targets)
        for kind, calls in kinds.items():
            us = {'separate': [], 'gluon': []}
            for _ in range(args.repetitions):
                for key, call in zip(us, calls):
                    us[key].append(graph_us([call] * (12 if name != 'head' else 2))[0])
            rows.append(dict(weight=name, shape=[out, into], tokens=M, kind=kind, us=us))
            save()


def fp8(args, rows, save):
    """
    Times forward and dx of each weight in both formats, and kernels that only quantize x and dy; medians of CUDA-graph
    replays of 12 calls.
    """
    from bench_layer_norm import graph_us

    C, M = SIZES[args.size]['n_embd'], args.batch_size * 1024
    scales = kernels.fp8.Scales(2)
    scales.begin(torch.device('cuda'), True)
    random = lambda *shape: torch.randn(*shape, device='cuda').bfloat16()
    weights = {'qkv': (3 * C, C), 'proj': (C, C), 'fc': (4 * C, C), 'proj2': (C, 4 * C), 'head': (50304, C)}
    for name, (out, into) in weights.items():
        w, x, dy = random(out, into), random(M, into), random(M, out)
        w8 = kernels.fp8.quantize_weight(w)
        quantize = [
            lambda t=t, slot=kernels.fp8.Slot(scales, i): kernels.fp8.quantize(t, slot) for i, t in enumerate((x, dy))
        ]
        for call in quantize:
            call()  # records amax, from which the next line makes scales
        scales.begin(torch.device('cuda'), True)
        (x8, x_inverse, _), (dy8, dy_inverse, _) = (call() for call in quantize)
        product = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16)
        calls = {
            'forward': lambda: x @ w.t(),
            'forward, fp8': lambda: product(x8, w8.rows.t(), x_inverse, w8.inverse_scale, use_fast_accum=True),
            'quantize x': quantize[0],
            'dx': lambda: dy @ w,
            'dx, fp8': lambda: product(dy8, w8.columns.t(), dy_inverse, w8.inverse_scale, use_fast_accum=False),
            'quantize dy': quantize[1],
        }
        us = {kind: [] for kind in calls}
        for _ in range(args.repetitions):
            for kind, call in calls.items():
                us[kind].append(graph_us([call] * (12 if name != 'head' else 3))[0])
        rows.append(dict(weight=name, shape=[out, into], tokens=M, us=us))
        save()


MULTIPROCESSORS = 132  # of an H100 or H200


def shapes_at(width):
    """Returns {(weight, kind): (rows, columns, inner)} of the matmuls of a GPT-2 of this width, for 8 x 1024 tokens."""
    tokens = 8 * 1024
    weights = {'qkv': (3 * width, width), 'proj': (width, width), 'fc': (4 * width, width), 'proj2': (width, 4 * width)}
    weights['head'] = (50304, width)
    of = {}
    for name, (out, into) in weights.items():
        of[name, 'forward'], of[name, 'dx'], of[name, 'dw'] = (
            (tokens, out, into),
            (tokens, into, out),
            (out, into, tokens),
        )
    return of


def tiled(rows, columns, tile):
    """
    Returns (waves, tiles, share of the computed output that is padding, share of the multiprocessors' time that is idle
    in the last wave) of an output of this shape. tile: columns x rows or rows x columns, whichever takes less.
    """
    found = []
    for height, width in (tile, tile[::-1]):
        down, across = -(-rows // height), -(-columns // width)
        tiles, waves = down * across, -(-down * across // MULTIPROCESSORS)
        padding = 1 - rows * columns / (down * height * across * width)
        found.append((waves, tiles, padding, 1 - tiles / (waves * MULTIPROCESSORS)))
    return min(found)


def kernel_of(call):
    """Returns the name of the kernel in which a call spends most of its time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return max(kernels, key=lambda event: event.time_range.elapsed_us()).name


def widths(args, rows, save):
    """Times the matmuls of 1.5B at 1600 columns and at 1664, the next multiple of 128, by cuBLAS in turns."""
    from bench_layer_norm import graph_us

    random = lambda *shape: torch.randn(*shape, device=device).bfloat16()
    both = {width: shapes_at(width) for width in (1600, 1664)}
    for key in both[1600]:
        calls, us = {}, {width: [] for width in both}
        for width, shapes in both.items():
            M, N, K = shapes[key]
            if key[1] == 'dw':  # added to float32, as in the step
                a, b, out = random(K, M), random(K, N), torch.zeros(M, N, device=device)
                calls[width] = lambda a=a, b=b, out=out: torch.addmm(out, a.t(), b, out_dtype=torch.float32, out=out)
            else:
                a, b = random(M, K), random(N, K).t() if key[1] == 'forward' else random(K, N)
                calls[width] = lambda a=a, b=b: a @ b
        for _ in range(args.repetitions):
            for width, call in calls.items():
                us[width].append(graph_us([call] * (3 if key[0] == 'head' else 12))[0])
        by_width = {str(width): dict(us=us[width], kernel=kernel_of(call)) for width, call in calls.items()}
        rows.append(dict(weight=key[0], kind=key[1], widths=by_width))
        save()


def gradients(args, rows, save):
    """
    Compares gradients of one micro-step in bfloat16 with the reference's in float64: the relative error of each
    parameter's gradient, by norm.
    """
    tokens = torch.randint(
        50257,
        (args.batch_size, BLOCK_SIZE[device] + 1),
        device=device,
        generator=torch.Generator(device).manual_seed(0),
    )
    batches, all_errors, lines = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())], {}, []
    truth = Variant('reference, eager', args.size, list(batches), 1, warm=False).model.double()
    truth(*batches[0])[1].backward()
    exact = {name: p.grad.cpu() for name, p in truth.named_parameters()}
    del truth
    for name in ('reference, eager', 'reference, compiled', TRITON, '+ half_residual', 'fp8'):
        variant = Variant(name, args.size, list(batches), 1, warm=False)
        variant.micro_steps = 1
        for _ in range(5):  # the last is a replay, where the variant has CUDA graphs
            variant.model.zero_grad(set_to_none=True)
            variant.micro_step(*batches[0])
        errors = {
            k: ((p.grad.double() - exact[k].to(device)).norm() / exact[k].norm()).item()
            for k, p in variant.model.named_parameters()
        }
        all_errors[name] = errors
        ratios = [errors[k] / all_errors['reference, compiled'][k] for k in errors] if len(all_errors) > 1 else [1.0]
        rows.append(dict(name=name, errors=errors))
        lines.append(
            f'{name:28s} mean error {statistics.fmean(errors.values()):.2e}, largest {max(errors.values()):.2e}; '
            f"of the compiled reference's {statistics.median(ratios):.3f} in the median, at most {max(ratios):.3f}"
        )
        save()
    return '\n'.join(lines)


def curves(args, rows, save):
    data = torch.from_numpy(
        np.fromfile(ROOT / 'nanoGPT' / 'data' / 'python_gpt2' / 'train.bin', np.uint16).astype(np.int64)
    ).to(device)
    kinds = {
        'reference': 'reference, compiled',
        'Triton': TRITON,  # with all of its kernels
        'Triton, half_residual': '+ half_residual',
        'Triton, half_residual, again': '+ half_residual',  # sums of atomics in another order: noise
        'Triton, fp8': 'fp8',
        'Triton, fp8 in the blocks': 'fp8, blocks alone',
        'Triton, fp8 in the head': 'fp8, head alone',
        'Triton, fp8 without kernels of its own': 'fp8, without kernels of its own',
    }
    kinds = {kind: kinds[kind] for kind in (chosen(args, kinds) if args.only else list(kinds)[:3])}
    val = np.fromfile(ROOT / 'nanoGPT' / 'data' / 'python_gpt2' / 'val.bin', np.uint16).astype(np.int64)
    val = torch.from_numpy(val[: len(val) // 1025 * 1025]).to(device).view(-1, 1025)
    for seed in args.seeds:
        for kind in kinds:
            torch.manual_seed(seed)
            starts = torch.randint(len(data) - 1025, (args.curve_steps, args.batch_size, 1), device=device)
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
                batch = data[start + torch.arange(1025, device=device)]
                train.batch = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
                for group in train.optimizer.param_groups:
                    cosine = 0.5 * (1 + math.cos(math.pi * i / args.curve_steps))
                    group['lr'] = args.learning_rate * min((i + 1) / 100, 0.1 + 0.9 * cosine)
                losses.append(train.iteration())
            losses = [round(loss, 5) for loss in torch.stack(losses).tolist()]
            rows.append(dict(kind=kind, seed=seed, losses=losses, val_loss=val_loss(train.model, val)))
            if getattr(train.raw_model, 'rank_state', None):
                rows[-1] |= train.raw_model.rank_state.log()
            save()
            last = f'last 100 steps {statistics.fmean(losses[-100:]):.4f}, validation {rows[-1]["val_loss"]:.4f}'
            print(f'{kind}, seed {seed}: {last}', flush=True)
            del train
    return compared(rows)


@torch.no_grad()
def val_loss(model, windows):
    """Returns the mean loss of tokens (n, 1025) on the GPU, in bfloat16."""
    model.eval()
    total = 0.0
    for batch in windows.split(12):
        with torch.autocast(device, dtype=torch.bfloat16):
            total += model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())[1].item() * len(batch)
    return total / len(windows)


def compared(rows):
    """
    Returns lines of text: how far each kind's curves are from the base's at the same seed, and how far the base's own
    seeds are apart. The base is the reference or, where that was not run, the first kind.
    """
    kinds = {row['kind']: None for row in rows}
    base = 'reference' if 'reference' in kinds else next(iter(kinds))
    curves = {(row['kind'], row['seed']): row['losses'] for row in rows}
    # means of 25 steps, so that batches do not hide the models; each seed has its own batches, the same for all kinds
    smooth = {key: torch.tensor(losses).unfold(0, 25, 25).mean(-1) for key, losses in curves.items()}
    seeds = sorted(seed for kind, seed in curves if kind == base)
    lines = []
    if len(seeds) > 1:
        noise = torch.stack([smooth[base, a] - smooth[base, b] for a in seeds for b in seeds if b < a]).abs()
        lines.append(
            f'between seeds of {"the " * (base == "reference")}{base}: mean {noise.mean():.4f}, '
            f'largest {noise.max():.4f}'
        )
    for kind in sorted(kinds.keys() - {base}):
        both = [seed for seed in seeds if (kind, seed) in curves]
        if both:
            apart = torch.stack([smooth[kind, seed] - smooth[base, seed] for seed in both])
            last = [statistics.fmean(curves[kind, s][-100:]) - statistics.fmean(curves[base, s][-100:]) for s in both]
            lines.append(
                f'{kind} - {base} at the same seed: mean {apart.mean():+.4f}, mean size {apart.abs().mean():.4f}, '
                f'largest {apart.abs().max():.4f}; last 100 steps: {", ".join(f"{d:+.4f}" for d in last)}'
            )
        if both and all('val_loss' in row for row in rows):
            val = {(row['kind'], row['seed']): row['val_loss'] for row in rows}
            lines[-1] += f'; validation: {", ".join(f"{val[kind, s] - val[base, s]:+.4f}" for s in both)}'
    return '\n'.join(lines)


# the tables


def shown(name):
    """Returns the name that the documents use for a variant; older result files have other names."""
    now = {'phase 2': 'Triton', 'cuda_graph': 'CUDA graph', 'fp8, never a kernel': 'fp8, without kernels'}
    for before, after in now.items():
        name = name.replace(before, after)
    return name


def work_of(report):
    """Returns size, sequences in a micro-step and micro-steps; the first result files do not record them."""
    return report.get('size', '124M'), report.get('batch_size', 12), report.get('micro_steps', 8)


def speed_of(row, report, ms):
    """Returns tokens/s for milliseconds of an iteration: {'median', 'min', 'max'}."""
    _, batch_size, micro_steps = work_of(report)
    tokens = batch_size * 1024 * micro_steps
    return dict(median=tokens / statistics.median(ms) * 1e3, min=tokens / max(ms) * 1e3, max=tokens / min(ms) * 1e3)


def changes(report):
    """
    Returns the ladder's rows {short name: row}: the references, the last change of the Triton step, and half_residual.
    """
    rows = {row['name']: row for row in report['rows']}
    steps = [name for name in rows if name.startswith('+ ') and name not in ('+ half_residual', '+ clipping by AdamW')]
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
    cells, more = [], []
    for row in report['rows']:
        ms = row['ms']
        speed, base = speed_of(row, report, ms), speed_of(row, report, row['ms_reference'])
        numbers = [f'{speed["median"]:,.0f}', f'{base["median"]:,.0f}', times(speed, base, 3)]
        if 'ms_upstream' in row:
            numbers.append(times(speed, speed_of(row, report, row['ms_upstream']), 3))
        if row.get('clock_mhz'):
            numbers += [f'{row["clock_mhz"]:.0f}', f'{row["power_w"]:.0f}']
        cells.append((shown(row['name']), with_spread(ms, 1), *numbers, gib(row['peak_memory_bytes'])))
        more = ['× upstream'] * ('ms_upstream' in row) + ['MHz', 'W'] * bool(row.get('clock_mhz'))
    header = [f'{size}, {micro_steps} micro-steps of {batch_size} × 1024', 'ms of an iteration', 'tokens/s']
    base = report.get('base', 'reference, compiled')
    bases = ('compiled reference', 'the reference') if base == 'reference, compiled' else (base, base)
    return markdown([*header, f'{bases[0]} in the same rounds', f'× {bases[1]}', *more, 'peak, GiB'], cells)


@table('phase2_changes_*')
def phase2_changes(report):
    """Returns a ladder of the latest changes, with the GPU's clock and power."""
    cells = []
    for row in report['rows']:
        speed, base = speed_of(row, report, row['ms']), speed_of(row, report, row['ms_reference'])
        numbers = (with_spread(row['ms'], 1), f'{speed["median"]:,.0f}', times(speed, base, 3))
        cells.append((shown(row['name']), *numbers, f'{row["clock_mhz"]:.0f}', f'{row["power_w"]:.0f}'))
    return markdown(['', 'ms of an iteration', 'tokens/s', '× the compiled reference', 'MHz', 'W'], cells)


@table('phase2_matmuls_*')
def phase2_matmuls(report):
    """Returns times of forward, input gradient (dx) and weight gradient (dw) of each weight."""
    cells = []
    for row in report['rows']:
        us = row['us']
        ratio = statistics.median(us['cublaslt']) / statistics.median(us['cublas'])
        cells.append((row['weight'], row['kind'], *(with_spread(us[key], 1) for key in us), f'{ratio:.2f}'))
    return markdown([f'{report["rows"][0]["tokens"]:,} tokens', '', 'cuBLAS, µs', 'cuBLASLt, µs', 'ratio'], cells)


@table('phase2_hopper_*')
def phase2_hopper(report):
    """Compares cuBLAS, and a kernel that reads its result where there is one, with the Gluon matmul."""
    cells = []
    for row in report['rows']:
        us = row['us']
        ratios = [own / theirs for own, theirs in zip(us['gluon'], us['separate'])]
        cells.append((row['weight'], row['kind'], *(with_spread(us[key], 1) for key in us), with_spread(ratios, 2)))
    header = [f'{report["rows"][0]["tokens"]:,} tokens', '', 'cuBLAS (and a kernel), µs', 'Gluon, µs', 'ratio']
    return markdown(header, cells)


@table('phase2_widths_*')
def phase2_widths(report):
    """
    Returns the time of each matmul at 1600 and 1664 columns, next to what the tile in its kernel's name costs: waves of
    tiles, padding, idle multiprocessors. Sums are over 48 layers and the head.
    """
    cells, times_us, flops = [], {'1600': 0, '1664': 0}, {'1600': 0, '1664': 0}
    for row in report['rows']:
        key, plan, speed, rates = (row['weight'], row['kind']), [], [], []
        for width, its in row['widths'].items():
            (M, N, K), us = shapes_at(int(width))[key], statistics.median(its['us'])
            tile = re.search(r'_(\d+)x(\d+)_\d+x\d+_', its['kernel'])
            waves, _, padding, idle = tiled(M, N, tuple(map(int, tile.groups()))) if tile else (0, 0, 0, 0)
            split = ', K split' if 'splitK' in its['kernel'] else ''
            plan.append(f'{tile[1]} × {tile[2]}{split}: {waves}, {padding:.0%}, {idle:.0%}' if tile else '')
            rates.append(2 * M * N * K / us / 1e6)
            speed.append(f'{us:.0f} ({rates[-1]:.0f})')
            count = 1 if key[0] == 'head' else 48
            times_us[width] += us * count
            flops[width] += 2 * M * N * K * count
        cells.append((*key, *plan, *speed, f'{rates[1] / rates[0]:.3f}'))
    rates = [flops[width] / times_us[width] / 1e6 for width in times_us]
    sums = [f'{times_us[width] / 1e3:.1f} ms ({rate:.0f})' for width, rate in zip(times_us, rates)]
    cells.append(('all', '', '', '', *sums, f'{rates[1] / rates[0]:.3f}'))
    header = [
        '',
        '',
        'tile at 1600: waves, padding, idle',
        'at 1664',
        'µs at 1600 (TFLOP/s)',
        'at 1664',
        'ratio of TFLOP/s',
    ]
    return markdown(header, cells)


def useful(rows, columns, tile):
    """Returns the share of the multiprocessors' time that computes the output and not padding or nothing."""
    waves, *_ = tiled(rows, columns, tile)
    return rows * columns / (waves * MULTIPROCESSORS * tile[0] * tile[1])


def rate(row):
    """Returns the TFLOP/s of a matmul with cuBLAS."""
    return 2 * math.prod(shapes_at(1600)[row['weight'], row['kind']]) / statistics.median(row['us']['cublas']) / 1e6


@table('phase2_matmuls_*_xl')
def phase2_quantization(report):
    """
    Returns the useful share of each matmul of 1.5B for two tiles, at 1600 columns and at 1664, and its measured speed.
    """
    cells = []
    for row in report['rows']:
        key = row['weight'], row['kind']
        rows, columns, _ = shapes_at(1600)[key]
        shares = [
            f'{useful(*shapes_at(width)[key][:2], tile):.0%}'
            for width in (1600, 1664)
            for tile in ((128, 256), (192, 192))
        ]
        cells.append((*key, f'{rows:,} × {columns:,}', *shares, f'{rate(row):.0f}'))
    tiles = [f'{tile} tiles, {width}' for width in (1600, 1664) for tile in ('128 × 256', '192 × 192')]
    return markdown(['', '', 'output', *tiles, 'TFLOP/s at 1600'], cells)


@number
def matmul_rate(kind):
    """
    Returns the mean TFLOP/s of 1.5B's forwards and input gradients: those with 1600 columns (narrow) or with more
    (wide).
    """
    rows = [row for row in load('phase2_matmuls_h200_xl')['rows'] if row['kind'] != 'dw']
    narrow = lambda row: shapes_at(1600)[row['weight'], row['kind']][1] == 1600
    return f'{statistics.fmean(rate(row) for row in rows if narrow(row) == (kind == "narrow")):.0f}'


@table('phase2_gradients_*')
def phase2_gradients(report):
    """Returns relative errors of all parameters' gradients against float64."""
    base = next(row['errors'] for row in report['rows'] if row['name'] == 'reference, compiled')
    cells = []
    for row in report['rows']:
        errors, ratios = row['errors'], [row['errors'][key] / base[key] for key in base]
        numbers = (f'{statistics.fmean(errors.values()):.2e}', f'{max(errors.values()):.2e}')
        name = row['name']
        if name.startswith('+ '):  # the last change so far is the Triton model
            name = 'Triton, half_residual' if name == '+ half_residual' else 'Triton'
        cells.append((name, *numbers, f'{statistics.median(ratios):.3f}', f'{max(ratios):.3f}'))
    header = ['mean error', 'largest', "÷ the compiled reference's: median", 'largest']
    return markdown([f'one micro-step of {report["batch_size"]} × 1024, {len(base)} parameters', *header], cells)


@table('phase2_ladder_*', together=True)
def measured(reports):
    """Returns the ladders of the usual work, 124M with 8 micro-steps of 12 x 1024 tokens, on one GPU."""
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
    header = ['', 'GPU', 'tokens/s', 'compiled reference in the same rounds', 'ratio', '× reference with CUDA graph']
    return markdown([*header, 'peak, GiB', 'result file'], rows)


@table('phase2_curves_*')
def phase2_curves(report):
    return f'```\n{shown(chr(10).join(report["summary"]))}\n```' if 'summary' in report else ''


@table('fp8_matmuls_*')
def fp8_matmuls(report):
    """Returns times of forward and input gradient (dx) of each weight, and of quantizing their operands."""
    kinds = list(report['rows'][0]['us'])
    cells = [(row['weight'], *(with_spread(row['us'][kind], 1) for kind in kinds)) for row in report['rows']]
    return markdown([f'{report["rows"][0]["tokens"]:,} tokens, µs', *kinds], cells)


@table('fp8_ladder_*')
def fp8_ladder(report):
    return phase2_ladder(report)


@table('fp8_curves_*')
def fp8_curves(report):
    """Returns the losses of each run, and how far the kinds are apart."""
    cells = []
    for row in report['rows']:
        numbers = f'{statistics.fmean(row["losses"][-100:]):.4f}', f'{row["val_loss"]:.4f}', row.get('fp8_clamped', '')
        cells.append((row['kind'], row['seed'], len(row['losses']), *numbers))
    header = [report['size'], 'seed', 'steps', 'loss of the last 100', 'validation', 'steps with clamped values']
    summary = compared(report['rows'])
    return markdown(header, cells) + (f'\n\n```\n{summary}\n```' if summary else '')


@table('phase2_profile_*')
def phase2_profile(report):
    """Returns the kernels that take more than 0.1 ms of a micro-step."""
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
def times_upstream(file, *name):
    """
    Returns the speed of a variant, given by a short name (see changes) or its full name, in multiples of upstream
    nanoGPT's in the same rounds.
    """
    row = changes(load(file)).get(' '.join(name)) or row_of(file, name)
    return f'{statistics.median(row["ms_upstream"]) / statistics.median(row["ms"]):.2f}'


@number
def ladder_ms(file, *name):
    """Returns median milliseconds of an iteration of the variant of this name."""
    return f'{statistics.median(row_of(file, name)["ms"]):.1f}'


@number
def ladder_base_ms(file, *name):
    """Returns median milliseconds of an iteration of the variant that took turns with this one."""
    return f'{statistics.median(row_of(file, name)["ms_reference"]):.1f}'


@number
def times_base(file, *name):
    """Returns the speed of the variant of this name in multiples of the one that took turns with it."""
    row = row_of(file, name)
    return f'{statistics.median(row["ms_reference"]) / statistics.median(row["ms"]):.2f}'


def row_of(file, name):
    return next(row for row in load(file)['rows'] if row['name'] == ' '.join(name))


@number
def val_loss_apart(file, *kind):
    """
    Returns validation losses of a kind minus those of the file's first kind at the same seeds, in the order of the
    seeds.
    """
    rows = load(file)['rows']
    base = {row['seed']: row['val_loss'] for row in rows if row['kind'] == rows[0]['kind']}
    apart = [row['val_loss'] - base[row['seed']] for row in rows if row['kind'] == ' '.join(kind)]
    *first, last = (f'{difference:+.3f}'.replace('-', '−') for difference in apart)
    return f'{", ".join(first)} and {last}' if first else last


@number
def largest_batch(file, *name):
    """Returns how many sequences of 1024 tokens fit into a micro-step of the variant whose name ends with the words."""
    rows = load(file)['rows']
    return str(next(row['batch_size'] for row in rows if row['name'].endswith(' '.join(name))))


def join(names):
    """Returns one report of the curves in several files, such as those of two GPUs that have shared the work."""
    reports = [json.loads(Path(name).read_text()) for name in names]
    for key in ('device', 'versions', 'size', 'batch_size', 'micro_steps'):
        if any(report.get(key) != reports[0].get(key) for report in reports):
            sys.exit(f'bench_phase2.py: --join: the files differ in {key}')
    command = ' & '.join(report['command'] for report in reports)
    return {**reports[0], 'command': command, 'rows': [row for report in reports for row in report['rows']]}


def main():
    global device
    modes = dict(
        ladder=ladder,
        curves=curves,
        largest=largest,
        profile=profile,
        matmuls=matmuls,
        widths=widths,
        hopper=hopper,
        fp8=fp8,
        gradients=gradients,
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', choices=list(modes))
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument('--batch_size', type=int, default=12)
    parser.add_argument('--micro_steps', type=int, default=8)
    parser.add_argument('--size', choices=list(SIZES), default='124M')
    parser.add_argument('--iterations', type=int, default=3, help='timed or profiled together')
    parser.add_argument('--repetitions', type=int, default=5, help='turns of every variant')
    parser.add_argument(
        '--together', type=int, default=2, help='ladder: models in memory at a time, with the reference'
    )
    parser.add_argument('--base', default='reference, compiled', help='ladder: takes turns with every variant')
    parser.add_argument('--nanogpt', default='', help='ladder: a checkout of karpathy/nanoGPT, which takes turns, too')
    parser.add_argument('--only', default='', help='semicolon-separated names of variants, or parts of names')
    parser.add_argument(
        '--seeds',
        type=lambda text: [int(seed) for seed in text.split(',')],
        default=[0, 1, 2],
        help='of the curves: 0,1,2',
    )
    parser.add_argument('--join', default='', help='curves: run nothing, but join these comma-separated result files')
    parser.add_argument('--curve_steps', type=int, default=1000)
    parser.add_argument('--learning_rate', type=float, default=6e-4, help='curves: the highest')
    parser.add_argument(
        '--gib',
        type=float,
        default=0,
        help='largest: of a GPU with this much memory for PyTorch, such as 78.5 for one of 80 GB',
    )
    parser.add_argument('--dry-run', action='store_true', help='ladder and gradients: a tiny model on a CPU')
    args = parser.parse_args()
    if args.join:
        report = join(args.join.split(','))
        report['summary'] = compared(report['rows']).splitlines()
        write_json(args.out, report)
        print('\n'.join(report['summary']))
        return
    if args.dry_run:
        if args.mode not in ('ladder', 'gradients'):
            parser.error(f'{args.mode} needs a GPU: there is no --dry-run of it')
        device, args.size, args.batch_size, args.micro_steps = 'cpu', 'tiny', 2, 2
        args.iterations = args.repetitions = 1
    elif not torch.cuda.is_available():
        sys.exit('bench_phase2.py: a benchmark of training on a GPU needs a CUDA GPU')
    if args.nanogpt:
        folder = Path(args.nanogpt).resolve()
        if not (folder / 'model.py').is_file():
            parser.error(f'--nanogpt: there is no {folder}/model.py')
        variants[UPSTREAM] = (folder, {}, True, False, ('clip',))
    hardware.resolve_auto(device, 'auto', 'auto', 'auto')  # sets up the GPU's memory as train.py does
    if device == 'cuda':
        use_side_stream(device)  # for all variants, also those without CUDA graphs
    args.micro_steps = args.micro_steps if args.mode in ('ladder', 'profile') else 1
    keys = ('size', 'batch_size', 'micro_steps', 'gib', 'base', *['learning_rate'] * (args.mode == 'curves'))
    settings = {key: getattr(args, key) for key in keys}
    report = {**facts(cpu=args.dry_run), **settings, 'rows': []}
    if args.nanogpt:
        report['nanogpt_commit'] = output_of('git', '-C', args.nanogpt, 'rev-parse', 'HEAD')
    text = modes[args.mode](args, report['rows'], lambda: write_json(args.out, report))
    if text:
        report['summary'] = text.splitlines()
    write_json(args.out, report)
    show = dict(
        ladder=phase2_ladder,
        largest=phase2_largest,
        profile=phase2_profile,
        matmuls=phase2_matmuls,
        widths=phase2_widths,
        hopper=phase2_hopper,
        fp8=fp8_matmuls,
    )
    print('\n' + (show[args.mode](report) if text is None else text))


if __name__ == '__main__':
    main()
