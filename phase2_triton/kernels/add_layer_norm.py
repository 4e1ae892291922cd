"""Residual addition and LayerNorm in one kernel: the residual stream is read and written once forward and once backward.

    x = x + branch;  y = layer_norm(x)          d = dx + (the gradient that LayerNorm's backward sends to x), for x and for branch

By itself the addition reads two tensors and writes one, LayerNorm reads that one again, and backward adds the gradient of the
stream and LayerNorm's in a pass of their own, with a copy where branch is narrower than x. The kernels are layer_norm.py's.
"""

import torch
from torch.autograd.function import once_differentiable

from .device import available
from .layer_norm import check_parameters, float_dtypes, launch_backward, launch_forward, layer_norm, reference_dtype

max_width = 12_288  # rows are kept in registers


class AddLayerNormFunction(torch.autograd.Function):
    """Under eager autograd."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, out_dtype):
        y, stats, total = launch_forward(x, branch, weight, bias, eps, out_dtype)
        ctx.save_for_backward(total, weight, stats)
        ctx.bias_dtype, ctx.branch_dtype = None if bias is None else bias.dtype, branch.dtype
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        total, weight, stats = ctx.saved_tensors
        if dy is None:
            return dtotal, None if dtotal is None else dtotal.to(ctx.branch_dtype), None, None, None, None
        need_dw, need_db = ctx.needs_input_grad[2:4]
        dx, dw, db, dbranch = launch_backward(
            dy, total, weight, ctx.bias_dtype, stats, True, need_dw, need_db, dtotal, ctx.branch_dtype
        )
        return dx, dbranch, dw, db, None, None


@torch.library.custom_op(
    'nanogpt::add_layer_norm',
    mutates_args=(),
    schema='(Tensor x, Tensor branch, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)',
)
def add_layer_norm_op(x, branch, weight, bias, eps, out_dtype):
    """launch_forward for torch.compile."""
    y, stats, total = launch_forward(x, branch, weight, bias, eps, out_dtype)
    return total, y, stats


@add_layer_norm_op.register_fake
def _(x, branch, weight, bias, eps, out_dtype):
    total, y = (torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in (x.dtype, out_dtype))
    return total, y, x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)


@torch.library.custom_op(
    'nanogpt::add_layer_norm_backward',
    mutates_args=(),
    schema='(Tensor dtotal, Tensor dy, Tensor total, Tensor weight, Tensor stats, bool has_bias, ScalarType branch_dtype)'
    ' -> (Tensor, Tensor, Tensor, Tensor)',
)
def add_layer_norm_backward_op(dtotal, dy, total, weight, stats, has_bias, branch_dtype):
    """launch_backward; results of an operator may not be one tensor twice, so what is not needed comes back empty."""
    dx, dw, db, dbranch = launch_backward(
        dy, total, weight, weight.dtype, stats, True, True, has_bias, dtotal, branch_dtype
    )
    return dx, dx.new_empty(0) if dbranch is dx else dbranch, dw, dw.new_empty(0) if db is None else db


@add_layer_norm_backward_op.register_fake
def _(dtotal, dy, total, weight, stats, has_bias, branch_dtype):
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dbranch = dx.new_empty(0) if branch_dtype == total.dtype else torch.empty_like(dx, dtype=branch_dtype)
    return dx, dbranch, weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


def _setup_context(ctx, inputs, output):
    _, branch, weight, bias, _, _ = inputs
    ctx.save_for_backward(output[0], weight, output[2])
    ctx.branch_dtype, ctx.has_bias = branch.dtype, bias is not None
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, dtotal, dy, _):
    total, weight, stats = ctx.saved_tensors
    dx, dbranch, dw, db = add_layer_norm_backward_op(dtotal, dy, total, weight, stats, ctx.has_bias, ctx.branch_dtype)
    return dx, dx if ctx.branch_dtype == total.dtype else dbranch, dw, db if ctx.has_bias else None, None, None


add_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def add_layer_norm(x, branch, weight, bias=None, eps=1e-5, out_dtype=None):
    """
    (x + branch, layer_norm(x + branch, weight, bias, eps, out_dtype)) by one Triton kernel where it can run, else by two operations.

    x (..., N), float32, bfloat16 or float16; branch of the same shape in the same or a narrower dtype. The sum has the dtype of x;
    it is rounded to that before it is normalized. Otherwise see layer_norm. Raises ValueError for a branch of another shape or device.
    """
    if branch.shape != x.shape:
        raise ValueError(f'add_layer_norm: branch has shape {tuple(branch.shape)}, x {tuple(x.shape)}')
    if branch.device != x.device:
        raise ValueError(f'add_layer_norm: branch is on {branch.device}, x on {x.device}')
    check_parameters(x, weight, bias)
    same = x.dtype in float_dtypes and torch.promote_types(x.dtype, branch.dtype) == x.dtype
    if not (same and weight.dtype in float_dtypes and 0 < x.shape[-1] <= max_width and available(x.device)):
        total = x + branch
        return total, layer_norm(total, weight, bias, eps, out_dtype)
    if out_dtype is None:
        out_dtype = reference_dtype(x)
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return add_layer_norm_op(x, branch, weight, bias, eps, out_dtype)[:2]
    return AddLayerNormFunction.apply(x, branch, weight, bias, eps, out_dtype)
