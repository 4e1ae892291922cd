"""
The last matmul and the cross-entropy in one function. The gradient overwrites the logits, which are not returned.

    loss = mean over rows of  log(sum(exp(logits))) - logits[target],      logits = x @ weight.T  (M, V)
    dlogits = (softmax(logits) - onehot(target)) * dloss / number of rows

GPT-2's logits are its largest tensor: 1.2 GB in bfloat16 for 12 sequences of 1024. PyTorch reads them for a maximum, a
sum and the loss (in float32 if compiled), writes a gradient of the same size, and adds zeros for the logits where the
model returns them. Here, one program per row reads the row from memory once for an online softmax (maximum and sum in
one pass, float32), reads it again from cache, and overwrites it with softmax - onehot. The factor dloss / rows is known
only in the backward and may be too small for float16, so it is applied to the results of the two matmuls that follow.

Sources: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (arXiv:1805.02867); a gradient that
overwrites the logits, as in Liger-Kernel's fused linear cross-entropy.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import exp_cross_entropy
from .device import FLOAT_DTYPES, available, interpreted, jit, l2_bytes, num_multiprocessors, tl, triton
from .fp8 import E5M2, Quantized, move
from .fp8_linear import active, forward_matmul, fp8_input_gradient
from .launch import Config, launch
from .linear import HALF_DTYPES, autocast_dtype, can_leave_gradient, leave_gradient, rounded, weight_gradient

GRADIENT_SCALE = 32768.0  # scale of softmax - onehot in e5m2; its values are between -1 and 1


@jit
def load_logits(
    ptr, start, V: tl.constexpr, LANES: tl.constexpr, ITEMS: tl.constexpr, MASKED: tl.constexpr, EVICTION: tl.constexpr
):
    """
    Returns logits start to start + LANES * ITEMS of a row as (LANES, ITEMS). A row of the tile holds ITEMS neighbours
    in memory, which belong to one thread.
    """
    cols = start + tl.arange(0, LANES)[:, None] * ITEMS + tl.arange(0, ITEMS)[None, :]
    if MASKED:
        return tl.load(ptr + cols, mask=cols < V, other=float('-inf'), eviction_policy=EVICTION), cols
    return tl.load(ptr + cols, eviction_policy=EVICTION), cols


@jit
def exp(x, log2_divisor):
    """
    Returns exp(x) / 2 ** log2_divisor. x should be a difference of logits, which float32 holds almost exactly. A
    difference of rounded multiples of logits would cost the loss 4e-6 for logits of 30, and 1e-3 for logits of 1e4.
    """
    return tl.exp2(x * 1.4426950408889634 - log2_divisor)  # log2(e)


@jit
def online_softmax(x, top, sums):
    """
    Updates each lane's maximum and its sum of exp(logit - maximum) with more logits (LANES, ITEMS). No lane waits for
    another.
    """
    x = x.to(tl.float32)
    higher = tl.maximum(top, tl.max(x, 1))
    finite = tl.where(higher == float('-inf'), 0.0, higher)  # -inf only in a lane beyond the last column
    return higher, sums * exp(top - finite, 0.0) + tl.sum(exp(x - finite[:, None], 0.0), 1)


@jit
def cross_entropy_kernel(
    logits_ptr,  # (M, V) contiguous; replaced by softmax - onehot if GRAD
    targets_ptr,  # (M,) int64
    losses_ptr,  # (M,) float32; 0 where the target is ignore_index, NaN where it is outside the vocabulary
    q_ptr,  # (M, V) contiguous e5m2: (softmax - onehot) * fp8_scale; written only if FP8
    M,
    ignore_index,
    V: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
    GRAD: tl.constexpr,
    FP8: tl.constexpr,  # needs GRAD
    fp8_scale: tl.constexpr,
):
    CHUNK: tl.constexpr = LANES * ITEMS
    WHOLE: tl.constexpr = V // CHUNK * CHUNK  # columns in whole chunks, which need no mask
    # the cache should hold the logits until their second read, not the results: 12288 x 50304 with e5m2 take 0.82 ms
    # on an H200 instead of 0.95. Not measured without e5m2
    FIRST_READ: tl.constexpr = 'evict_last' if FP8 else ''
    SECOND_READ: tl.constexpr = 'evict_first' if FP8 else ''
    WRITE: tl.constexpr = '.cs' if FP8 else ''
    for row in tl.range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0)):  # int64: M * V may pass 2^31
        row_ptr = logits_ptr + row * V
        target = tl.load(targets_ptr + row)
        ignored = target == ignore_index
        inside = (target >= 0) & (target < V)
        logit = tl.load(row_ptr + target, mask=inside, other=float('nan')).to(tl.float32)

        top = tl.full((LANES,), float('-inf'), tl.float32)
        sums = tl.zeros((LANES,), tl.float32)
        for start in tl.range(0, WHOLE, CHUNK):
            x, _ = load_logits(row_ptr, start, V, LANES, ITEMS, False, FIRST_READ)
            top, sums = online_softmax(x, top, sums)
        if WHOLE < V:
            x, _ = load_logits(row_ptr, WHOLE, V, LANES, ITEMS, True, FIRST_READ)
            top, sums = online_softmax(x, top, sums)
        highest = tl.max(top, 0)
        log_sum = tl.log2(tl.sum(sums * exp(top - highest, 0.0), 0))  # log2 of the sum of exp(logit - highest)
        tl.store(losses_ptr + row, tl.where(ignored, 0.0, highest - logit + log_sum * 0.6931471805599453))

        if GRAD:
            log_sum = tl.where(ignored, float('inf'), log_sum)  # makes every exponential 0
            for start in tl.range(0, WHOLE, CHUNK):
                x, cols = load_logits(row_ptr, start, V, LANES, ITEMS, False, SECOND_READ)
                d = exp(x.to(tl.float32) - highest, log_sum)
                tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty), cache_modifier=WRITE)
                if FP8:
                    q = (d * fp8_scale).to(q_ptr.dtype.element_ty)
                    tl.store(q_ptr + row * V + cols, q, cache_modifier=WRITE)
            if WHOLE < V:
                x, cols = load_logits(row_ptr, WHOLE, V, LANES, ITEMS, True, SECOND_READ)
                d = exp(x.to(tl.float32) - highest, log_sum)
                tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty), mask=cols < V, cache_modifier=WRITE)
                if FP8:
                    q = (d * fp8_scale).to(q_ptr.dtype.element_ty)
                    tl.store(q_ptr + row * V + cols, q, mask=cols < V, cache_modifier=WRITE)
            tl.debug_barrier()  # another thread has written the target's element
            d = exp(logit - highest, log_sum) - 1.0
            tl.store(row_ptr + target, d.to(logits_ptr.dtype.element_ty), mask=inside & (target != ignore_index))
            if FP8:
                d = (d * fp8_scale).to(q_ptr.dtype.element_ty)
                tl.store(q_ptr + row * V + target, d, mask=inside & (target != ignore_index))


@jit
def scale_kernel(x_ptr, scale_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Writes y = x * scale, with the product in float32. scale is a float32 number on the GPU."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: size may pass 2^31
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * tl.load(scale_ptr)).to(y_ptr.dtype.element_ty), mask=at < size)


def scaled(x, scale, out=None):
    """
    Returns x * scale for contiguous x and a 0-dim float32 scale, in the dtype of x, written to out if given. PyTorch
    would round scale to the dtype of x first, which changes all gradients by up to 0.2% in bfloat16, and would take
    four times as long.
    """
    y = torch.empty_like(x) if out is None else out
    c = Config(1, 65536 if interpreted else 2048, 4)
    if x.numel() > 0:
        launch(scale_kernel, (-(-x.numel() // c.chunk),), (x, scale, y), (x.numel(),), (c.chunk,), c)
    return y


def cross_entropy_config(V, programs=2):
    """
    Returns the Config of cross_entropy_kernel (rows: lanes, chunk: items per lane) with a number of programs per
    multiprocessor. Chosen among 70 configurations on an H200.
    """
    items = 4
    lanes = min(1024, max(32, triton.next_power_of_2(V) // items))
    if interpreted:  # which pays per operation
        lanes = triton.next_power_of_2(V) // items or 1
    return Config(lanes, items, max(1, min(32, lanes // 32)), programs=programs)


def launch_cross_entropy(logits, targets, ignore_index, need_grad, config=None, q=None):
    """
    Returns the losses (M,) float32 of logits (M, V) contiguous and targets (M,) int64. With need_grad, softmax - onehot
    overwrites the logits, zero where the target is ignored; q, (M, V) e5m2 or None, receives it times GRADIENT_SCALE.
    """
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    # two programs per multiprocessor if their rows and the results stay in cache until the second read: 12288 x 50304
    # in bfloat16 take 0.71 ms on an H200 (a copy 0.59); an H100 has less cache: 0.99 ms with one, 1.04 with two
    at_work = 4 * V * logits.element_size() * num_multiprocessors(logits.device)
    c = config or cross_entropy_config(V, programs=2 if at_work <= l2_bytes(logits.device) else 1)
    if M > 0:
        grid = min(M, c.programs * num_multiprocessors(logits.device))
        launch(
            cross_entropy_kernel,
            (grid,),
            (logits, targets, losses, logits if q is None else q),
            (M, ignore_index),
            (V, c.rows, c.chunk, need_grad, q is not None, GRADIENT_SCALE),
            c,
        )
    return losses


class LinearCrossEntropyFunction(torch.autograd.Function):
    """All rows at once. softmax - onehot replaces the logits and waits for the backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, dtype, need_grad, tied, layer):
        x, q = x.to(dtype).contiguous(), None
        if layer is None:
            operands = (rounded(weight, dtype),)
            logits = x @ operands[0].t()
        else:
            logits, operands = forward_matmul(layer, x, weight, None, dtype)
            if need_grad and len(operands) == 2:
                q = torch.empty_like(logits, dtype=E5M2)
        losses = launch_cross_entropy(logits, targets, ignore_index, need_grad, q=q)
        count = (targets != ignore_index).sum()
        if need_grad:
            operands = operands if q is None else (*operands, q)
            # with no rows the loss is NaN, but its gradient is 0
            ctx.save_for_backward(x, logits, count.clamp(min=1), *operands)
            ctx.weight, ctx.tied = weight, tied
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, d, count, *operands = ctx.saved_tensors
        scale = dloss / count
        dx = None
        if ctx.needs_input_grad[0] and len(operands) == 3:
            columns, inverse_scale, q = operands
            dx = fp8_input_gradient(Quantized(q, scale / GRADIENT_SCALE), columns, inverse_scale, x.dtype)
        elif ctx.needs_input_grad[0]:
            dx = d @ operands[0]
            scaled(dx, scale, out=dx)
        # scale x instead of the result, which may be 60 times larger
        dw = weight_gradient(ctx.weight, d, scaled(x.contiguous(), scale)) if ctx.needs_input_grad[1] else None
        return dx, leave_gradient(ctx.weight, dw) if ctx.tied else dw, None, None, None, None, None, None


class ChunkedLinearCrossEntropyFunction(torch.autograd.Function):
    """A few rows at a time. Their logits become gradients and enter both matmuls before the next rows follow."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, dtype, need_grad, tied, chunk_rows):
        x, w = x.to(dtype), rounded(weight, dtype)
        losses, dx = torch.empty(len(x), dtype=torch.float32, device=x.device), torch.empty_like(x)
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if need_grad else None
        for rows in (slice(start, start + chunk_rows) for start in range(0, len(x), chunk_rows)):
            logits = x[rows] @ w.t()
            losses[rows] = launch_cross_entropy(logits, targets[rows], ignore_index, need_grad)
            if need_grad:
                torch.mm(logits, w, out=dx[rows])
                if x.is_cuda and dtype in HALF_DTYPES:
                    torch.addmm(dw, logits.t(), x[rows], out_dtype=torch.float32, out=dw)
                else:
                    dw += logits.t() @ x[rows]
        count = (targets != ignore_index).sum()
        if need_grad:
            ctx.save_for_backward(dx, dw, count.clamp(min=1))
            ctx.weight, ctx.tied = weight, tied
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dw, count = ctx.saved_tensors
        scale = dloss / count
        dw = dw * scale
        return dx * scale, leave_gradient(ctx.weight, dw) if ctx.tied else dw, None, None, None, None, None, None


def linear_cross_entropy(x, weight, targets, ignore_index=-1, tied=False, chunk_rows=0, layer=None):
    """
    Returns the mean cross-entropy in nats, float32, of logits = x @ weight.T against targets, like
    F.cross_entropy(logits, targets, ignore_index), which it calls where Triton cannot run. x: (..., C). weight: (V, C).
    targets: int64 (...). Under autocast the logits are in its dtype; softmax and loss are always float32.
    Differentiable once, in x and weight.

    tied: weight also belongs to an embedding() whose backward comes later and returns both gradients. chunk_rows:
    compute the logits of this many rows at a time to save memory (0: all). layer: the fp8_linear.Layer of the output
    layer, or None. A target outside the vocabulary other than ignore_index makes the loss NaN. Raises ValueError if the
    shape of targets is not that of x's rows.
    """
    if targets.shape != x.shape[:-1]:
        raise ValueError(f'linear_cross_entropy: targets have shape {tuple(targets.shape)}, but x {tuple(x.shape)}')
    given, x, targets = x, x.reshape(-1, x.shape[-1]), targets.reshape(-1).contiguous()
    dtype = autocast_dtype(x) or x.dtype
    plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    if not (plain and dtype in FLOAT_DTYPES and weight.dtype in FLOAT_DTYPES and available(x.device)):
        return F.cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index)
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    tied = tied and can_leave_gradient(weight)
    with torch.autocast(x.device.type, enabled=False):
        if chunk_rows > 0:
            return ChunkedLinearCrossEntropyFunction.apply(
                x, weight, targets, ignore_index, dtype, need_grad, tied, chunk_rows
            )
        if active(layer):
            move(given, x)
        elif need_grad and exp_cross_entropy.supports(x, weight, dtype) and exp_cross_entropy.load_matmul_hopper():
            return exp_cross_entropy.ExpCrossEntropyFunction.apply(x, weight, targets, ignore_index, dtype, tied)
        return LinearCrossEntropyFunction.apply(x, weight, targets, ignore_index, dtype, need_grad, tied, active(layer))


def cross_entropy(logits, targets, ignore_index=-1):
    """
    Returns F.cross_entropy of logits that stay unchanged, for evaluation: the mean in nats, float32. logits: (M, V).
    targets: int64 (M,). PyTorch would make one or two float32 copies of the logits, which is more than the rest of an
    evaluation needs; the kernel reads them once. Calls F.cross_entropy, in its dtype, where Triton cannot run or the
    logits require a gradient. A target outside the vocabulary other than ignore_index makes the loss NaN. Raises
    ValueError if the shape of targets is not that of the logits' rows.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f'cross_entropy: targets have shape {tuple(targets.shape)}, but logits {tuple(logits.shape)}')
    plain = type(logits) is torch.Tensor and not torch.compiler.is_compiling()
    if logits.requires_grad or not (plain and logits.dtype in FLOAT_DTYPES and available(logits.device)):
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)
    losses = launch_cross_entropy(logits.contiguous(), targets.contiguous(), ignore_index, False)
    return losses.sum() / (targets != ignore_index).sum()
