"""
The last matmul and the cross-entropy without a pass over the logits, on Hopper GPUs.

cross_entropy.py reads the logits that the matmul has written, and writes their gradient in their place: 2.5 GB for 12
sequences of 1024. Here the matmul writes something that serves as the gradient, so nobody reads it before the two
matmuls of backward do. Softmax does not change if all logits of a row are shifted. Shifted by the target's logit z_y,
one dot product per row,

    E = exp(z - z_y)    and its row sums S    give    loss = log S,    dlogits = (E - S * onehot(target)) / S

The matmul writes E and the row sums of its tiles (matmul_hopper.py). A small kernel adds these, replaces one entry
per row, E[target] = 1, by 1 - S. The division by S moves to the small tensors of backward, together with the factor
scale = dloss / rows:

    dx = (E @ weight) / S * scale,    dweight = E.T @ (x / S * scale)

Rounding: E is rounded to bfloat16 once, like a gradient in the place of the logits, and no other tensor is rounded
more often than there. The factor 1 / S of a row is chosen such that the target's entry, the largest, comes out exact.
The logits themselves are never rounded, so the loss is more exact.

Range: E is multiplied by 2**-90 (OFFSET), so it can represent logits from 25 nats below the target's to 137 nats
above. Logits further below would change S by less than 1e-6. Logits further above are clamped: the loss of a token
saturates near 137 nats, and its gradient still lowers the logits that are too large.
"""

from functools import cache

import torch
from torch.autograd.function import once_differentiable

from .device import interpreted, jit, num_multiprocessors, tl, triton
from .launch import Config, launch
from .linear import capability, leave_gradient, rounded, weight_gradient

OFFSET = 90.0 if triton is None else tl.constexpr(90.0)  # in powers of 2
MIN_ROWS = 1024  # fewer would not keep the GPU busy
MAX_EXPONENT = 108  # of an entry of E; the sum of 50304 of these is below float32's largest number, 2**128


@jit
def target_logits_kernel(
    x_ptr,  # (M, C)
    weight_ptr,  # (V, C)
    targets_ptr,  # (M,) int64
    shifts_ptr,  # (M,) float32: log2(e) * logit of the target (0 without one) + OFFSET
    C,
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    cols = tl.arange(0, BLOCK)
    mask = (cols < C) & (target >= 0) & (target < V)
    x = tl.load(x_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + target * C + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(shifts_ptr + row, tl.sum(x * w, 0) * 1.4426950408889634 + OFFSET)


@jit
def losses_kernel(
    exps_ptr,  # (M, V): E * 2**-OFFSET; the target's entries are replaced
    sums_ptr,  # (TILES, M) float32: sums over the columns of a tile
    targets_ptr,  # (M,) int64
    losses_ptr,  # (M,) float32; 0 where the target is ignore_index, NaN where it is outside the vocabulary
    inverses_ptr,  # (M,) float32: by which a row of E has to be multiplied; 0 where the target is ignore_index
    M,
    TILES,
    ignore_index,
    V: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < M
    target = tl.load(targets_ptr + rows, mask=exists, other=0)
    ignored = target == ignore_index
    inside = (target >= 0) & (target < V)
    totals = tl.zeros((32, ROWS), tl.float32)
    for first in tl.range(0, TILES, 32):
        tiles = first + tl.arange(0, 32)[:, None]
        at = tiles.to(tl.int64) * M + rows[None, :]
        totals += tl.load(sums_ptr + at, mask=(tiles < TILES) & exists[None, :], other=0.0)
    total = tl.where(exists, tl.sum(totals, 0), 1.0)
    # a loss near 0 is the logarithm of a number near 1: OFFSET must not be added to it after the logarithm
    small = total < 1.0
    log_sum = tl.log2(tl.where(small, total * tl.exp2(OFFSET), total)) + tl.where(small, 0.0, OFFSET)
    loss = tl.where(inside, log_sum * 0.6931471805599453, float('nan'))
    tl.store(losses_ptr + rows, tl.where(ignored, 0.0, loss), mask=exists)
    exact = tl.exp2(-OFFSET) - total
    entry = exact.to(exps_ptr.dtype.element_ty)
    tl.store(exps_ptr + rows * V + target, entry, mask=exists & inside)
    # the target's is by far the largest entry, and the factor takes back its rounding
    entry = entry.to(tl.float32)
    inverse = tl.where(inside & (entry != 0.0), exact / tl.where(entry != 0.0, entry, 1.0), 1.0) / total
    tl.store(inverses_ptr + rows, tl.where(ignored, 0.0, inverse), mask=exists)


@jit
def scale_rows_kernel(x_ptr, inverses_ptr, scale_ptr, y_ptr, C, BLOCK: tl.constexpr):
    """Writes y = x * (inverses * scale) for x and y (M, C), inverses (M,) and one scale, with products in float32."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
    factor = tl.load(inverses_ptr + row) * tl.load(scale_ptr)
    tl.store(y_ptr + row * C + cols, (x * factor).to(y_ptr.dtype.element_ty), mask=cols < C)


def row_config(C):
    """Returns the Config of a kernel whose programs handle one row of C columns each."""
    block = triton.next_power_of_2(C)
    return Config(1, block, max(1, min(8, block // 512)))


def target_logits(x, weight, targets):
    """Returns the shifts (M,) float32 that exponentials() takes, for x (M, C), weight (V, C) and targets (M,)."""
    shifts = torch.empty(len(x), dtype=torch.float32, device=x.device)
    c = row_config(x.shape[1])
    numbers = (x.shape[1], len(weight))
    launch(target_logits_kernel, (len(x),), (x, weight, targets, shifts), numbers, (c.chunk,), c)
    return shifts


@cache
def load_matmul_hopper():
    """
    Imports and returns the module matmul_hopper. Prints a line and returns None if this Triton's Gluon, which is
    experimental, lacks what the module imports.
    """
    try:
        from . import matmul_hopper
    except (ImportError, AttributeError) as error:
        print(
            'computing the loss from logits, which is slower: kernels/matmul_hopper.py does not fit Triton '
            f'{triton.__version__} ({error})'
        )
        return None
    return matmul_hopper


def exponentials(x, weight, shifts):
    """
    Returns exp2(log2(e) * x @ weight.T - shifts[:, None]) (M, V) in the dtype of x (M, C) and weight (V, C), and its
    sums over the columns of each tile, float32 (tiles, M).
    """
    return load_matmul_hopper().exponentials(x, weight, shifts, MAX_EXPONENT, num_multiprocessors(x.device))


def losses_of(exps, sums, targets, ignore_index):
    """Returns losses and inverses (M,), float32, and replaces the targets' entries of exps; see losses_kernel."""
    (M, V), tiles = exps.shape, len(sums)
    losses, inverses = (torch.empty(M, dtype=torch.float32, device=exps.device) for _ in range(2))
    c = Config(32, 1, 4)
    tensors = (exps, sums, targets, losses, inverses)
    launch(losses_kernel, (-(-M // c.rows),), tensors, (M, tiles, ignore_index), (V, c.rows), c)
    return losses, inverses


def scaled_rows(x, inverses, scale, out=None):
    """
    Returns x (M, C) times inverses (M,) and a 0-dim scale, both float32, in x's dtype. Writes it to out if that is
    given.
    """
    y = torch.empty_like(x) if out is None else out
    c = row_config(x.shape[1])
    launch(scale_rows_kernel, (len(x),), (x, inverses, scale, y), (x.shape[1],), (c.chunk,), c)
    return y


def supports(x, weight, dtype):
    """Returns whether the Gluon matmul can compute the logits of x (M, C) and weight (V, C) in this dtype."""
    if interpreted or not x.is_cuda or dtype != torch.bfloat16 or capability(x.device) != (9, 0):
        return False
    if len(x) < MIN_ROWS:
        return False
    # the GPU's copy engine needs rows that start at multiples of 16 bytes
    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == weight.shape[0] % 8 == weight.shape[1] % 8 == 0
    return aligned and weight.is_contiguous()


class ExpCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, dtype, tied):
        x, w = x.to(dtype).contiguous(), rounded(weight, dtype)
        exps, sums = exponentials(x, w, target_logits(x, w, targets))
        losses, inverses = losses_of(exps, sums, targets, ignore_index)
        count = (targets != ignore_index).sum()
        # with no rows the loss is NaN, but its gradient is 0
        ctx.save_for_backward(x, w, exps, inverses, count.clamp(min=1))
        ctx.weight, ctx.tied = weight, tied
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, w, exps, inverses, count = ctx.saved_tensors
        scale = dloss / count
        dx = None
        if ctx.needs_input_grad[0]:
            dx = exps @ w
            scaled_rows(dx, inverses, scale, out=dx)
        dw = weight_gradient(ctx.weight, exps, scaled_rows(x, inverses, scale)) if ctx.needs_input_grad[1] else None
        return dx, leave_gradient(ctx.weight, dw) if ctx.tied else dw, None, None, None, None
