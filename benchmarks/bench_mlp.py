"""
Measures whether GELU costs less inside a matmul: several ways to compute a block's MLP from its first matmul to GELU,
on one GPU.

    python benchmarks/bench_mlp.py --out=benchmarks/results/mlp.json    # about 3 minutes on an H100
    TRITON_INTERPRET=1 python benchmarks/bench_mlp.py --dry-run --out=/tmp/mlp.json  # tiny, on a CPU: checks results

Forward: pre = x @ w_fc.T (M, 4C) from x (M, C), and act = gelu(pre); both are kept. Backward: dpre = (dy @ w_proj) *
gelu'(pre) from dy (M, C). The MLP's other matmuls are left out, because all ways share them. Everything is bfloat16.

separate:  cuBLAS, then kernels/gelu.py, as in the Triton model
rows / n:  the same in n parts of the rows, so that GELU reads the matmul's result from L2 cache
fused:     a Triton matmul with GELU in its epilogue, at the fastest of several tile sizes. The same matmul without
           GELU, next to cuBLAS's, shows how much the matmul itself loses to cuBLAS.

Times are medians of CUDA-graph replays; the ways take turns, five times. A way is worth it if it is faster at the sizes
of GPT-2 124M and no slower at the others.
"""

import argparse
import statistics
import sys
import time

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from bench_layer_norm import graph_us
from common import facts, first_line, write_json
from kernels import gelu as gelu_kernels
from kernels.device import interpreted, jit, num_multiprocessors, tl
from kernels.gelu import launch_elementwise, normal
from tables import markdown, table, with_spread

dtype = torch.float16 if interpreted else torch.bfloat16  # the interpreter cannot multiply bfloat16 matrices
PLAIN, FORWARD, BACKWARD = 0, 1, 2


@jit
def matmul_gelu_kernel(
    a,  # (M, K)
    b,  # (N, K) if B_ROWS, else (K, N)
    pre,  # (M, N): written by FORWARD, read by BACKWARD
    out,  # (M, N): the product (PLAIN), gelu(product) (FORWARD), product * gelu'(pre) (BACKWARD)
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,  # rows of tiles that are computed together, so that they share columns of b in cache
    MODE: tl.constexpr,
    B_ROWS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP * tiles_n)
        rows = tl.minimum(GROUP, tiles_m - group * GROUP)
        within = tile - group * GROUP * tiles_n
        m, n = (group * GROUP + within % rows) * BM, within // rows * BN
        product = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK):
            if B_ROWS:
                product = tl.dot(a.load([m, k]), b.load([n, k]).T, product)
            else:
                product = tl.dot(a.load([m, k]), b.load([k, n]), product)
        if MODE == 0:
            out.store([m, n], product.to(out.dtype))
        elif MODE == 1:
            rounded = product.to(out.dtype)
            pre.store([m, n], rounded)
            x = rounded.to(tl.float32)
            cdf, _ = normal(x, False)
            out.store([m, n], (x * cdf).to(out.dtype))
        else:
            x = pre.load([m, n]).to(tl.float32)
            cdf, pdf = normal(x, False)
            out.store([m, n], (product.to(out.dtype).to(tl.float32) * (cdf + x * pdf)).to(out.dtype))


def fused(a, b, pre, out, mode, tiles):
    """
    Writes the result to out and returns it. tiles: (BM, BN, BK, warps, stages, programs per multiprocessor); with 0
    programs, each tile has a program of its own.
    """
    bm, bn, bk, warps, stages, programs = tiles
    (M, K), N, b_rows = a.shape, out.shape[1], mode == FORWARD or (mode == PLAIN and b.shape[1] == a.shape[1])
    describe = TensorDescriptor.from_tensor
    arguments = (
        describe(a, [bm, bk]),
        describe(b, [bn, bk] if b_rows else [bk, bn]),
        describe(pre, [bm, bn]),
        describe(out, [bm, bn]),
    )
    count = -(-M // bm) * -(-N // bn)
    grid = min(count, programs * num_multiprocessors(a.device)) if programs else count
    matmul_gelu_kernel[(grid,)](*arguments, M, N, K, bm, bn, bk, 8, mode, b_rows, num_warps=warps, num_stages=stages)
    return out


# with two programs per multiprocessor, one computes GELU while the other multiplies
all_tiles = [
    (128, 128, 64, 4, 2, 0),
    (128, 128, 64, 4, 2, 2),
    (128, 128, 32, 4, 4, 0),
    (128, 128, 32, 4, 4, 2),
    (64, 128, 64, 4, 3, 0),
    (128, 128, 64, 8, 3, 0),
    (128, 128, 64, 8, 4, 1),
    (128, 256, 64, 8, 3, 0),
    (128, 256, 64, 8, 3, 1),
    (256, 128, 64, 8, 3, 0),
]


def forward_in_rows(x, w, pre, act, parts):
    for rows in row_slices(len(x), parts):
        torch.mm(x[rows], w.t(), out=pre[rows])
        launch_elementwise(gelu_kernels.forward_kernel, pre[rows], act[rows])


def backward_in_rows(dy, w, pre, dpre, parts):
    # all parts use the same memory, which therefore stays in cache
    product = torch.empty(-(-len(dy) // parts), dpre.shape[1], dtype=dtype, device=dy.device)
    for rows in row_slices(len(dy), parts):
        part = torch.mm(dy[rows], w, out=product[: len(dy[rows])])
        launch_elementwise(gelu_kernels.backward_kernel, part, pre[rows], dpre[rows])


def row_slices(M, parts):
    step = -(-M // parts)
    return [slice(start, min(M, start + step)) for start in range(0, M, step)]


def measure(M, C, args, row):
    x, dy, pre, act, dpre = (torch.randn(M, n, device=device, dtype=dtype) for n in (C, C, 4 * C, 4 * C, 4 * C))
    w_fc, w_proj = (
        torch.randn(4 * C, C, device=device, dtype=dtype) * 0.05,
        torch.randn(C, 4 * C, device=device, dtype=dtype) * 0.05,
    )
    forward_in_rows(x, w_fc, pre, act, 1)
    backward_in_rows(dy, w_proj, pre, dpre, 1)
    expected = dict(pre=pre.clone(), act=act.clone(), dpre=dpre.clone())
    ways = {}
    for parts in (1, 2, 3, 4, 6, 8):
        name = 'separate' if parts == 1 else f'rows / {parts}'
        ways['forward', name] = lambda parts=parts: forward_in_rows(x, w_fc, pre, act, parts)
        ways['backward', name] = lambda parts=parts: backward_in_rows(dy, w_proj, pre, dpre, parts)
    ways['forward', 'cuBLAS without GELU'] = lambda: torch.mm(x, w_fc.t(), out=pre)
    ways['backward', 'cuBLAS without GELU'] = lambda: torch.mm(dy, w_proj, out=dpre)
    for tiles in [(16, 16, 16, 4, 2, 0), (16, 32, 16, 4, 2, 1)] if args.dry_run else all_tiles:
        for direction, a, b, mode in (('forward', x, w_fc, FORWARD), ('backward', dy, w_proj, BACKWARD)):
            # fill the results with NaN, so that a kernel that writes nothing fails the check
            out, kept = (
                torch.full_like(act, float('nan')),
                pre if mode == BACKWARD else torch.full_like(pre, float('nan')),
            )
            try:
                fused(a, b, kept, out, mode, tiles)
                for name, got, want in (
                    ('out', out, expected['act' if mode == FORWARD else 'dpre']),
                    ('pre', kept, expected['pre']),
                ):
                    error = (got.float() - want.float()).norm() / want.float().norm()
                    assert error < 4e-3, f'{name}: relative error {error:.1e}'  # bfloat16 rounds by up to 4e-3
            except Exception as error:  # too much shared memory for this GPU, for instance
                if args.dry_run:
                    raise
                print(f'{direction} {tiles}: {first_line(error)[:100]}')
                continue
            result = act if mode == FORWARD else dpre
            ways[direction, f'fused {tiles}'] = lambda a=a, b=b, result=result, mode=mode, tiles=tiles: fused(
                a, b, pre, result, mode, tiles
            )
    if args.dry_run:
        for function in ways.values():
            function()
        for direction in ('forward', 'backward'):
            ways[direction, 'rows / 3']()
        assert torch.equal(act, expected['act']) and torch.equal(dpre, expected['dpre'])
        return print(f'{M} x {C}: {len(ways)} ways run')
    for direction, a, b in (('forward', x, w_fc), ('backward', dy, w_proj)):
        once = {key: time_us(way) for key, way in ways.items() if key[0] == direction and key[1].startswith('fused')}
        for key in sorted(once, key=once.get)[2:]:  # measure only the two fastest again
            del ways[key]
        for tiles in [tuple(map(int, key[1][7:-1].split(', '))) for key in ways if key in once]:
            ways[direction, f'Triton without GELU {tiles}'] = lambda a=a, b=b, tiles=tiles: fused(
                a, b, pre, dpre, PLAIN, tiles
            )
    times = {key: [] for key in ways}
    for _ in range(args.repetitions):
        for key, way in ways.items():
            times[key].append(time_us(way))
    for (direction, name), us in sorted(times.items(), key=lambda item: (item[0][0], statistics.median(item[1]))):
        median, base = statistics.median(us), statistics.median(times[direction, 'separate'])
        row(dict(M=M, C=C, direction=direction, name=name, us=us, of_separate=median / base))


@table('mlp_*')
def mlp(report):
    cells = [
        (
            f'{row["M"]} × {row["C"]}',
            row['direction'],
            row['name'],
            with_spread(row['us'], 1),
            f'{row["of_separate"]:.2f}',
        )
        for row in report['rows']
    ]
    return markdown(['tokens × width', '', 'way (tile sizes)', 'µs', 'of separate'], cells)


def time_us(function):
    return graph_us([function])[0]


def main():
    global device
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True)
    parser.add_argument('--repetitions', type=int, default=5)
    parser.add_argument('--dry-run', action='store_true')
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit('bench_mlp.py: needs a CUDA GPU')
    device = 'cpu' if args.dry_run else 'cuda'
    report, began = {**facts(cpu=args.dry_run), 'rows': []}, time.time()
    for M, C in [(48, 32)] if args.dry_run else [(12288, 768), (32768, 768), (8192, 1600)]:
        measure(M, C, args, report['rows'].append)
        write_json(args.out, report)
    print(f'{time.time() - began:.0f} s\n\n{mlp(report)}')


if __name__ == '__main__':
    main()
