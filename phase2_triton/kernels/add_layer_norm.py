"""
Residual addition and LayerNorm in one kernel. The residual stream is read and written once in the forward and once in
the backward.

    x = x + branch,  y = layer_norm(x)
    backward: the gradient of both x and branch is dx + (the gradient from LayerNorm)

As separate operations, the addition reads two tensors and writes one, and LayerNorm reads that one again. The backward
adds the stream's gradient and LayerNorm's in another pass, and copies the result if branch is narrower than x. The
model's first LayerNorm has no branch to add, but it still has two gradients. The kernels are layer_norm.py's.
"""

import torch
from torch.autograd.function import once_differentiable

from .device import FLOAT_DTYPES, available
from .layer_norm import (
    MAX_BACKWARD_WIDTH,
    check_parameters,
    launch_backward,
    launch_forward,
    layer_norm,
    reference_dtype,
    runs_eagerly,
)
from .layer_norm_gradients import place_of_shares, read_early


class AddLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, out_dtype, slot, gradient_slot):
        y, stats, total = launch_forward(x, branch, weight, bias, eps, out_dtype, slot)
        ctx.save_for_backward(total, weight, stats)
        ctx.parameters, ctx.read_early = (weight, bias), read_early()
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.gradient_slot = gradient_slot
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        total, weight, stats = ctx.saved_tensors
        if dy is None:
            alone = dtotal is None or ctx.branch_dtype is None
            return dtotal, None if alone else dtotal.to(ctx.branch_dtype), None, None, None, None, None, None
        need_dw, need_db = ctx.needs_input_grad[2:4]
        place = place_of_shares(ctx, need_dw, need_db)
        bias_dtype = None if ctx.parameters[1] is None else ctx.parameters[1].dtype
        dx, dw, db, dbranch = launch_backward(
            dy,
            total,
            weight,
            bias_dtype,
            stats,
            True,
            need_dw,
            need_db,
            dtotal,
            ctx.branch_dtype,
            place,
            ctx.gradient_slot,
        )
        return dx, None if ctx.branch_dtype is None else dbranch, dw, db, None, None, None, None


def add_layer_norm(x, branch, weight, bias=None, eps=1e-5, out_dtype=None, slot=None, gradient_slot=None):
    """
    Returns (x + branch, layer_norm(x + branch, weight, bias, eps, out_dtype)), by one Triton kernel where it can run,
    and otherwise by two operations.

    x: (..., N), float32, bfloat16 or float16. branch: the same shape in the same or a narrower dtype, or None to add
    nothing. The sum has the dtype of x and is rounded to it before the normalization. slot, gradient_slot: the
    fp8.Slots in which the kernels also write the second result, for the matmul that follows, and the gradient of the
    branch, for the matmul that computed it. See layer_norm for the rest. Raises ValueError for a branch of another
    shape or device.
    """
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f'add_layer_norm: branch has shape {tuple(branch.shape)}, x {tuple(x.shape)}')
    if branch is not None and branch.device != x.device:
        raise ValueError(f'add_layer_norm: branch is on {branch.device}, x on {x.device}')
    check_parameters(x, weight, bias)
    same = x.dtype in FLOAT_DTYPES and (branch is None or torch.promote_types(x.dtype, branch.dtype) == x.dtype)
    if not (
        runs_eagerly(x)
        and same
        and weight.dtype in FLOAT_DTYPES
        and 0 < x.shape[-1] <= MAX_BACKWARD_WIDTH
        and available(x.device)
    ):
        total = x if branch is None else x + branch
        return total, layer_norm(total, weight, bias, eps, out_dtype)
    if out_dtype is None:
        out_dtype = reference_dtype(x)
    return AddLayerNormFunction.apply(x, branch, weight, bias, eps, out_dtype, slot, gradient_slot)
