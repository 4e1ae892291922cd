"""
GELU at the speed of memory: x * Phi(x), where Phi is the normal distribution function, and its derivative
Phi(x) + x * phi(x).

The library's erf takes about 40 instructions per element, which is slower than memory. For 16-bit x, the kernels use
formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions, 1964:

    1 - erf(z) = (a1 t + ... + a5 t^5) exp(-z^2),  t = 1 / (1 + p z),  for z >= 0

Its error is at most 1.5e-7, while 16 bits round by 4e-3 or 5e-4 of the value. phi needs the same exponential. float32 x
uses erf.

The tanh form (Hendrycks & Gimpel 2016, arxiv.org/abs/1606.08415) replaces Phi by
(1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .device import FLOAT_DTYPES, available, interpreted, jit, tl
from .fp8 import as_fp8, attach, magnitude, record
from .launch import Config, launch


@jit
def normal(x, EXACT: tl.constexpr):
    """Returns (Phi(x), phi(x)) for float32 x."""
    bell = tl.exp2(x * x * -0.7213475204444817)  # exp(-x^2 / 2)
    if EXACT:
        cdf = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    else:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))  # 0.3275911 / sqrt(2)
        tail = (
            ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * bell * 0.5
        )
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    return cdf, bell * 0.3989422804014327


@jit
def sigmoid(x):
    """Returns (sigmoid(2 u), its derivative in x) for float32 x."""
    square = tl.minimum(x * x, 1e4)  # both are constant beyond |x| = 100, where the cube might overflow
    cdf = 1.0 / (1.0 + tl.exp2(x * (1.0 + 0.044715 * square) * -2.302208198144325))  # -2 sqrt(2 / pi) / ln(2)
    return cdf, cdf * (1.0 - cdf) * (1.0 + 0.134145 * square) * 1.5957691216057308


@jit
def cdf_and_pdf(x, EXACT: tl.constexpr, TANH: tl.constexpr):
    """Returns (Phi(x), phi(x)) for float32 x, or with TANH the sigmoid in place of Phi, and its derivative."""
    if TANH:
        return sigmoid(x)
    else:
        return normal(x, EXACT)


@jit
def forward_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, EXACT: tl.constexpr, TANH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: size may pass 2^31
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    cdf, _ = cdf_and_pdf(x, EXACT, TANH)
    tl.store(y_ptr + at, (x * cdf).to(y_ptr.dtype.element_ty), mask=at < size)


@jit
def backward_kernel(dy_ptr, x_ptr, dx_ptr, size, BLOCK: tl.constexpr, EXACT: tl.constexpr, TANH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    cdf, pdf = cdf_and_pdf(x, EXACT, TANH)
    tl.store(dx_ptr + at, (dy * (cdf + x * pdf)).to(dx_ptr.dtype.element_ty), mask=at < size)


@jit
def store_twice(y, y_ptr, q_ptr, slot_ptr, at, size):
    """Writes y, float32, and its fp8 form, and measures it; see fp8.py."""
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < size)
    tl.store(q_ptr + at, as_fp8(y, tl.load(slot_ptr + 1), q_ptr.dtype.element_ty), mask=at < size)
    record(slot_ptr, tl.max(magnitude(y), 0))


@jit
def forward_fp8_kernel(
    x_ptr, y_ptr, q_ptr, slot_ptr, size, BLOCK: tl.constexpr, EXACT: tl.constexpr, TANH: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    cdf, _ = cdf_and_pdf(x, EXACT, TANH)
    store_twice(x * cdf, y_ptr, q_ptr, slot_ptr, at, size)


@jit
def backward_fp8_kernel(
    dy_ptr, x_ptr, dx_ptr, q_ptr, slot_ptr, size, BLOCK: tl.constexpr, EXACT: tl.constexpr, TANH: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    cdf, pdf = cdf_and_pdf(x, EXACT, TANH)
    store_twice(dy * (cdf + x * pdf), dx_ptr, q_ptr, slot_ptr, at, size)


def launch_elementwise(kernel, *tensors, tanh=False, config=Config(1, 2048, 4)):
    """
    Runs kernel on contiguous tensors, which have one shape and dtype, except for an fp8 kernel's last two. tanh: in the
    tanh form.
    """
    size, chunk = tensors[0].numel(), 65536 if interpreted else config.chunk
    if size > 0:
        constants = chunk, tensors[0].dtype == torch.float32, tanh
        launch(kernel, (-(-size // chunk),), tensors, (size,), constants, config)


def launch_gelu(kernel, fp8_kernel, *inputs, tanh, slot):
    """
    Returns a tensor like the inputs, written by kernel. With an fp8.Slot, fp8_kernel writes it and its fp8 form, which
    is attached to it.
    """
    y = torch.empty_like(inputs[0])
    if slot is None:
        launch_elementwise(kernel, *inputs, y, tanh=tanh)
    else:
        attach(y, slot.empty_like(y), slot)
        # 8 elements per thread: with 16, the fp8 store has another layout, and Triton computes all of it twice
        config = Config(1, 2048, 8)
        launch_elementwise(fp8_kernel, *inputs, y, y.fp8.q, slot.row, tanh=tanh, config=config)
    return y


class GeluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tanh, slot, gradient_slot):
        ctx.tanh, ctx.gradient_slot = tanh, gradient_slot
        x = x.contiguous()
        ctx.save_for_backward(x)
        return launch_gelu(forward_kernel, forward_fp8_kernel, x, tanh=tanh, slot=slot)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        how = dict(tanh=ctx.tanh, slot=ctx.gradient_slot)
        return launch_gelu(backward_kernel, backward_fp8_kernel, dy.contiguous(), x, **how), None, None, None


def gelu(x, approximate='none', slot=None, gradient_slot=None):
    """
    Returns torch.nn.functional.gelu(x, approximate=approximate), 'none' or 'tanh', for x of any shape in float32,
    bfloat16 or float16. Uses a Triton kernel where it can run, and that function elsewhere. Differentiable once. slot,
    gradient_slot: the fp8.Slots in which the kernels also write the result and the gradient of x.
    """
    if (
        type(x) is torch.Tensor
        and x.dtype in FLOAT_DTYPES
        and available(x.device)
        and not torch.compiler.is_compiling()
    ):
        return GeluFunction.apply(x, approximate == 'tanh', slot, gradient_slot)
    return F.gelu(x, approximate=approximate)
