"""
The MLP of a block on Hopper GPUs: GELU and its gradient are computed by the matmuls before them (matmul_hopper.py).

    forward    x = input @ c_fc.T, h = gelu(x)        one kernel instead of two
               output = h @ c_proj.T
    backward   dx = (doutput @ c_proj) * gelu'(x)     one kernel instead of two
               dinput = dx @ c_fc,  and the gradients of both weights as in linear.py

A kernel of its own for GELU would read x again and do little else: 76 MB for 12 sequences of 1024 tokens and 3072
columns, and in backward 151 MB.
"""

import torch
from torch.autograd.function import once_differentiable

from . import hopper
from .device import num_multiprocessors
from .fp8_linear import active
from .linear import autocast_dtype, hush_cublaslt, rounded, weight_gradient
from .modules import Gelu, Linear


def matmul_gelu(a, b):
    """a (..., K) and b (N, K) -> x = a @ b.T and gelu(x), both (..., N)."""
    return hopper.matmul_hopper().matmul_gelu(a, b, num_multiprocessors(a.device))


def matmul_gelu_gradient(a, b, x):
    """a (..., K), b (K, N) and x (..., N) -> (a @ b) * gelu'(x), like x."""
    return hopper.matmul_hopper().matmul_gelu_gradient(a, b, x, num_multiprocessors(a.device))


class MLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, fc_weight, proj_weight, dtype):
        if input.is_cuda:
            hush_cublaslt()
        fc, proj = rounded(fc_weight, dtype), rounded(proj_weight, dtype)
        input = input.to(dtype).contiguous()
        x, h = matmul_gelu(input, fc)
        ctx.save_for_backward(input, x, h, fc, proj)
        ctx.fc_weight, ctx.proj_weight = fc_weight, proj_weight
        return hopper.linear(h, proj)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        input, x, h, fc, proj = ctx.saved_tensors
        need_input, need_fc, need_proj, _ = ctx.needs_input_grad
        dy, dinput, dfc, dproj = dy.contiguous(), None, None, None
        dx = matmul_gelu_gradient(dy, proj, x) if need_input or need_fc else None
        if need_proj:
            dproj = weight_gradient(ctx.proj_weight, dy.flatten(0, -2), h.flatten(0, -2))
        if need_input:
            dinput = hopper.input_gradient(dx, fc)
        if need_fc:
            dfc = weight_gradient(ctx.fc_weight, dx.flatten(0, -2), input.flatten(0, -2))
        return dinput, dfc, dproj, None


def plain(module, kind):
    """Returns whether the module is of this class and nobody has hooked into its forward or backward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks)


def fuses_gelu(x, c_fc, gelu, c_proj, dtype):
    """Returns whether MLPFunction can compute c_proj(gelu(c_fc(x))) in dtype, for training."""
    if not (plain(c_fc, Linear) and plain(gelu, Gelu) and plain(c_proj, Linear)):
        return False
    if not gelu.use_triton or gelu.approximate != 'none' or active(c_fc.fp8):
        return False
    weights = c_fc.weight, c_proj.weight
    if c_fc.bias is not None or c_proj.bias is not None or not all(w.dtype in (torch.float32, dtype) for w in weights):
        return False
    if type(x) is not torch.Tensor or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return hopper.fits(x, *weights, dtype=dtype)


def mlp(x, c_fc, gelu, c_proj):
    """
    Returns c_proj(gelu(c_fc(x))), (..., out), for x (..., in) and the modules Linear, Gelu and Linear. On a Hopper GPU
    in bfloat16, without biases and FP8, two kernels compute GELU and its gradient together with a matmul.
    """
    dtype = autocast_dtype(x) or x.dtype
    if not fuses_gelu(x, c_fc, gelu, c_proj, dtype):
        return c_proj(gelu(c_fc(x)))
    with torch.autocast(x.device.type, enabled=False):
        return MLPFunction.apply(x, c_fc.weight, c_proj.weight, dtype)
