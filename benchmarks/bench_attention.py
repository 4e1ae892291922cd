"""
Measures attention's backward on one GPU: PyTorch's operator with the copy that packs its gradients, against each
execution plan of cuDNN that writes them packed.

    pip install -e '.[cudnn]'
    python benchmarks/bench_attention.py --out=benchmarks/results/attention.json        # about 20 seconds on an H200

Times are CUDA-graph replays of 12 calls, taken in turns. An error is the norm of dqkv's difference from float32,
relative to the norm of dqkv. kernels/attention.py uses plan 0.
"""

import argparse

import torch
from torch.nn import functional as F

from bench_layer_norm import graph_us
from common import facts, first_line, write_json
from kernels import attention
from tables import markdown, table, with_spread

sizes = {'124M': (12, 1024, 12, 64), '124M, 32 sequences': (32, 1024, 12, 64), '1.5B': (8, 1024, 25, 64)}


def by_pytorch(qkv, heads, saved, dy):
    """Returns dqkv, computed by PyTorch's operator and packed by a copy, as autograd does."""
    q, k, v = attention.split_heads(qkv, heads)
    out, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, _ = saved
    dy = attention.split_heads(dy, heads, parts=1)[0]
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dy, q, k, v, out, logsumexp, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True
    )
    return torch.cat([attention.join_heads(grad) for grad in grads], dim=-1)


def measure(name, repetitions):
    B, T, heads, size = sizes[name]
    width = heads * size
    qkv, dy = (torch.randn(B, T, n * width, device='cuda').bfloat16() for n in (3, 1))
    exact = qkv.float().requires_grad_()
    q, k, v = attention.split_heads(exact, heads)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        attention.join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)).backward(dy.float())
    saved = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *attention.split_heads(qkv, heads), None, True, 0.0, True
    )
    y, statistic = attention.join_heads(saved[0]), saved[1]
    ways = {'PyTorch and a copy': lambda: by_pytorch(qkv, heads, saved, dy)}
    graph = attention.backward_graph(0, qkv.dtype, B, T, heads, size)
    for i in range(graph.get_execution_plan_count()):
        try:
            graph.build_plan_at_index(i)
            plan = graph, graph.get_workspace_size_plan_at_index(i)
            ways[f'plan {i}'] = lambda plan=plan, i=i: attention.launch_backward(plan, qkv, y, statistic, dy, i)
            ways[f'plan {i}']()
        except Exception as error:  # a plan that does not run here
            del ways[f'plan {i}']
            print(f'{name}, plan {i}: {first_line(error)[:100]}')
    times = {way: [] for way in ways}
    for _ in range(repetitions):
        for way, function in ways.items():
            times[way].append(graph_us([function] * 12)[0])
    return [
        dict(
            size=name,
            way=way,
            us=times[way],
            error=((function().float() - exact.grad).norm() / exact.grad.norm()).item(),
        )
        for way, function in ways.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='path of the JSON file with everything measured')
    parser.add_argument('--repetitions', type=int, default=3)
    args = parser.parse_args()
    if attention.cudnn is None or not torch.cuda.is_available():
        parser.error('this needs a CUDA GPU and nvidia-cudnn-frontend: pip install -e ".[cudnn]"')
    rows = [row for name in sizes for row in measure(name, args.repetitions)]
    report = {**facts(), 'rows': rows}
    write_json(args.out, report)
    print(attention_backward(report))


@table('attention_*')
def attention_backward(report):
    cells = [(row['size'], row['way'], with_spread(row['us'], 1), f'{row["error"]:.2e}') for row in report['rows']]
    return markdown(["attention's backward", '', 'µs', 'error against float32'], cells)


if __name__ == '__main__':
    main()
