"""
Causal attention with cuDNN, whose backward writes dq, dk and dv into one packed gradient.

One matmul computes q, k and v side by side, (B, T, 3C), and its backward needs their gradients in the same layout.
PyTorch's operator allocates three tensors for them, and a copy packs them. cuDNN can write to any strides, and the
optional package nvidia-cudnn-frontend calls it directly: 215 µs per layer of GPT-2 124M on an H200 instead of 244
(attention_h200.json). PyTorch's operator computes the gradients without this package, with dropout, and wherever
PyTorch itself would not choose cuDNN.

Sources of the strided gradients: llm.c's cudnn_att.cpp, and lightning-thunder (pull request 59).
"""

import os
from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

try:
    import cudnn
except (ImportError, OSError, AssertionError):  # the package is missing, or does not find cuDNN's library
    cudnn = None

Q, K, V, O, DO, STATISTICS, DQ, DK, DV = range(1, 10)  # ids of the tensors in cuDNN's graph


@cache
def handle(device):
    with torch.cuda.device(device):
        return cudnn.create_handle()


def backward_graph(device, dtype, B, T, heads, size):
    """
    Returns cuDNN's graph of the backward for B sequences of T tokens, with execution plans to choose from. Raises an
    exception of the package if cuDNN does not support it.
    """
    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=types.BFLOAT16 if dtype == torch.bfloat16 else types.HALF,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        handle=handle(device),
    )
    shape, width = (B, heads, T, size), heads * size
    packed = (T * 3 * width, size, 3 * width, 1)  # strides of q, k or v in (B, T, 3C)
    joined = (T * width, size, width, 1)  # strides of the heads in (B, T, C)
    q, k, v = (graph.tensor(dim=shape, stride=packed, uid=uid) for uid in (Q, K, V))
    o, do = (graph.tensor(dim=shape, stride=joined, uid=uid) for uid in (O, DO))
    statistics = graph.tensor(dim=(B, heads, T, 1), stride=(heads * T, T, 1, 1), uid=STATISTICS, data_type=types.FLOAT)
    grads = graph.sdpa_backward(
        q=q, k=k, v=v, o=o, dO=do, stats=statistics, attn_scale=size**-0.5, use_causal_mask=True
    )
    for uid, grad in zip((DQ, DK, DV), grads):
        grad.set_output(True).set_dim(shape).set_stride(packed).set_uid(uid)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    return graph


@cache
def backward_plan(device, dtype, B, T, heads, size):
    """
    Returns (graph, bytes of workspace), built with plan 0, which is the fastest (benchmarks/bench_attention.py); a
    choice by timing could differ between runs. If cuDNN has no such plan, says so once and returns None.
    """
    try:
        graph = backward_graph(device, dtype, B, T, heads, size)
        graph.build_plan_at_index(0)
        return graph, graph.get_workspace_size_plan_at_index(0)
    except Exception as error:  # the package's exceptions have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if os.environ.get('RANK', '0') == '0':
            print(f"using PyTorch's attention backward: cuDNN cannot write packed gradients here ({reason})")
        return None


def launch_backward(plan, qkv, y, statistics, dy, index=0):
    """
    Returns dqkv (B, T, 3C), computed by the plan of this index from qkv (B, T, 3C), y and dy (B, T, C) and statistics
    (B, heads, T, 1). All are contiguous.
    """
    graph, workspace_bytes = plan
    dqkv = torch.empty_like(qkv)
    width, device = y.shape[-1], qkv.device
    x, dx, step = qkv.data_ptr(), dqkv.data_ptr(), width * qkv.element_size()
    pointers = {Q: x, K: x + step, V: x + 2 * step, DQ: dx, DK: dx + step, DV: dx + 2 * step}
    pointers |= {O: y.data_ptr(), DO: dy.data_ptr(), STATISTICS: statistics.data_ptr()}
    workspace = torch.empty(max(1, workspace_bytes), dtype=torch.uint8, device=device)
    cudnn.set_stream(handle=handle(device.index), stream=torch.cuda.current_stream(device).cuda_stream)
    graph.execute_plan_at_index(pointers, workspace.data_ptr(), index, handle=handle(device.index))
    return dqkv


def forward_by_cudnn(q, k, v):
    """
    Returns attention's output (B, heads, T, size) and the log-sum-exp of its scores (B, heads, T, 1) in float32, which
    cuDNN's backward needs.
    """
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[:2]


class PackedAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads, plan):
        q, k, v = split_heads(qkv, heads)
        out, statistics = forward_by_cudnn(q, k, v)
        y = join_heads(out)
        ctx.save_for_backward(qkv, y, statistics.contiguous())
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return launch_backward(ctx.plan, *ctx.saved_tensors, dy.contiguous()), None, None


def split_heads(qkv, heads, parts=3):
    """
    Returns q, k and v, each (B, heads, T, C / heads), as views of qkv (B, T, 3C). parts: the number of tensors that lie
    side by side; with parts=1, qkv is (B, T, C) and the list has one view.
    """
    B, T, width = qkv.shape
    C = width // parts
    return [part.view(B, T, heads, C // heads).transpose(1, 2) for part in qkv.split(C, dim=2)]


def join_heads(y):
    """Returns y (B, heads, T, size) as (B, T, C), with the heads side by side."""
    B, _, T, _ = y.shape
    return y.transpose(1, 2).reshape(B, T, -1)


def packed_plan(qkv, q, k, v):
    """Returns the plan of the packed backward, or None if PyTorch's operator should compute the gradients."""
    plain = type(qkv) is torch.Tensor and qkv.is_cuda and qkv.requires_grad and not torch.compiler.is_compiling()
    if cudnn is None or not plain or not torch.is_grad_enabled() or not qkv.is_contiguous():
        return None
    # PyTorch's choice respects the GPU, the shapes, deterministic algorithms and torch.nn.attention.sdpa_kernel
    if torch._fused_sdp_choice(q, k, v, None, 0.0, True) != SDPBackend.CUDNN_ATTENTION.value:
        return None
    B, heads, T, size = q.shape
    return backward_plan(qkv.device.index, qkv.dtype, B, T, heads, size)


def causal_attention(qkv, heads, dropout_p=0.0, packed=True):
    """
    Returns causal self-attention (B, T, C) for qkv (B, T, 3C), the queries, keys and values of all heads side by side.
    F.scaled_dot_product_attention computes it, except where cuDNN's packed backward is available. packed=False: do not
    use the packed backward.
    """
    q, k, v = split_heads(qkv, heads)
    plan = packed_plan(qkv, q, k, v) if packed and dropout_p == 0.0 else None
    if plan is not None:
        return PackedAttentionFunction.apply(qkv, heads, plan)
    return join_heads(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True))
