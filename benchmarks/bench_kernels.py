"""
Measures the Triton kernels except LayerNorm, one by one on one GPU: PyTorch's eager functions, torch.compile, Liger's
kernel if it has one, and ours.

    python benchmarks/bench_kernels.py --out=benchmarks/results/kernels.json    # about 2 minutes on an H100
    TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --dry-run --out=/tmp/kernels.json  # tiny, on a CPU

Sizes are those of a micro-step of 12 x 1024 tokens of GPT-2 124M under bfloat16 autocast. Times are CUDA-graph replays
over rotating inputs, as in bench_layer_norm.py. Cases with a loss are launched without a graph: they take long, and
Liger waits for the GPU in them. Percentages are of the bandwidth of a large copy, and count bytes as if nothing were
read twice.

`loss` is the loss kernel alone, from logits to their gradient. `head + loss` includes the three matmuls of the output
layer and states peak memory. `linear` is a forward matmul and its two backward matmuls, which add the weight's gradient
to weight.grad. In the captured graph, ours rounds the weight only in the first call, as in an iteration of several
micro-steps; the others round it in each call.
"""

import argparse
import sys

import torch
from torch.nn import functional as F

from bench_layer_norm import copy_gb_per_s, graph_us, wall_us
from common import facts, first_line, spread, write_json
from kernels.add_layer_norm import add_layer_norm
from kernels.cross_entropy import launch_cross_entropy, linear_cross_entropy
from kernels.gelu import gelu
from kernels.linear import linear
from tables import gib, markdown, table

bf16, f32 = torch.bfloat16, torch.float32
try:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
except ImportError:
    LigerCrossEntropyFunction = LigerFusedLinearCrossEntropyFunction = None


def case(name, functions, make, bytes_moved=None, graph=True):
    return dict(name=name, functions=functions, make=make, bytes_moved=bytes_moved, graph=graph)


def with_compiled(eager):
    return {'eager': eager, 'compiled': torch.compile(eager, dynamic=False)}


def elementwise_gelu(M, N, dtype):
    def forward_backward(function):
        return lambda x, dy: torch.autograd.grad(function(x), x, dy)

    functions = {name: forward_backward(f) for name, f in {**with_compiled(F.gelu), 'ours': gelu}.items()}
    make = lambda: (random(M, N, dtype=dtype).requires_grad_(), random(M, N, dtype=dtype))
    return case(f'GELU {M} x {N} {name_of(dtype)}', functions, make, 5 * M * N * dtype.itemsize)  # x, y; x, dy, dx


def residual_layer_norm(M, N, x_dtype):
    weight = torch.ones(N, device=device, requires_grad=True)

    def separately(x, branch):
        total = x + branch
        return total, F.layer_norm(total.float(), weight.shape, weight).to(bf16)

    def forward_backward(function):
        def run(x, branch, dtotal, dy):
            return torch.autograd.grad(function(x, branch), (x, branch, weight), (dtotal, dy))

        return run

    functions = {
        **with_compiled(separately),
        'ours': lambda x, branch: add_layer_norm(x, branch, weight, out_dtype=bf16),
    }
    functions = {name: forward_backward(f) for name, f in functions.items()}
    make = lambda: (
        random(M, N, dtype=x_dtype).requires_grad_(),
        random(M, N, dtype=bf16).requires_grad_(),
        random(M, N, dtype=x_dtype),
        random(M, N, dtype=bf16),
    )
    x, half = x_dtype.itemsize, bf16.itemsize
    # x, branch, sum, y; sum, dsum, dy, dx, and dbranch, which is dx where the dtypes are the same
    moved = M * N * (x + half + x + half + x + x + half + x + (half if x_dtype != bf16 else 0))
    return case(f'residual + LayerNorm {M} x {N} {name_of(x_dtype)} + bf16', functions, make, moved)


def loss_kernel(M, V):
    targets = torch.randint(V, (M,), device=device)

    def eager(logits):
        return torch.autograd.grad(F.cross_entropy(logits.float(), targets), logits)

    def liger(logits):  # overwrites the logits with their gradient, as ours does
        return torch.autograd.grad(LigerCrossEntropyFunction.apply(logits, targets, None)[0], logits)

    compiled = torch.compile(lambda logits: F.cross_entropy(logits.float(), targets), dynamic=False)
    functions = {'eager': eager, 'compiled': lambda logits: torch.autograd.grad(compiled(logits), logits)}
    if LigerCrossEntropyFunction:
        functions['Liger'] = liger
    functions['ours'] = lambda logits: launch_cross_entropy(logits.detach(), targets, -1, True)
    return case(
        f'loss {M} x {V}',
        functions,
        lambda: (random(M, V, dtype=bf16).requires_grad_(),),
        2 * M * V * bf16.itemsize,
        graph=False,
    )


def head_and_loss(M, V, C):
    weight, targets = (random(V, C) * 0.02).requires_grad_(), torch.randint(V, (M,), device=device)

    def forward_backward(function):
        def run(x):
            with torch.autocast(device, dtype=bf16):
                loss = function(x)
            return torch.autograd.grad(loss, (x, weight))

        return run

    functions = with_compiled(lambda x: F.cross_entropy(F.linear(x, weight).float(), targets))
    if LigerFusedLinearCrossEntropyFunction:
        functions['Liger'] = lambda x: LigerFusedLinearCrossEntropyFunction.apply(x, weight.to(bf16), targets)[0]
    functions['ours'] = lambda x: linear_cross_entropy(x, weight, targets)
    functions[f'ours, {M // 3} rows at a time'] = lambda x: linear_cross_entropy(x, weight, targets, chunk_rows=M // 3)
    functions = {name: forward_backward(f) for name, f in functions.items()}
    return case(
        f'head + loss {M} x {V} x {C}', functions, lambda: (random(M, C, dtype=bf16).requires_grad_(),), graph=False
    )


def linear_layer(M, N, K):
    weight = (random(N, K) * 0.02).requires_grad_()
    weight.grad = torch.zeros_like(weight)

    def forward_backward(function):
        def run(x, dy):
            with torch.autocast(device, dtype=bf16):
                y = function(x, weight)
            x.grad = None  # else what is added to it would be timed, too
            y.backward(dy)

        return run

    functions = {name: forward_backward(f) for name, f in {**with_compiled(F.linear), 'ours': linear}.items()}
    return case(
        f'linear {M} x {N} x {K}',
        functions,
        lambda: (random(M, K, dtype=bf16).requires_grad_(), random(M, N, dtype=bf16)),
    )


def random(*shape, dtype=f32):
    return torch.randn(shape, device=device, dtype=dtype)


def name_of(dtype):
    return {bf16: 'bf16', f32: 'fp32'}[dtype]


def cases(tiny):
    if tiny:
        return [
            elementwise_gelu(8, 64, bf16),
            residual_layer_norm(8, 64, f32),
            loss_kernel(6, 65),
            head_and_loss(6, 65, 32),
            linear_layer(8, 64, 32),
        ]
    M = 12 * 1024
    return [
        elementwise_gelu(M, 4 * 768, bf16),
        elementwise_gelu(M, 4 * 768, f32),
        elementwise_gelu(8 * 1024, 4 * 1600, bf16),
        residual_layer_norm(M, 768, f32),
        residual_layer_norm(M, 768, bf16),
        residual_layer_norm(8 * 1024, 1600, f32),
        loss_kernel(M, 50304),
        head_and_loss(M, 50304, 768),
        linear_layer(M, 3 * 768, 768),
        linear_layer(M, 768, 4 * 768),
    ]


def launched_us(calls, repeats=20):
    """
    Returns the median and (smallest, largest) microseconds of one call, from several repeats of launching all calls.
    """
    for call in calls:
        call()
    start, stop = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for a, b in zip(start, stop):
        a.record()
        for call in calls:
            call()
        b.record()
    torch.cuda.synchronize()
    us = spread([a.elapsed_time(b) * 1e3 / len(calls) for a, b in zip(start, stop)])
    return us['median'], (us['min'], us['max'])


def measure(each, roof, gpu):
    """Returns the row of one case: {implementation: dict of us and further results}."""
    arguments = [each['make']()]
    size = sum(t.numel() * t.element_size() for t in arguments[0])
    while (gpu and len(arguments) * size < 400e6) or len(arguments) < 2:  # more than any cache holds
        arguments.append(each['make']())
    row = dict(name=each['name'], bytes_moved=each['bytes_moved'])
    for name, function in each['functions'].items():
        calls = [lambda a=a: function(*a) for a in arguments]
        try:
            us, between = (wall_us if not gpu else graph_us if each['graph'] else launched_us)(calls)
        except Exception as error:
            row[name] = dict(error=f'{type(error).__name__}: {first_line(error)[:100]}')
            continue
        row[name] = dict(us=us, between=between)
        if each['bytes_moved'] and gpu:
            row[name]['percent_of_copy'] = each['bytes_moved'] / us / roof / 10
        if 'head' in each['name'] and gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[0]()
            row[name]['peak_memory_bytes'] = torch.cuda.max_memory_allocated() - before
    return row


@table('kernels_*')
def kernels(report):
    cells = []
    for row in report['rows']:
        line = [row['name'].replace(' x ', ' × ')]
        for name in ('eager', 'compiled', 'Liger', 'ours'):
            r = row.get(name, {})
            text = f'{r["us"]:,.1f}' if 'us' in r else 'fails' if r else ''
            text += f' · {r["percent_of_copy"]:.0f}%' if 'percent_of_copy' in r else ''
            text += f' · {gib(r["peak_memory_bytes"])} GiB' if 'peak_memory_bytes' in r else ''
            line.append(f'**{text}**' if name == 'ours' else text)
        cells.append(line)
    return markdown(['forward + backward, µs · of copy bandwidth', 'eager', 'compiled', 'Liger', 'ours'], cells)


def main():
    global device
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument('--only', default='', help='measure only cases whose name contains this')
    parser.add_argument('--dry-run', action='store_true', help='tiny sizes on a CPU')
    args = parser.parse_args()
    gpu = not args.dry_run
    if gpu and not torch.cuda.is_available():
        sys.exit('bench_kernels.py: a benchmark of GPU kernels needs a CUDA GPU')
    device = 'cuda' if gpu else 'cpu'
    torch.manual_seed(0)
    report = {
        **facts(cpu=not gpu),
        'method': 'microseconds over rotating inputs: median, and smallest and largest, of 20',
    }
    roof = copy_gb_per_s() if gpu else None
    report['copy_gb_per_s'], report['rows'] = roof, []
    if LigerCrossEntropyFunction is None:
        print('Liger is left out: it is not installed')
    print(f'{report["device"]}: copy {roof or 0:.0f} GB/s', flush=True)
    for each in cases(args.dry_run):
        if args.only in each['name']:
            torch._dynamo.reset()
            report['rows'].append(measure(each, roof, gpu))
            print(report['rows'][-1]['name'], flush=True)
            write_json(args.out, report)
    print(f'\n{kernels(report)}')


if __name__ == '__main__':
    main()
