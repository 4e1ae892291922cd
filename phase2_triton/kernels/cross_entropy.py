"""The last matmul and the cross-entropy together: the gradient overwrites the logits, which nobody else gets to see.

    loss = mean over rows of  log(sum(exp(logits))) - logits[target],      logits = x @ weight.T  (M, V)
    dlogits = (softmax(logits) - onehot(target)) * dloss / number of rows

For GPT-2 the logits are the largest tensor of all: 12 sequences of 1024 make 1.2 GB in bfloat16. PyTorch reads them for a maximum, a
sum and the loss, in float32 if compiled, writes a gradient of the same size, and, where the model returns them, adds zeros for them.
Here one program a row reads the row once from memory for an online softmax (maximum and sum in one pass, float32), reads it again
from cache, and writes softmax - onehot in its place. The factor dloss / rows, which is known only in backward and may be too small
for float16, is applied to what comes out of the two matmuls that follow.

Sources: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (arXiv:1805.02867); the gradient in place of the
logits as in Liger-Kernel's fused linear cross-entropy.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .device import available, interpreted, jit, l2_bytes, num_multiprocessors, tl, triton
from .fp8 import E5M2, Quantized, move
from .fp8_linear import active, forward_matmul, fp8_input_gradient
from .launch import Config, launch
from .linear import autocast_dtype, can_leave_gradient, half_dtypes, leave_gradient, rounded, weight_gradient

float_dtypes = (torch.float32, *half_dtypes)
GRADIENT_SCALE = 32768.0  # of softmax - onehot in e5m2: all of it is from -1 to 1


@jit
def load_logits(ptr, start, V: tl.constexpr, LANES: tl.constexpr, ITEMS: tl.constexpr, MASKED: tl.constexpr):
    """Logits start to start + LANES * ITEMS of a row as (LANES, ITEMS): a thread's own ITEMS, neighbours in memory, in a row of the tile."""
    cols = start + tl.arange(0, LANES)[:, None] * ITEMS + tl.arange(0, ITEMS)[None, :]
    if MASKED:
        return tl.load(ptr + cols, mask=cols < V, other=float('-inf')), cols
    return tl.load(ptr + cols), cols


@jit
def exp(x, log2_divisor):
    """
    exp(x) / 2 ** log2_divisor. x should be a difference of logits, which float32 has exactly or nearly so; taken of their multiples, which are
    rounded, it would cost the loss 4e-6 where logits are 30, and 1e-3 where they are 1e4.
    """
    return tl.exp2(x * 1.4426950408889634 - log2_divisor)  # log2(e)


@jit
def online_softmax(x, top, sums):
    """Takes more logits (LANES, ITEMS) into each lane's maximum and sum of exp(logit - maximum): no lane waits for another."""
    x = x.to(tl.float32)
    higher = tl.maximum(top, tl.max(x, 1))
    finite = tl.where(higher == float('-inf'), 0.0, higher)  # of a lane behind the last column
    return higher, sums * exp(top - finite, 0.0) + tl.sum(exp(x - finite[:, None], 0.0), 1)


@jit
def cross_entropy_kernel(
    logits_ptr,  # (M, V) contiguous; replaced by softmax - onehot if GRAD
    targets_ptr,  # (M,) int64
    losses_ptr,  # (M,) float32; 0 where the target is ignore_index, NaN where it is outside the vocabulary
    q_ptr,  # (M, V) contiguous e5m2: (softmax - onehot) * fp8_scale; not written unless FP8
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
    WHOLE: tl.constexpr = V // CHUNK * CHUNK  # the columns of whole chunks, which need no mask
    for row in tl.range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0)):  # int64: M * V may pass 2^31
        row_ptr = logits_ptr + row * V
        target = tl.load(targets_ptr + row)
        ignored = target == ignore_index
        inside = (target >= 0) & (target < V)
        logit = tl.load(row_ptr + target, mask=inside, other=float('nan')).to(tl.float32)

        top = tl.full((LANES,), float('-inf'), tl.float32)
        sums = tl.zeros((LANES,), tl.float32)
        for start in tl.range(0, WHOLE, CHUNK):
            x, _ = load_logits(row_ptr, start, V, LANES, ITEMS, False)
            top, sums = online_softmax(x, top, sums)
        if WHOLE < V:
            x, _ = load_logits(row_ptr, WHOLE, V, LANES, ITEMS, True)
            top, sums = online_softmax(x, top, sums)
        highest = tl.max(top, 0)
        log_sum = tl.log2(tl.sum(sums * exp(top - highest, 0.0), 0))  # of exp(logit - highest), in units of log(2)
        tl.store(losses_ptr + row, tl.where(ignored, 0.0, highest - logit + log_sum * 0.6931471805599453))

        if GRAD:
            log_sum = tl.where(ignored, float('inf'), log_sum)  # then every exponential is 0
            for start in tl.range(0, WHOLE, CHUNK):
                x, cols = load_logits(row_ptr, start, V, LANES, ITEMS, False)
                d = exp(x.to(tl.float32) - highest, log_sum)
                tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty))
                if FP8:
                    tl.store(q_ptr + row * V + cols, (d * fp8_scale).to(q_ptr.dtype.element_ty))
            if WHOLE < V:
                x, cols = load_logits(row_ptr, WHOLE, V, LANES, ITEMS, True)
                d = exp(x.to(tl.float32) - highest, log_sum)
                tl.store(row_ptr + cols, d.to(logits_ptr.dtype.element_ty), mask=cols < V)
                if FP8:
                    tl.store(q_ptr + row * V + cols, (d * fp8_scale).to(q_ptr.dtype.element_ty), mask=cols < V)
            tl.debug_barrier()  # the target's element has been written by another thread
            d = exp(logit - highest, log_sum) - 1.0
            tl.store(row_ptr + target, d.to(logits_ptr.dtype.element_ty), mask=inside & (target != ignore_index))
            if FP8:
                d = (d * fp8_scale).to(q_ptr.dtype.element_ty)
                tl.store(q_ptr + row * V + target, d, mask=inside & (target != ignore_index))


@jit
def scale_kernel(x_ptr, scale_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """y = x * scale, the product in float32; scale is a float32 number on the GPU."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: size may pass 2^31
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * tl.load(scale_ptr)).to(y_ptr.dtype.element_ty), mask=at < size)


def scaled(x, scale, out=None):
    """
    x * scale for contiguous x and a 0-dim float32 scale, in x's dtype, written to out if that is given. PyTorch would round scale to
    x's dtype first, which moves all gradients by up to 0.2% in bfloat16, and takes four times as long.
    """
    y = torch.empty_like(x) if out is None else out
    c = Config(1, 65536 if interpreted else 2048, 4)
    if x.numel() > 0:
        launch(scale_kernel, (-(-x.numel() // c.chunk),), (x, scale, y), (x.numel(),), (c.chunk,), c)
    return y


def cross_entropy_config(V, programs=2):
    """Config of cross_entropy_kernel (rows: lanes, chunk: items of a lane) with so many programs a multiprocessor. Chosen among 70 on an H200."""
    items = 4
    lanes = min(1024, max(32, triton.next_power_of_2(V) // items))
    if interpreted:  # which pays per operation
        lanes = triton.next_power_of_2(V) // items or 1
    return Config(lanes, items, max(1, min(32, lanes // 32)), programs=programs)


def launch_cross_entropy(logits, targets, ignore_index, need_grad, config=None, q=None):
    """logits (M, V) contiguous, targets (M,) int64 -> losses (M,) float32; with need_grad logits become softmax - onehot, zero where ignored,
    and so does q, (M, V) e5m2 or None, times GRADIENT_SCALE.
    """
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    # two programs a multiprocessor if their rows, and what these become, stay in cache until they are read again: 12288 x 50304 in bfloat16
    # take 0.74 ms on an H200 (0.61 for a copy), and on an H100, with less cache, 0.99 ms by one (0.82 for a copy) instead of 1.04
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
    """All rows at once: softmax - onehot, which lies where the logits were, waits for backward."""

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
            ctx.save_for_backward(
                x, logits, count.clamp(min=1), *operands
            )  # of no rows the loss is NaN, but its gradient 0
            ctx.weight, ctx.tied = weight, tied
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        x, d, count, *operands = ctx.saved_tensors
        scale = dloss / count
        dx = None
        if ctx.needs_input_grad[0] and len(operands) == 3:
            columns, inverse, q = operands
            dx = fp8_input_gradient(Quantized(q, scale / GRADIENT_SCALE), columns, inverse, x.dtype)
        elif ctx.needs_input_grad[0]:
            dx = d @ operands[0]
            scaled(dx, scale, out=dx)
        # x is scaled instead of the result, which may be 60 times larger
        dw = weight_gradient(ctx.weight, d, scaled(x.contiguous(), scale)) if ctx.needs_input_grad[1] else None
        return dx, leave_gradient(ctx.weight, dw) if ctx.tied else dw, None, None, None, None, None, None


class ChunkedLinearCrossEntropyFunction(torch.autograd.Function):
    """Some rows at a time: their logits become their gradients, and these both matmuls, before the next rows follow."""

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
                if x.is_cuda and dtype in half_dtypes:
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
    Mean cross-entropy in nats, float32, of logits = x @ weight.T against targets; like F.cross_entropy(logits, targets, ignore_index), and by
    that where Triton cannot run. x: (..., C); weight: (V, C); targets: int64 (...). Under autocast the logits are in its dtype; softmax and
    loss are float32 in any case. Differentiable once, in x and weight. tied: weight is also the weight of an embedding() whose backward comes
    later and passes both gradients on. chunk_rows: rows of logits that exist at a time (0: all), to save memory.
    layer: the fp8_linear.Layer of the output layer, or None.
    A target outside the vocabulary other than ignore_index makes the loss NaN. Raises ValueError for targets of another shape than x's rows.
    """
    if targets.shape != x.shape[:-1]:
        raise ValueError(f'linear_cross_entropy: targets have shape {tuple(targets.shape)}, but x {tuple(x.shape)}')
    given, x, targets = x, x.reshape(-1, x.shape[-1]), targets.reshape(-1).contiguous()
    dtype = autocast_dtype(x) or x.dtype
    plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    if not (plain and dtype in float_dtypes and weight.dtype in float_dtypes and available(x.device)):
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
        return LinearCrossEntropyFunction.apply(x, weight, targets, ignore_index, dtype, need_grad, tied, active(layer))


def cross_entropy(logits, targets, ignore_index=-1):
    """
    F.cross_entropy of logits that stay as they are, for evaluation: mean in nats, float32. logits: (M, V); targets: int64 (M,). PyTorch makes
    one or two copies of the logits in float32 for it, more than all else that evaluation needs; here they are read once. By PyTorch, and in its
    dtype, where Triton cannot run and where logits want a gradient. A target outside the vocabulary other than ignore_index makes the loss NaN.
    Raises ValueError for targets of another shape than the logits' rows.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f'cross_entropy: targets have shape {tuple(targets.shape)}, but logits {tuple(logits.shape)}')
    plain = type(logits) is torch.Tensor and not torch.compiler.is_compiling()
    if logits.requires_grad or not (plain and logits.dtype in float_dtypes and available(logits.device)):
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)
    losses = launch_cross_entropy(logits.contiguous(), targets.contiguous(), ignore_index, False)
    return losses.sum() / (targets != ignore_index).sum()
