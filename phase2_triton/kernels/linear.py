"""Linear layers under autocast, with the weight's gradient made in float32 and added to weight.grad by the matmul itself, and the weight
rounded to 16 bits once an iteration.

Autocast writes a weight's gradient in 16 bits (2 bytes an element), casts it to float32 (reads 2, writes 4) and adds it to weight.grad
(reads 4 + 4, writes 4): 20 bytes in every micro-step. cuBLAS can add to float32 as it writes: 8.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from .device import available

half_dtypes = (torch.bfloat16, torch.float16)


def autocast_dtype(x):
    """The 16-bit dtype in which autocast computes matmuls where x is, or None."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return dtype if dtype in half_dtypes else None


def take_gradient(weight):
    """weight.grad, taken out to be added to in place, or None. Autograd then finds no gradient and keeps what backward returns, hooks and all."""
    grad = weight.grad
    if grad is None or grad.dtype != torch.float32 or not grad.is_contiguous() or torch.is_grad_enabled():
        return None
    weight.grad = None
    return grad


def weight_gradient(weight, dy, x):
    """
    What a backward returns for weight (out, in): dy.T @ x of dy (M, out) and x (M, in). On a GPU with a float32 weight and 16-bit dy and x it
    is summed in float32 and includes weight.grad, which is taken out.
    """
    if not (dy.is_cuda and dy.dtype in half_dtypes and weight.dtype == torch.float32):
        return (dy.t() @ x).to(weight.dtype)
    grad = take_gradient(weight)
    if grad is None:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.addmm(grad, dy.t(), x, out_dtype=torch.float32, out=grad)


def can_leave_gradient(weight):
    """Whether gradients of weight, a parameter that is used twice, may wait in weight.grad for the last of them; see leave_gradient."""
    return weight.is_leaf and weight.requires_grad and weight.dtype == torch.float32 and type(weight) in (torch.Tensor, torch.nn.Parameter)


def leave_gradient(weight, dw):
    """
    Puts dw where a later backward of the same weight finds it with take_gradient, and returns None for autograd. So the gradient of a
    weight that is both embedding and output layer is made in one place; else autograd adds two tensors, one of them mostly zeros.
    """
    weight.grad = dw if weight.grad is None else weight.grad.add_(dw)


steps = 0  # of all of torch.optim's optimizers


def count_step(*_):
    global steps
    steps += 1


register_optimizer_step_post_hook(count_step)


def same_as_before(weight, then):
    """
    Whether weight is what it was `then`, at (version counter, steps of optimizers). While its gradient adds up it should be; steps tell of
    an optimizer that leaves gradients in place, filled with zeros, and fused ones do not move the version counter, which others do.
    """
    return weight.grad is not None and then == (weight._version, steps)


def rounded(weight, dtype):
    """
    weight in a 16-bit dtype; in the micro-steps of an iteration after the first the copy that the first has made. It stays where it is, and
    the first writes it anew, so that CUDA graphs of either kind of micro-step agree on it. Not kept where there is one micro-step.
    """
    if weight.dtype == dtype or not weight.is_leaf:
        return weight.to(dtype)
    copy, then = getattr(weight, 'rounded', (None, None))
    if copy is None or copy.dtype != dtype or copy.device != weight.device:
        copy = weight.detach().to(dtype)
        if weight.grad is not None or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            weight.rounded = copy, (weight._version, steps)
    elif not same_as_before(weight, then):
        # a backward that still needs the old values ends with autograd's message about changes in place; of the same values it may have them
        (copy.data if then == (weight._version, steps) else copy).copy_(weight.detach())
        weight.rounded = copy, (weight._version, steps)
    return copy


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        x, w = x.to(dtype), rounded(weight, dtype)
        ctx.save_for_backward(x, w)
        ctx.weight = weight
        return F.linear(x, w, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_dx, need_dw, need_db, _ = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        dx = dy @ w if need_dx else None
        dw = weight_gradient(ctx.weight, rows, x.flatten(0, -2)) if need_dw else None
        db = rows.sum(0, dtype=torch.float32) if need_db else None
        return dx, dw, db, None


def linear(x, weight, bias=None):
    """
    torch.nn.functional.linear(x, weight, bias) for x (..., in), weight (out, in), bias (out,) or None; result (..., out). Under autocast to
    16 bits, with float32 weights, their gradients are float32 throughout.
    """
    dtype = autocast_dtype(x)
    plain = type(x) is torch.Tensor and weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    if dtype is None or not plain or not available(x.device):
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return LinearFunction.apply(x, weight, bias, dtype)
