"""
Phase 2's model against the reference's on one GPU, in one process: speed of training GPT-2 124M, and loss curves.

    python benchmarks/bench_phase2.py speed --out=benchmarks/results/phase2_speed.json      # about 2 minutes on an H100
    python benchmarks/bench_phase2.py curves --out=benchmarks/results/phase2_curves.json    # about 1 minute

speed: tokens/s of training steps (bfloat16 autocast, fused AdamW, clipping; 12 x 1024 tokens), models taking turns, eager and
compiled. The variant `opaque` keeps the Triton kernel under torch.compile, where phase 2 otherwise leaves LayerNorm to Inductor.
curves: 500 steps of a byte-level GPT on the sources of Python's standard library, several seeds, both models.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / 'phase2_triton'))


def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, root / folder / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def trainer(module, compiled, learning_rate=6e-4, **config):
    """A model with its optimizer, as a function of (x, y) that does one step and returns the loss."""
    model = module.GPT(module.GPTConfig(dropout=0.0, bias=False, **config)).cuda()
    optimizer = model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), 'cuda')
    forward = torch.compile(model) if compiled else model

    def step(x, y):
        with torch.autocast('cuda', dtype=torch.bfloat16):
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def speed(args):
    opaque = load('phase2_triton', 'opaque')
    opaque.triton_layer_norm = torch.compiler.assume_constant_result(lambda *_: True)
    reference, phase2 = load('nanoGPT', 'reference'), load('phase2_triton', 'phase2')
    variants = {
        'reference eager': (reference, False),
        'phase 2 eager': (phase2, False),
        'reference compiled': (reference, True),
        'phase 2 compiled': (phase2, True),
        'phase 2 compiled, opaque': (opaque, True),
    }
    variants = {name: v for name, v in variants.items() if not args.only or name in args.only.split(';')}
    tokens = torch.randint(50304, (args.batch_size, 1025), device='cuda')
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    steps, times, memory = {}, {name: [] for name in variants}, {}
    for name, (module, compiled) in variants.items():
        torch._dynamo.reset()
        steps[name] = trainer(module, compiled)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(4):
            steps[name](x, y)
        torch.cuda.synchronize()
        memory[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(args.repetitions):
        for name, step in steps.items():
            step(x, y)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(args.steps):
                step(x, y)
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) / args.steps * 1e3)
    rows = []
    for name, ms in times.items():
        median = statistics.median(ms)
        base = statistics.median(times['reference compiled' if 'compiled' in name else 'reference eager'])
        rows.append(dict(name=name, ms=ms, tokens_per_s=x.numel() / median * 1e3, ratio=base / median, peak_memory_bytes=memory[name]))
    lines = [
        f'{r["name"]:26s} {min(r["ms"]):7.2f} .. {statistics.median(r["ms"]):7.2f} .. {max(r["ms"]):7.2f} ms '
        f'{r["tokens_per_s"]:9,.0f} tokens/s  x {r["ratio"]:.3f}'
        for r in rows
    ]
    return rows, '\n'.join(lines)


def curves(args):
    folder = Path(sysconfig.get_paths()['stdlib'])
    text = b''.join(p.read_bytes() for p in sorted(folder.glob('*.py')))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).cuda().long()
    losses = {}
    for seed in range(args.seeds):
        for folder in ('nanoGPT', 'phase2_triton'):
            torch.manual_seed(1337 + seed)
            step = trainer(load(folder, folder), False, 1e-3, block_size=256, vocab_size=256, n_layer=6, n_head=6, n_embd=384)
            curve = []
            for _ in range(args.curve_steps):
                start = torch.randint(len(data) - 257, (64, 1), device='cuda') + torch.arange(257, device='cuda')
                batch = data[start]
                curve.append(step(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()))
            losses[folder, seed] = torch.stack(curve).tolist()
    # smoothed over 25 steps, so that batches do not hide the models
    smooth = {k: torch.tensor(v).unfold(0, 25, 25).mean(-1) for k, v in losses.items()}
    between_models = torch.stack([smooth['nanoGPT', s] - smooth['phase2_triton', s] for s in range(args.seeds)]).abs()
    between_seeds = torch.stack([smooth['nanoGPT', s] - smooth['nanoGPT', t] for s in range(args.seeds) for t in range(s)]).abs()
    rows = [dict(folder=f, seed=s, losses=v) for (f, s), v in losses.items()]
    text = (
        f'last 25 of {args.curve_steps} steps: ' + ', '.join(f'{f} seed {s} {v[-1]:.4f}' for (f, s), v in smooth.items()) + '\n'
        f'|phase 2 - reference| at the same seed: mean {between_models.mean():.4f}, largest {between_models.max():.4f}; '
        f'between seeds of the reference: mean {between_seeds.mean():.4f}, largest {between_seeds.max():.4f}'
    )
    return rows, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', choices=['speed', 'curves'])
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument('--batch_size', type=int, default=12)
    parser.add_argument('--steps', type=int, default=10, help='timed together')
    parser.add_argument('--repetitions', type=int, default=5, help='turns of every variant')
    parser.add_argument('--only', default='', help='semicolon-separated variants')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--curve_steps', type=int, default=500)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit('bench_phase2.py: a benchmark of training on a GPU needs a CUDA GPU')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py
    import triton

    driver = subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True).stdout.strip()
    report = dict(
        device=torch.cuda.get_device_name(), driver=driver, torch=torch.__version__, cuda=torch.version.cuda, triton=triton.__version__,
        command=' '.join(['python', *sys.argv]), time=time.strftime('%Y-%m-%d %H:%M:%S %Z'),
    )  # fmt: skip
    report['rows'], text = dict(speed=speed, curves=curves)[args.mode](args)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    with open(args.out, 'w') as f:
        json.dump(report, f, indent=1)
    print(text)


if __name__ == '__main__':
    main()
