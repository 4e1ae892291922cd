"""
The sum of token and position embeddings in one kernel, and both gradients in another.

    x[b, t] = wte[idx[b, t]] + wpe[t]
    dwte[idx[b, t]] += dx[b, t]
    dwpe[t] = sum over b of dx[b, t]

PyTorch needs three kernels for the forward and five for the backward, three of which read all of dx. Here, dx is read
once. The output layer has the same weight and has left its gradient in wte.grad (see linear.py); the kernel adds dwte
to it with atomics, as PyTorch does, so gradients of the same token are added in no fixed order. dwpe is summed in a
fixed order.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .device import available, jit, tl, triton
from .launch import Config, launch
from .linear import can_leave_gradient, take_gradient


@jit
def forward_kernel(
    idx_ptr,  # (B * T,) int64
    wte_ptr,  # (V, N)
    wpe_ptr,  # (T or more, N)
    x_ptr,  # (B * T, N)
    T,
    V,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: B * T * N may exceed 2^31
    cols = tl.arange(0, BLOCK)
    token = tl.load(idx_ptr + row)
    inside = (token >= 0) & (token < V)
    tok = tl.load(wte_ptr + token * N + cols, mask=(cols < N) & inside, other=float('nan'))
    pos = tl.load(wpe_ptr + row % T * N + cols, mask=cols < N)
    tl.store(x_ptr + row * N + cols, (tok + pos).to(x_ptr.dtype.element_ty), mask=cols < N)


@jit
def backward_kernel(
    idx_ptr,  # (B, T) int64
    dx_ptr,  # (B, T, N)
    dwte_ptr,  # (V, N) float32, added to
    dwpe_ptr,  # (T or more, N) float32, added to if ADD, else written; neither unless NEED_DWPE
    B,
    T,
    V,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    NEED_DWPE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for b in tl.range(0, B):
        token = tl.load(idx_ptr + b * T + t)
        dx = tl.load(dx_ptr + (b * T + t) * N + cols, mask=cols < N, other=0.0).to(tl.float32)
        inside = (token >= 0) & (token < V)
        tl.atomic_add(dwte_ptr + token * N + cols, dx, mask=(cols < N) & inside, sem='relaxed')
        total += dx
    if NEED_DWPE:
        if ADD:
            total += tl.load(dwpe_ptr + t * N + cols, mask=cols < N, other=0.0)
        tl.store(dwpe_ptr + t * N + cols, total, mask=cols < N)


class EmbeddingsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, wte, wpe, dtype):
        (B, T), (V, N) = idx.shape, wte.shape
        x = torch.empty((B, T, N), dtype=dtype, device=idx.device)
        c = Config(1, triton.next_power_of_2(N), 4)
        if x.numel() > 0:
            launch(forward_kernel, (B * T,), (idx, wte, wpe, x), (T, V), (N, c.chunk), c)
        ctx.save_for_backward(idx)
        ctx.wte, ctx.wpe = wte, wpe
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        (idx,) = ctx.saved_tensors
        (B, T), (V, N) = idx.shape, ctx.wte.shape
        need_dwpe = ctx.needs_input_grad[2]
        dwte = take_gradient(ctx.wte)
        if dwte is None:
            dwte = torch.zeros_like(ctx.wte)
        dwpe = take_gradient(ctx.wpe) if need_dwpe else None
        add = dwpe is not None
        if need_dwpe and not add:
            dwpe = torch.zeros_like(ctx.wpe)  # positions beyond T have no gradient
        c = Config(1, min(1024, triton.next_power_of_2(N)), 4)
        if dx.numel() > 0:
            tensors = idx, dx.contiguous(), dwte, dwpe if need_dwpe else dwte
            grid = T, -(-N // c.chunk)
            launch(backward_kernel, grid, tensors, (B, T, V), (N, c.chunk, add, need_dwpe), c)
        return None, dwte, dwpe, None


def embeddings(idx, wte, wpe, dtype=None, use_triton=True):
    """
    Returns F.embedding(idx, wte) + wpe[:T], (B, T, C), for idx (B, T) int64, wte (V, C) and wpe (at least T, C). dtype:
    of the result; None: the weights'. The kernel returns NaN for a token outside the vocabulary. use_triton=False: use
    PyTorch's functions.
    """
    ordinary = type(wpe) in (torch.Tensor, torch.nn.Parameter) and wpe.is_leaf and wpe.dtype == torch.float32
    plain = can_leave_gradient(wte) and ordinary and wte.is_contiguous() and wpe.is_contiguous()
    if torch.compiler.is_compiling() or not (use_triton and plain and available(idx.device)):
        x = F.embedding(idx, wte) + F.embedding(torch.arange(idx.size(1), device=idx.device), wpe)
        return x if dtype is None else x.to(dtype)
    return EmbeddingsFunction.apply(idx.contiguous(), wte, wpe, dtype or wte.dtype)
