"""
Measures how much faster sampling is with the key-value cache: the same model and tokens with model.generate and with
the cache, on a GPU with its steps replayed as a CUDA graph. The model has random weights.

    python benchmarks/bench_sampling.py --device=cpu --shape=char --samples=1 --out=sampling_cpu.json  # 4 minutes
    python benchmarks/bench_sampling.py --out=sampling_h200.json  # 1 to 3 minutes on a GPU
    python benchmarks/bench_sampling.py --model_dir=phase2_triton --out=sampling_triton_h200.json

The ways are timed in turns, and a ratio is the quotient of two medians of one run. Times include prefill and capture.
"""

import argparse
import sys
from contextlib import redirect_stdout
from functools import partial
from os import devnull

import torch

from common import ROOT, facts, spread, write_json
from tables import markdown, table, with_spread

SHAPES = {
    'char': dict(n_layer=6, n_head=6, n_embd=384, block_size=512, vocab_size=96),
    '124M': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304),
}


def build(shape, model_dir, device):
    """Returns a model of this shape with random weights and without biases, in eval mode."""
    sys.path[:0] = [str(ROOT / model_dir), str(ROOT / 'nanoGPT')]
    from model import GPT, GPTConfig

    torch.manual_seed(1337)
    with redirect_stdout(open(devnull, 'w')):
        return GPT(GPTConfig(**SHAPES[shape], bias=False)).eval().to(device)


def ways(model, prompt, samples, tokens, **options):
    """Returns {name: function}. Each function computes the samples as one batch: int64 (samples, T + tokens)."""
    from kv_cache import generate

    cached = partial(generate, model, prompt, samples, tokens, **options)
    found = {'model.generate': partial(model.generate, prompt.expand(samples, -1), tokens, **options)}
    return found | {'cache, CUDA graph' if prompt.is_cuda else 'cache': cached}


def measure(functions, repeats, device):
    """Returns {name: spread of seconds}."""
    from hardware import now

    seconds = {name: [] for name in functions}
    warmup = device != 'cpu'  # one more turn, which does not count
    for i in range(repeats + warmup):
        for name, function in functions.items():
            started = now(device)
            function()
            if i >= warmup:
                seconds[name].append(now(device) - started)
    return {name: spread(values) for name, values in seconds.items()}


def first_difference(functions):
    """Returns the number of leading tokens that the last function's text has in common with model.generate's."""
    texts = [functions[name]()[0] for name in ('model.generate', list(functions)[-1])]
    return int((texts[0] == texts[1]).cumprod(0).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--dtype', default='auto')
    parser.add_argument('--shape', default='124M', choices=SHAPES)
    parser.add_argument('--model_dir', default='nanoGPT')
    parser.add_argument('--tokens', type=int, default=500)
    parser.add_argument('--samples', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out')
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / 'nanoGPT'))
    import hardware

    device, dtype, _, _ = hardware.resolve_auto(args.device, args.dtype, False, 'auto')
    if device == 'cpu':
        torch.set_num_threads(1)
    model = build(args.shape, args.model_dir, device)
    prompt = torch.randint(SHAPES[args.shape]['vocab_size'], (1, 8), device=device)
    report = {
        **facts(cpu=device == 'cpu'),
        'threads': torch.get_num_threads(),
        'dtype': dtype,
        'model_dir': args.model_dir,
        'shape': SHAPES[args.shape],
        'tokens': args.tokens,
        'rows': [],
    }
    for samples in args.samples:
        functions = ways(model, prompt, samples, args.tokens, temperature=0.8, top_k=200)
        with torch.no_grad(), hardware.autocast(device, dtype):
            seconds = measure(functions, args.repeats, device)
        for name, found in seconds.items():
            ratio = seconds['model.generate']['median'] / found['median']
            speed = samples * args.tokens / found['median']
            report['rows'].append(dict(way=name, samples=samples, seconds=found, tokens_per_sec=speed, ratio=ratio))
        print(sampling(report), flush=True)
        if args.out:  # now, in case the run is ended later
            write_json(args.out, report)
    torch.backends.cuda.matmul.allow_tf32 = False
    total = SHAPES[args.shape]['block_size'] + 100
    same = first_difference(ways(model, prompt, 1, total, temperature=0))
    print(f'greedy, float32: {same} of {total + prompt.size(1)} tokens as without the cache')
    if args.out:
        write_json(args.out, report | {'greedy_tokens': total + prompt.size(1), 'greedy_tokens_in_common': same})


@table('sampling_*')
def sampling(report):
    base = {row['samples']: row['seconds'] for row in report['rows'] if row['way'] == 'model.generate'}
    cells = [
        (
            f'{row["samples"]} × {report["tokens"]} tokens',
            row['way'],
            with_spread(row['seconds'], 2),
            f'{row["tokens_per_sec"]:,.0f}',
            f'{base[row["samples"]]["median"] / row["seconds"]["median"]:.1f}',
        )
        for row in report['rows']
    ]
    return markdown(['samples', '', 'seconds', 'tokens/s', '× model.generate'], cells)


if __name__ == '__main__':
    main()
