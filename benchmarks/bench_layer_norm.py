"""
Measures LayerNorm alone on one GPU: eager, torch.compile, Liger (if installed) and ours in Triton, relative to the
bandwidth of a copy.

    python benchmarks/bench_layer_norm.py --out=benchmarks/results/layer_norm.json  # about 2 minutes on an H100
    python benchmarks/bench_layer_norm.py --tune --out=tune.json  # tries launch configurations; about 2 minutes
    TRITON_INTERPRET=1 python benchmarks/bench_layer_norm.py --dry-run --out=/tmp/layer_norm.json   # tiny, on a CPU

Times are replays of a CUDA graph over rotating inputs, so they contain no gaps between launches and no cache hits.
Percentages are of the bandwidth of a 256 MiB device-to-device copy, the larger of one before and one after. A forward
counts as 2 passes over x (read x, write y), forward + backward as 5 (then read x and dy, write dx).
"""

import argparse
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context

import torch
import torch._functorch.config
from torch.nn import functional as F

from common import ROOT, facts, first_line, write_json
from tables import markdown, table

sys.path.append(str(ROOT / 'phase2_triton'))
import kernels

ours, gradients = sys.modules['kernels.layer_norm'], sys.modules['kernels.layer_norm_gradients']
torch._functorch.config.donated_buffer = False  # the graph calls one backward several times
device = 'cuda'  # 'cpu' with --dry-run
shapes = [(12 * 1024, 768), (32 * 1024, 768), (16 * 1024, 1600), (16 * 1024, 4096), (4 * 1024, 12288)]
dtypes = {'bf16': torch.bfloat16, 'fp32': torch.float32}
# dtypes of x, weight and y
mixes = [('bf16', 'bf16', 'bf16'), ('fp32', 'fp32', 'fp32'), ('bf16', 'fp32', 'bf16'), ('fp32', 'fp32', 'bf16')]


def graph_us(calls, replays=20):
    """
    Returns the median and (smallest, largest) microseconds of one call, from replays of a CUDA graph that makes each
    call once.
    """
    if device == 'cpu':
        return wall_us(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, stop = ([torch.cuda.Event(enable_timing=True) for _ in range(replays)] for _ in range(2))
    for a, b in zip(start, stop):
        a.record()
        graph.replay()
        b.record()
    torch.cuda.synchronize()
    us = sorted(a.elapsed_time(b) * 1e3 / len(calls) for a, b in zip(start, stop))
    return us[replays // 2], (us[0], us[-1])


def wall_us(calls):
    """Replaces graph_us on a CPU, where it checks that everything runs and says nothing about speed."""
    us = []
    for call in calls:
        began = time.perf_counter()
        call()
        us.append((time.perf_counter() - began) * 1e6)
    return statistics.median(us), (min(us), max(us))


def copy_gb_per_s():
    size = 2**28 if device == 'cuda' else 2**16
    sources = [torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255) for _ in range(4)]
    target = torch.empty_like(sources[0])
    us, _ = graph_us([lambda s=s: target.copy_(s) for s in sources])
    return 2 * target.numel() / us / 1e3


def inputs(M, N, x_dtype, w_dtype, y_dtype):
    """Returns lists of x and of dy with more bytes than any cache holds, a weight and a bias."""
    copies = max(2, int(400e6 // (M * N * x_dtype.itemsize))) if device == 'cuda' else 2
    xs = [torch.randn(M, N, device=device, dtype=x_dtype, requires_grad=True) for _ in range(copies)]
    dys = [torch.randn(M, N, device=device, dtype=y_dtype) for _ in xs]
    weight, bias = (torch.randn(N, device=device, dtype=w_dtype, requires_grad=True) for _ in range(2))
    return xs, dys, weight, bias


def implementations(y_dtype):
    def eager(x, w, b):
        return F.layer_norm(x, w.shape, w, b).to(y_dtype)

    found = {'eager': eager, 'compiled': torch.compile(eager, dynamic=False)}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        found['liger'] = lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5).to(y_dtype)
    except ImportError as error:
        print(f'Liger left out: {error}')
    found['ours'] = lambda x, w, b: kernels.layer_norm(x, w, b, out_dtype=y_dtype)
    return found


def passes_gb(M, N, x, y):
    """Returns the GB moved by a forward (x, y) and by forward + backward (also x, dy, dx). x, y: bytes per element."""
    return M * N * (x + y) / 1e9, M * N * (x + y + x + y + x) / 1e9


def measure(mix, M, N, only):
    x_dtype, w_dtype, y_dtype = (dtypes[name] for name in mix)
    row = dict(x=mix[0], weight=mix[1], y=mix[2], M=M, N=N)
    xs, dys, w, b = inputs(M, N, x_dtype, w_dtype, y_dtype)
    with torch.no_grad():  # moves as many bytes as a forward: the limit for a kernel this short
        row['copy_us'] = graph_us([lambda x=x: torch.empty_like(x, dtype=y_dtype).copy_(x) for x in xs])
    torch._dynamo.reset()
    for name, f in implementations(y_dtype).items():
        if only and name not in only:
            continue
        try:
            with torch.no_grad():
                forward = graph_us([lambda x=x: f(x, w, b) for x in xs])
            both = graph_us(
                [lambda x=x, dy=dy: torch.autograd.grad(f(x, w, b), (x, w, b), dy) for x, dy in zip(xs, dys)]
            )
            row[name] = dict(forward_us=forward, both_us=both)
        except Exception as error:  # PyTorch's eager LayerNorm does not take bfloat16 x with float32 weights
            row[name] = dict(error=first_line(error)[:100])
    return row


def add_percentages(rows, roof):
    """Adds to each row its bandwidths in percent of the copy's, `roof`, in GB/s."""
    for row in rows:
        gb = passes_gb(row['M'], row['N'], dtypes[row['x']].itemsize, dtypes[row['y']].itemsize)
        row['copy_percent'] = 100 * gb[0] / row['copy_us'][0] * 1e6 / roof
        for r in (row.get(name, {}) for name in ('eager', 'compiled', 'liger', 'ours')):
            if 'forward_us' in r:
                r['forward_percent'], r['both_percent'] = (
                    100 * g / us[0] * 1e6 / roof for g, us in zip(gb, (r['forward_us'], r['both_us']))
                )


@table('layer_norm_h100')
def layer_norm(report):
    cells = []
    for row in report['rows']:
        its = [row.get(name, {}) for name in ('eager', 'compiled', 'liger', 'ours')]
        shares = [
            f'{r["forward_percent"]:.0f} · {r["both_percent"]:.0f}' if len(r) > 1 else 'refuses' * bool(r) for r in its
        ]
        us = [f'{r["forward_us"][0]:.1f} · {r["both_us"][0]:.1f}' for r in its[3:] if len(r) > 1] or ['']
        mix, shape = f'{row["x"]} / {row["weight"]} → {row["y"]}', f'{row["M"]} × {row["N"]}'
        cells.append((mix, shape, f'{row["copy_percent"]:.0f}', *shares[:3], f'**{shares[3]}**', *us))
    header = ['x / weight → y', 'shape', 'copy', *(f'{name} fwd · both' for name in ('eager', 'compiled', 'Liger'))]
    return markdown([*header, '**ours fwd · both**', 'ours µs'], cells)


# --tune compiles the candidates in parallel and then times them

reductions = [
    ours.Config(total // cols, cols, warps=warps, pdl=pdl)
    for cols in (8, 16, 32)
    for total in (4096, 8192)
    for warps in (4, 8)
    for pdl in (False, True)
]


def candidates(N, itemsize, backward):
    vector = 32 * 16 // itemsize
    for across in (1, 2, 4, 8, 16, 32):  # warps per row
        for chunk in {across * vector, across * vector // 2}:
            padded = -(-N // chunk) * chunk
            per_thread = padded // (32 * across)
            if not (16 // itemsize <= per_thread <= (56 if backward else 96 if N > 4096 else 64)):
                continue
            if chunk < across * vector and padded > 0.95 * -(-N // (2 * chunk)) * 2 * chunk:
                continue  # loads of half the width are worth it only if they pad less
            for warps in {across, max(4, across), max(8, across)} if across < 4 else {across, max(8, across)}:
                rows = warps // across
                if backward:
                    for prefetch in (False, True):
                        for registers in (0, 128, 168) if 20 <= per_thread <= 32 and across < 16 else (0,):
                            yield ours.Config(rows, chunk, warps, 1, prefetch=prefetch, registers=registers)
                else:
                    for more in (1, 2, 4) if per_thread <= 32 and across < 4 else (1,):
                        yield ours.Config(more * rows, chunk, warps)


def occupancies(config, backward):
    """Returns the numbers of programs per multiprocessor that are worth trying."""
    return tuple(k for k in (1, 2, 3, 4, 6, 8, 12, 16) if 8 <= k * config.warps <= 32) if backward else (0,)


class override:
    """Inside `with override(forward_config=config)`, that configuration is used for every shape."""

    def __init__(self, **configs):
        self.configs = configs

    def __enter__(self):
        modules = {name: gradients if name == 'reduce_config' else ours for name in self.configs}
        self.saved = [(module, name, getattr(module, name)) for name, module in modules.items()]
        for name, config in self.configs.items():
            setattr(modules[name], name, lambda *_, config=config: config)

    def __exit__(self, *_):
        for module, name, function in self.saved:
            setattr(module, name, function)


def compile_one(job):
    """Compiles a candidate into Triton's cache on the disk, in a worker process. Returns an error text or None."""
    N, mix, configs = job
    x, w, y = (dtypes[name] for name in mix)
    X, W = torch.zeros(4096, N, device='cuda', dtype=x), torch.ones(N, device='cuda', dtype=w)
    try:
        with override(**configs):
            if 'forward_config' in configs:
                ours.launch_forward(X, None, W, W, 1e-5, y)
            else:
                ours.launch_backward(X.to(y), X, W, w, torch.ones(2, 4096, device='cuda'), True, True, True)
        torch.cuda.synchronize()
    except Exception as error:
        return f'{job}: {type(error).__name__} {str(error)[:80]}'


def compile_all(pool, jobs):
    began = time.time()
    errors = pool.map(compile_one, jobs, chunksize=2)
    failed = {
        str(job[:2]) + str(next(iter(job[2].values()))._replace(programs=0)): error
        for job, error in zip(jobs, errors)
        if error
    }
    print(
        f'{len(jobs)} kernels compiled in {time.time() - began:.0f} s', *list(failed.values())[:5], sep='\n', flush=True
    )
    return failed


def tune(results, seconds, only, save):
    deadline = time.time() + seconds
    cases = [(M, N, mix, backward) for mix in mixes[:2] for M, N in shapes for backward in (False, True)]
    cases = [c for c in cases if re.search(only, f'{"backward" if c[3] else "forward"} {c[2][0]} {c[1]}')]
    name = {False: 'forward_config', True: 'backward_config'}
    pool = ProcessPoolExecutor(min(14, os.cpu_count()), mp_context=get_context('spawn'))
    kinds = dict.fromkeys(case[1:] for case in cases)
    failed = compile_all(
        pool, [(N, mix, {name[bw]: c}) for N, mix, bw in kinds for c in candidates(N, dtypes[mix[0]].itemsize, bw)]
    )
    summary = []
    for stage in (1, 2):
        if stage == 2:  # the best three with programmatic dependent launch, and the best with other reductions
            jobs = []
            for r in results:
                top = [c for _, c in r['tried'][:3]]
                jobs += [(r['N'], r['mix'], {name[r['backward']]: c._replace(pdl=True)}) for c in top]
                if r['backward'] and r['N'] in (768, 12288):
                    jobs += [(r['N'], r['mix'], {'reduce_config': c, name[True]: top[0]}) for c in reductions]
            compile_all(pool, jobs)
            pool.shutdown()
        for i, (M, N, mix, backward) in enumerate(cases):
            x_dtype, w_dtype, y_dtype = (dtypes[d] for d in mix)
            gb = passes_gb(M, N, x_dtype.itemsize, y_dtype.itemsize)
            needed = gb[1] - gb[0] if backward else gb[0]
            with torch.no_grad():
                xs, dys, w, b = inputs(M, N, x_dtype, w_dtype, y_dtype)
                stats = [ours.launch_forward(x, None, w, b, 1e-5, y_dtype)[1] for x in xs]

                def us(xs=xs, dys=dys, stats=stats, w=w, b=b, backward=backward, y_dtype=y_dtype, **configs):
                    if time.time() > deadline:
                        return float('inf')
                    with override(**configs):
                        if backward:
                            calls = [
                                lambda p=p: ours.launch_backward(p[0], p[1], w, w.dtype, p[2], True, True, True)
                                for p in zip(dys, xs, stats)
                            ]
                        else:
                            calls = [lambda x=x: ours.launch_forward(x, None, w, b, 1e-5, y_dtype) for x in xs]
                        return graph_us(calls, 7)[0]

                if stage == 1:
                    todo = [
                        c._replace(programs=k)
                        for c in candidates(N, x_dtype.itemsize, backward)
                        for k in occupancies(c, backward)
                    ]
                    todo = [c for c in todo if str((N, mix)) + str(c._replace(programs=0)) not in failed]
                    tried = sorted((us(**{name[backward]: c}), c) for c in todo)
                    results.append(dict(backward=backward, M=M, N=N, mix=mix, gb=needed, default=us(), tried=tried))
                    save()
                else:
                    r = results[i]
                    r['pdl'] = sorted(
                        (us(**{name[backward]: c._replace(pdl=True)}), c._replace(pdl=True)) for _, c in r['tried'][:3]
                    )
                    best = min(r['tried'][0], r['pdl'][0])[1]
                    if backward:
                        r['reduced'] = sorted(
                            (us(reduce_config=c, **{name[True]: best}), c) for c in reductions if N in (768, 12288)
                        )
                    shown = r['tried'][:3] + r['pdl'][:1] + r.get('reduced', [])[:1]
                    case = f'{name[backward][:-7]:8s} {"/".join(mix[:2])} {M}x{N}'
                    found = '; '.join(f'{needed / t * 1e6:.0f} {tuple(map(int, c))}' for t, c in shown)
                    summary.append(f'{case}: default {needed / r["default"] * 1e6:.0f}; {found}')
    return 'GB/s of (rows, chunk, warps, programs, resident, prefetch, registers, pdl)\n' + '\n'.join(summary)


def main():
    global device
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument('--tune', action='store_true', help='try launch configurations instead of measuring the table')
    parser.add_argument(
        '--tune_seconds', type=float, default=240, help='seconds after which no more candidates are tried'
    )
    parser.add_argument('--tune_only', default='', help="regular expression of cases such as 'backward bf16 768'")
    parser.add_argument('--mixes', default='0,1,2,3', help='indices of the dtype combinations to measure')
    parser.add_argument(
        '--only', default='', help='comma-separated implementations to measure (eager,compiled,liger,ours); default all'
    )
    parser.add_argument('--dry-run', action='store_true', help='tiny shapes on a CPU, under TRITON_INTERPRET=1')
    args = parser.parse_args()
    if args.dry_run:
        device, args.tune, shapes[:] = 'cpu', False, [(8, 64)]
    elif not torch.cuda.is_available():
        sys.exit('bench_layer_norm.py: a benchmark of GPU kernels needs a CUDA GPU')
    torch.manual_seed(0)
    roof = copy_gb_per_s()
    report = facts(cpu=args.dry_run)
    print(f'{report["device"]}: copy {roof:.0f} GB/s', flush=True)
    report['method'] = (
        'CUDA-graph replays over rotating inputs; microseconds as [median, [smallest, largest]] of 20 replays'
    )
    try:
        report['versions']['liger'] = version('liger_kernel')
    except PackageNotFoundError:
        report['versions']['liger'] = None
    rows = report['rows'] = []
    # after every row, so that a run that is killed loses only the percentages
    save = lambda: write_json(args.out, report)
    if args.tune:
        text = tune(rows, args.tune_seconds, args.tune_only, save)
    else:
        for mix in [mixes[int(i)] for i in args.mixes.split(',')]:
            for M, N in shapes:
                rows.append(measure(mix, M, N, args.only.split(',') if args.only else None))
                save()
    roofs = [roof, copy_gb_per_s()]
    report['copy_gb_per_s'] = roofs
    if not args.tune:
        add_percentages(rows, max(roofs))
    save()
    print(f'copy {roofs[0]:.0f} and {roofs[1]:.0f} GB/s; % of it, forward and forward + backward')
    print(text if args.tune else layer_norm(report))


if __name__ == '__main__':
    main()
