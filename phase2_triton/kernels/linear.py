"""
Linear layers under autocast whose backward matmul adds the weight's gradient to weight.grad in float32.

Autocast writes the gradient in 16 bits (2 bytes per element), casts it to float32 (reads 2, writes 4) and adds it to
weight.grad (reads 4 + 4, writes 4): 20 bytes per element and micro-step. cuBLAS can add to float32 as it writes: 8.

In CUDA graphs, the weight is rounded to 16 bits once per iteration. For some shapes cuBLASLt computes the gradient,
because it chooses a faster kernel.
"""

import contextlib
import math
import warnings
from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .device import available

HALF_DTYPES = (torch.bfloat16, torch.float16)


def autocast_dtype(x):
    """Returns the 16-bit dtype in which autocast computes matmuls of x, or None."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return dtype if dtype in HALF_DTYPES and x.dtype != torch.float64 else None


def accumulates(weight):
    """
    Returns whether the backward in progress adds to weight.grad and no hook sees the gradient first. False inside
    autograd.grad. Prehooks of the accumulation node cannot be detected; they get the sum.
    """
    if not weight.is_leaf or weight._backward_hooks:
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:  # autograd.grad returns this gradient
        return False


def take_gradient(weight):
    """
    Removes weight.grad and returns it, for a backward that adds to it in place and returns it; autograd then stores it
    again. Returns None if there is no gradient or it cannot be added to in place.
    """
    grad = weight.grad if accumulates(weight) else None
    if grad is None or grad.dtype != torch.float32 or not grad.is_contiguous():
        return None
    weight.grad = None
    return grad


# Compute capability -> {shape (out, in) of a weight: (fewest, most) rows (tokens) for which cuBLASLt computes its
# gradient faster than cuBLAS, which splits the sum over the rows and adds the parts in a second kernel}. Measured on an
# H200 with 12,288 and 32,768 rows (bench_phase2.py matmuls); limits lie between these two. The table is fixed: a choice
# by timing could differ between runs.
CUBLASLT_ROWS = {
    (9, 0): {
        (768, 768): (0, 16_384),
        (2304, 768): (24_576, math.inf),
        (3072, 768): (0, math.inf),
        (768, 3072): (0, math.inf),
    }
}


@cache
def capability(device):
    return torch.cuda.get_device_capability(device)


def takes_cublaslt(weight, rows):
    """Returns whether cuBLASLt computes the gradient of this weight from this number of rows."""
    least, most = CUBLASLT_ROWS.get(capability(weight.device), {}).get(tuple(weight.shape), (math.inf, 0))
    return least <= rows <= most


@contextlib.contextmanager
def cublaslt():
    """Inside this context, PyTorch's matmuls use cuBLASLt."""
    before = torch._C._get_blas_preferred_backend()
    torch._C._set_blas_preferred_backend(torch._C._BlasBackend.Cublaslt)
    try:
        yield
    finally:
        torch._C._set_blas_preferred_backend(before)


@cache
def ignore_cublaslt_warning():
    """
    Ignores PyTorch's warning that choosing a library is experimental. PyTorch issues it when a forward or backward of
    an autograd function returns, so catch_warnings() inside cannot hold it back.
    """
    warnings.filterwarnings('ignore', 'torch.backends.cuda.preferred_blas_library is an experimental feature')


def weight_gradient(weight, dy, x):
    """
    Returns what a backward should return for weight (out, in): dy.T @ x, for dy (M, out) and x (M, in). On a GPU with a
    float32 weight and 16-bit dy and x, it is summed in float32 and includes weight.grad (see take_gradient).
    """
    if not (dy.is_cuda and dy.dtype in HALF_DTYPES and weight.dtype == torch.float32):
        return (dy.t() @ x).to(weight.dtype)
    grad = take_gradient(weight)
    with cublaslt() if takes_cublaslt(weight, len(x)) else contextlib.nullcontext():
        if grad is None:
            return torch.mm(dy.t(), x, out_dtype=torch.float32)
        return torch.addmm(grad, dy.t(), x, out_dtype=torch.float32, out=grad)


def can_leave_gradient(weight):
    """Returns whether leave_gradient may put a gradient of weight, a parameter that is used twice, into weight.grad."""
    return (
        weight.is_leaf
        and weight.requires_grad
        and weight.dtype == torch.float32
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
    )


def leave_gradient(weight, dw):
    """
    Puts dw into weight.grad, where the next backward of the same weight finds it with take_gradient, and returns None
    for autograd. The two gradients of a weight that is both embedding and output layer then share one tensor; autograd
    would add two tensors, one of them mostly zeros. Returns dw if the backward does not add to weight.grad.
    """
    if not accumulates(weight):
        return dw
    weight.grad = dw if weight.grad is None else weight.grad.add_(dw)


def capturing(weight):
    """Returns whether weight is on a GPU where a CUDA graph is being captured."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def rounded(weight, dtype):
    """
    Returns weight in a 16-bit dtype. In CUDA graphs (cuda_graph.py), only an iteration's first micro-step, before which
    there are no gradients, rounds it. The graphs of the other micro-steps read the result from weight.rounded, which
    the model's release_graph_state() drops.
    """
    if weight.dtype == dtype or not weight.is_leaf or not capturing(weight):
        return weight.to(dtype)
    kept = getattr(weight, 'rounded', None)
    if weight.grad is None or kept is None or kept.dtype != dtype:
        kept = weight.rounded = weight.to(dtype)
    return kept


def not_a_view(y):
    """
    Returns y, which nobody else has, such that it may change in place. With a bias, F.linear returns a view, and
    autograd allows no change of a view that a Function returns.
    """
    return torch.ops.aten._unsafe_view(y, y.shape)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        if x.is_cuda:
            ignore_cublaslt_warning()
        x, w = x.to(dtype), rounded(weight, dtype)
        ctx.save_for_backward(x, w)
        ctx.weight = weight
        return not_a_view(F.linear(x, w, None if bias is None else bias.to(dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_dx, need_dw, need_db, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ w if need_dx else None
        dw = weight_gradient(ctx.weight, rows, x.reshape(-1, x.shape[-1])) if need_dw else None
        db = rows.sum(0, dtype=torch.float32) if need_db else None
        return dx, dw, db, None


def plain_linear(x, weight, bias=None):
    """Returns torch.nn.functional.linear(x, weight, bias), not as a view: FSDP warns of units that return views."""
    y = F.linear(x, weight, bias)
    return y if bias is None else not_a_view(y)


def linear(x, weight, bias=None):
    """
    Returns torch.nn.functional.linear(x, weight, bias), (..., out), for x (..., in), weight (out, in) and bias (out,)
    or None. Under autocast to 16 bits, the gradients of float32 weights are computed in float32.
    """
    dtype = autocast_dtype(x)
    plain = type(x) is torch.Tensor and weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    if dtype is None or not plain or not available(x.device):
        return plain_linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return LinearFunction.apply(x, weight, bias, dtype)
