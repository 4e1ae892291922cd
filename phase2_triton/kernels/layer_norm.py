"""
LayerNorm as Triton kernels. The forward makes one pass over x, the backward one pass over x and dy. Statistics and sums
are float32.

    y = (x - mean) * rstd * weight + bias,  with the mean and rstd = 1 / sqrt(variance + eps) of each row

A row is the last dimension. A program holds ROWS whole rows as a tuple of tiles (ROWS, CHUNK), so a width that is not
a power of two pads only its last tile. Where CHUNK is the width of one warp's 16-byte loads and ROWS is the number of
warps, each warp owns a row, and the row's sums need no other warp.

Forward: the variance is computed in two passes over the registers, which is as accurate as Welford's method and costs
no traffic. mean and rstd stay float32.
Backward, with xhat = (x - mean) * rstd and g = weight * dy:

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy

The backward's grid is persistent: a fixed number of programs per multiprocessor stride over the rows. Each program
keeps its share of dweight and dbias in float32 registers and writes it once, as a row of partial sums. A second small
kernel adds these rows in a fixed order. There are no atomics, and the grid depends only on the shape and the GPU, so
the same call always gives the same bits.

Sources: Ba et al., Layer Normalization, 2016 (arXiv:1607.06450); partial sums per program without atomics, as in Apex
and in Liger-Kernel's RMSNorm. This file has the kernels, their launchers, the autograd function and layer_norm(). The
module is AddLayerNorm in modules.py.
"""

from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import fp8
from .device import FLOAT_DTYPES, available, jit, num_multiprocessors, programmatic_launch, tl, triton
from .fp8 import as_fp8, magnitude, record
from .launch import Config, launch
from .layer_norm_gradients import cdiv, launch_reduce, place_of_shares, read_early

MAX_WIDTH = 65_536
MAX_BACKWARD_WIDTH = 12_288  # backward keeps rows in registers; PyTorch computes the gradients of wider ones


@jit
def load_rows(ptr, rows, stride, M, N: tl.constexpr, CHUNK: tl.constexpr):
    """Returns rows of a matrix (M, N) as a tuple of tiles (ROWS, CHUNK), zero beyond the matrix."""
    tiles = ()
    for start in tl.static_range(0, N, CHUNK):
        cols = (start + tl.arange(0, CHUNK))[None, :]
        tiles = tiles + (
            tl.load(ptr + rows[:, None] * stride + cols, mask=(rows < M)[:, None] & (cols < N), other=0.0),
        )
    return tiles


@jit
def load_vector(ptr, cols, ROWS: tl.constexpr, N: tl.constexpr):
    """
    Returns columns (1, CHUNK) of a vector of N elements as (ROWS, CHUNK) float32. Each warp loads the elements that it
    needs, instead of receiving them through shared memory.
    """
    cols = tl.broadcast_to(cols, (ROWS, cols.shape[1]))
    return tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)


@jit
def sum_rows(x, CHUNK: tl.constexpr):
    """
    Returns x (ROWS, CHUNK) summed over ROWS, where each row is in another warp. tl.sum has 32-way bank conflicts here,
    which cost 10 µs per backward on an H200.
    """
    x = tl.trans(x)
    for _ in tl.static_range(12):  # ROWS is a power of two, far under 4096
        if x.shape[1] > 1:
            even, odd = tl.split(tl.reshape(x, (CHUNK, x.shape[1] // 2, 2)))
            x = even + odd
    return tl.reshape(x, (CHUNK,))


@jit
def add_rows(xs, ptr, branches, rows, M, N: tl.constexpr, CHUNK: tl.constexpr):
    """
    Adds the tiles `branches` to the tiles `xs` and writes the sums to ptr, (M, N) contiguous. Returns the sums in the
    dtype of ptr.
    """
    sums = ()
    for c in tl.static_range((N + CHUNK - 1) // CHUNK):
        cols = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
        total = (xs[c].to(tl.float32) + branches[c].to(tl.float32)).to(ptr.dtype.element_ty)
        tl.store(ptr + rows[:, None] * N + cols, total, mask=(rows < M)[:, None] & (cols < N))
        sums = sums + (total,)
    return sums


@jit
def forward_kernel(
    x_ptr,  # (M, N), rows x_stride elements apart
    branch_ptr,  # (M, N) contiguous, added to x; read only if ADD
    weight_ptr,  # (N,)
    bias_ptr,  # (N,), read only if HAS_BIAS
    sum_ptr,  # (M, N) contiguous: x + branch in the dtype of x; written only if ADD
    y_ptr,  # (M, N) contiguous
    stats_ptr,  # (2, M) float32: mean, rstd
    q_ptr,  # (M, N) contiguous: y in fp8; written only if FP8
    slot_ptr,  # row of fp8.Scales.state; read only if FP8
    x_stride,
    M,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    RESIDENT: tl.constexpr,  # keep the rows in registers; otherwise read them three times, the last two from cache
    ADD: tl.constexpr,  # normalize x + branch; needs RESIDENT
    HAS_BIAS: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (N + CHUNK - 1) // CHUNK
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: rows * N may pass 2^31
    live = (rows < M)[:, None]
    x_rows = x_ptr + rows[:, None] * x_stride
    xs = ()
    if RESIDENT:
        xs = load_rows(x_ptr, rows, x_stride, M, N, CHUNK)
        if ADD:
            xs = add_rows(xs, sum_ptr, load_rows(branch_ptr, rows, N, M, N, CHUNK), rows, M, N, CHUNK)

    # the mean of a row of equal elements must be exactly that element: 1 / sqrt(eps) would multiply any difference.
    # float32 sums of equal 16-bit floats are exact; for float32, sum differences from the first element
    first = tl.zeros((ROWS,), tl.float32)
    if x_ptr.dtype.element_ty == tl.float32:
        first = tl.load(x_ptr + rows * x_stride, mask=rows < M, other=0.0)
        if ADD:
            first += tl.load(branch_ptr + rows * N, mask=rows < M, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        if not RESIDENT:
            tl.debug_barrier()  # otherwise the compiler loads all chunks at once, and spills
        cols = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
        x = xs[c] if RESIDENT else tl.load(x_rows + cols, mask=live & (cols < N), other=0.0)
        total += tl.where(cols < N, x.to(tl.float32) - first[:, None], 0.0)
    mean = first + tl.div_rn(tl.sum(total, 1), tl.full((ROWS,), N, tl.float32))

    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for c in tl.static_range(CHUNKS):
        if not RESIDENT:
            tl.debug_barrier()
        cols = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
        x = xs[c] if RESIDENT else tl.load(x_rows + cols, mask=live & (cols < N), other=0.0)
        centred = tl.where(cols < N, x.to(tl.float32) - mean[:, None], 0.0)
        total += centred * centred
    rstd = tl.math.rsqrt(tl.sum(total, 1) / N + eps)

    if FP8:
        fp8_scale = tl.load(slot_ptr + 1)
        amax = tl.zeros((ROWS, CHUNK), tl.int32)
    for c in tl.static_range(CHUNKS):
        if not RESIDENT:
            tl.debug_barrier()
        cols = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
        x = xs[c] if RESIDENT else tl.load(x_rows + cols, mask=live & (cols < N), other=0.0)
        y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * load_vector(weight_ptr, cols, ROWS, N)
        if HAS_BIAS:
            y += load_vector(bias_ptr, cols, ROWS, N)
        tl.store(y_ptr + rows[:, None] * N + cols, y.to(y_ptr.dtype.element_ty), mask=live & (cols < N))
        if FP8:
            q = as_fp8(y, fp8_scale, q_ptr.dtype.element_ty)
            tl.store(q_ptr + rows[:, None] * N + cols, q, mask=live & (cols < N))
            amax = tl.maximum(amax, tl.where(live & (cols < N), magnitude(y), 0))
    tl.store(stats_ptr + rows, mean, mask=rows < M)
    tl.store(stats_ptr + M + rows, rstd, mask=rows < M)
    if FP8:
        record(slot_ptr, tl.max(amax))


@jit
def backward_kernel(
    dy_ptr,  # (M, N), rows dy_stride elements apart
    x_ptr,  # (M, N), rows x_stride elements apart
    weight_ptr,  # (N,)
    stats_ptr,  # (2, M) float32: mean, rstd
    dsum_ptr,  # (M, N) contiguous: the other gradient of x, added to dx; read only if ADD
    dx_ptr,  # (M, N) contiguous, written only if NEED_DX
    dbranch_ptr,  # (M, N) contiguous: dx in another dtype; written only if COPY
    partial_ptr,  # (2, P, N) float32 for P programs: their shares of dweight and of dbias
    q_ptr,  # (M, N) contiguous: the branch's dx in fp8; written only if FP8
    slot_ptr,  # row of fp8.Scales.state; read only if FP8
    dy_stride,
    x_stride,
    M,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PREFETCH: tl.constexpr,  # load the next rows to registers during the computation of these
    ADD: tl.constexpr,
    COPY: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    NEED_DB: tl.constexpr,
    FP8: tl.constexpr,  # needs NEED_DX
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (N + CHUNK - 1) // CHUNK
    pid = tl.program_id(0).to(tl.int64)
    dw_ptr = partial_ptr + pid * N
    db_ptr = partial_ptr + (tl.num_programs(0) + pid) * N

    if FP8:
        amax = tl.zeros((ROWS,), tl.int32)
    dws, dbs = (), ()
    for c in tl.static_range(CHUNKS):
        dws = dws + (tl.zeros((ROWS, CHUNK), tl.float32),)
        dbs = dbs + (tl.zeros((ROWS, CHUNK), tl.float32),)

    rows = pid * ROWS + tl.arange(0, ROWS)  # int64: rows * N may pass 2^31
    next_xs, next_dys = (), ()
    if PREFETCH:
        next_xs = load_rows(x_ptr, rows, x_stride, M, N, CHUNK)
        next_dys = load_rows(dy_ptr, rows, dy_stride, M, N, CHUNK)
        next_mean = tl.load(stats_ptr + rows, mask=rows < M, other=0.0)
        next_rstd = tl.load(stats_ptr + M + rows, mask=rows < M, other=0.0)
    for tile in tl.range(pid, tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)
        live = (rows < M)[:, None]
        xs, dys = next_xs, next_dys
        if PREFETCH:
            mean, rstd = next_mean, next_rstd
            later = rows + ROWS * tl.num_programs(0)
            next_xs = load_rows(x_ptr, later, x_stride, M, N, CHUNK)
            next_dys = load_rows(dy_ptr, later, dy_stride, M, N, CHUNK)
            next_mean = tl.load(stats_ptr + later, mask=later < M, other=0.0)
            next_rstd = tl.load(stats_ptr + M + later, mask=later < M, other=0.0)
        else:
            xs = load_rows(x_ptr, rows, x_stride, M, N, CHUNK)
            dys = load_rows(dy_ptr, rows, dy_stride, M, N, CHUNK)
            mean = tl.load(stats_ptr + rows, mask=rows < M, other=0.0)
            rstd = tl.load(stats_ptr + M + rows, mask=rows < M, other=0.0)

        dsums = ()
        if ADD:
            dsums = load_rows(dsum_ptr, rows, N, M, N, CHUNK)  # load early, use last
        sum_g = tl.zeros((ROWS, CHUNK), tl.float32)
        sum_gx = tl.zeros((ROWS, CHUNK), tl.float32)
        new_dws, new_dbs = (), ()
        for c in tl.static_range(CHUNKS):
            cols = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
            dy = dys[c].to(tl.float32)
            xhat = (xs[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
            if NEED_DX:
                g = dy * load_vector(weight_ptr, cols, ROWS, N)
                sum_g += g
                sum_gx += g * xhat
            new_dws = new_dws + (dws[c] + dy * xhat if NEED_DW else dws[c],)
            new_dbs = new_dbs + (dbs[c] + dy if NEED_DB else dbs[c],)

        if NEED_DX:
            # one reduction for both sums: warps that share a row synchronize once
            sum_g, sum_gx = tl.split(tl.sum(tl.join(sum_g, sum_gx), 1))
            if FP8:
                fp8_scale = tl.load(slot_ptr + 1)  # here and not before the loop, where it would hold a register
            shift = (-rstd * sum_g / N)[:, None]
            slope = (-rstd * sum_gx / N)[:, None]
            for c in tl.static_range(CHUNKS):
                cols = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
                mask = live & (cols < N)
                xhat = (xs[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
                g = dys[c].to(tl.float32) * load_vector(weight_ptr, cols, ROWS, N)
                dx = g * rstd[:, None] + (xhat * slope + shift)
                if ADD:
                    dx += dsums[c].to(tl.float32)
                tl.store(dx_ptr + rows[:, None] * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                if COPY:
                    tl.store(dbranch_ptr + rows[:, None] * N + cols, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
                if FP8:
                    q = as_fp8(dx, fp8_scale, q_ptr.dtype.element_ty)
                    tl.store(q_ptr + rows[:, None] * N + cols, q, mask=mask)
                    amax = tl.maximum(amax, tl.max(tl.where(mask, magnitude(dx), 0), 1))
        dws, dbs = new_dws, new_dbs

    for c in tl.static_range(CHUNKS):
        cols = c * CHUNK + tl.arange(0, CHUNK)
        if NEED_DW:
            tl.store(dw_ptr + cols, sum_rows(dws[c], CHUNK), mask=cols < N)
        if NEED_DB:
            tl.store(db_ptr + cols, sum_rows(dbs[c], CHUNK), mask=cols < N)
    if FP8:
        record(slot_ptr, tl.max(amax, 0))


@cache
def forward_config(N, itemsize, pdl, fp8=False):
    """
    Returns the Config of forward_kernel for a width N and the bytes of an element of x. pdl: whether programs may start
    early. fp8: whether they write FP8 too.
    """
    vector = 32 * 16 // itemsize  # elements that one warp loads at once
    if N < vector:
        chunk = triton.next_power_of_2(N)
        return Config(4 * vector // chunk, chunk, pdl=pdl)
    warps = triton.next_power_of_2(cdiv(N * itemsize, 3072))  # 24 to 96 bytes of a row in a thread
    if warps > 32 or N > 32_768:
        return Config(1, 4096, 16, resident=False, pdl=pdl)
    # with 16 elements per thread, the fp8 store has another layout, and Triton computes y in both
    rows = 2 if warps == 1 and itemsize == 2 and not fp8 else 1
    return Config(rows, warps * vector, warps, pdl=pdl)


# Configs of backward_kernel by the bytes of an element of x and the largest width. Measured with
# bench_layer_norm.py --tune: 2 bytes on an H200, 4 bytes on an H100.
BACKWARD_CONFIGS = {
    2: {
        # one warp per row; without the cap on registers half as many programs fit
        768: Config(8, 256, 8, programs=2, registers=128),
        2048: Config(2, 1024, 8, programs=2, prefetch=True, registers=128),
        8192: Config(1, 2048, 8, programs=2, prefetch=True),
        12288: Config(1, 2048, 8, programs=1, prefetch=True),
    },
    4: {
        1024: Config(2, 256, 4, programs=3),
        2048: Config(1, 1024, 8, programs=3),
        4096: Config(1, 1024, 8, programs=2),
        12288: Config(1, 1024, 8, programs=1),
    },
}


@cache
def backward_config(N, itemsize, pdl):
    """Returns the Config of backward_kernel, like forward_config. N is at most MAX_BACKWARD_WIDTH."""
    vector = 32 * 16 // itemsize
    if N < vector:
        chunk = triton.next_power_of_2(N)
        return Config(4 * vector // chunk, chunk, programs=4, pdl=pdl)
    width = min(width for width in BACKWARD_CONFIGS[itemsize] if N <= width)
    return BACKWARD_CONFIGS[itemsize][width]._replace(pdl=pdl)


def rows_of(x):
    """
    Returns x (..., N) as rows, and the elements from one row to the next. Copies x only if its strides require it.
    """
    N = x.shape[-1]
    if x.is_contiguous():
        return x, N
    rows = x.reshape(-1, N)
    rows = rows if rows.stride(1) == 1 or N == 1 else rows.contiguous()
    return rows, rows.stride(0)


def launch_forward(x, branch, weight, bias, eps, out_dtype, slot=None):
    """
    Returns (y, stats, x) for x (..., N), weight (N,) and bias (N,) or None: y (..., N) contiguous in out_dtype, and
    stats (2, M) float32, the mean and rstd of each row. With branch (..., N), x + branch replaces x, also in the
    result, where it is contiguous and in the dtype of x. With a Slot, y carries its fp8 form, see fp8.attach().
    """
    N = x.shape[-1]
    rows, stride = rows_of(x)
    weight = weight.contiguous()
    M = x.numel() // N
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    stats = torch.empty((2, M), dtype=torch.float32, device=x.device)
    total = x if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if M > 0:
        c = forward_config(N, x.element_size(), programmatic_launch(x.device), slot is not None)
        launch(
            forward_kernel,
            (cdiv(M, c.rows),),
            (
                rows,
                rows if branch is None else branch.contiguous(),
                weight,
                weight if bias is None else bias.contiguous(),
                total,
                y,
                stats,
                *fp8_operands(y, slot),
            ),
            (stride, M, eps),
            (N, c.rows, c.chunk, c.resident, branch is not None, bias is not None, slot is not None, c.pdl),
            c,
        )
    return y, stats, total


def fp8_operands(y, slot):
    """
    Returns the kernels' q_ptr and slot_ptr for y, and attaches the fp8 tensor to y. Without a Slot, y stands in for
    both.
    """
    if slot is None:
        return y, y
    q = slot.empty_like(y)
    fp8.attach(y, q, slot)
    return q, slot.row


def pytorch_backward(dy, x, weight, bias_dtype, stats, need_dx, need_dw, need_db):
    """Returns launch_backward's dx, dweight and dbias, computed by PyTorch in float32 from the kernel's statistics."""
    mean, rstd = stats.view(2, *x.shape[:-1], 1)
    weight_float = weight.float()  # also passed as the bias, of which only the shape matters
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.float(), x.float(), weight.shape, mean, rstd, weight_float, weight_float, [need_dx, need_dw, need_db]
    )
    return (
        dx.to(x.dtype) if need_dx else None,
        dw.to(weight.dtype) if need_dw else None,
        db.to(bias_dtype) if need_db else None,
    )


def launch_backward(
    dy, x, weight, bias_dtype, stats, need_dx, need_dw, need_db, dsum=None, branch_dtype=None, place=None, slot=None
):
    """
    Returns (dx, dweight, dbias, dbranch): dx (..., N) like x, dweight and dbias (N,) in their own dtypes, None for each
    that is not needed. N is at most MAX_BACKWARD_WIDTH.

    dsum (..., N), in the dtype of x, is added to dx. dbranch is dx in branch_dtype, and dx itself if that is None or
    x's. With place(P, N), which returns (2, P, N) float32, the programs leave their shares of dweight and dbias there,
    and both results are None. With a Slot, dbranch carries its fp8 form.
    """
    N = x.shape[-1]
    (rows, stride), (dy_rows, dy_stride) = rows_of(x), rows_of(dy)
    M = x.numel() // N
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    later = place is not None and M > 0
    dw = torch.empty(N, dtype=weight.dtype, device=x.device) if need_dw and not later else None
    db = torch.empty(N, dtype=bias_dtype, device=x.device) if need_db and not later else None
    copy = branch_dtype not in (None, x.dtype)
    dbranch = torch.empty(x.shape, dtype=branch_dtype, device=x.device) if copy else dx
    if M == 0:
        return dx, dw if dw is None else dw.zero_(), db if db is None else db.zero_(), dbranch
    c = backward_config(N, x.element_size(), programmatic_launch(x.device))
    P = min(cdiv(M, c.rows), c.programs * num_multiprocessors(x.device))
    if later:
        partial = place(P, N)
    else:
        partial = torch.empty((2, P, N) if need_dw or need_db else 1, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel,
        (P,),
        (
            dy_rows,
            rows,
            weight.contiguous(),
            stats,
            rows if dsum is None else dsum.contiguous(),
            rows if dx is None else dx,
            rows if dbranch is None else dbranch,
            partial,
            *fp8_operands(rows if dbranch is None else dbranch, slot),
        ),
        (dy_stride, stride, M),
        (N, c.rows, c.chunk, c.prefetch, dsum is not None, copy, need_dx, need_dw, need_db, slot is not None, c.pdl),
        c,
    )
    if (need_dw or need_db) and not later:
        launch_reduce(partial[None], dw, db)
    return dx, dw, db, dbranch


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype):
        y, stats, _ = launch_forward(x, None, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, stats)
        ctx.parameters, ctx.read_early = (weight, bias), read_early()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, stats = ctx.saved_tensors
        bias_dtype = None if ctx.parameters[1] is None else ctx.parameters[1].dtype
        arguments = dy, x, weight, bias_dtype, stats, *ctx.needs_input_grad[:3]
        if x.shape[-1] > MAX_BACKWARD_WIDTH:
            return *pytorch_backward(*arguments), None, None
        return *launch_backward(*arguments, place=place_of_shares(ctx, *ctx.needs_input_grad[1:3]))[:3], None, None


def check_parameters(x, weight, bias):
    """Raises if the kernels would read memory outside weight or bias; see layer_norm."""
    for name, p in (('weight', weight), ('bias', bias)):
        if p is None:
            continue
        if p.shape != x.shape[-1:]:
            raise ValueError(
                f'layer_norm: {name} has shape {tuple(p.shape)}, but the last dimension of x is {tuple(x.shape[-1:])}'
            )
        if p.device != x.device:
            raise ValueError(f'layer_norm: {name} is on {p.device}, x on {x.device}')
        if p.dtype != x.dtype and torch.promote_types(p.dtype, x.dtype) != p.dtype:
            raise TypeError(f'layer_norm: {name} is {p.dtype}, narrower than x, which is {x.dtype}')


def runs_eagerly(x):
    """
    Returns whether x is a plain tensor outside torch.compile. torch.compile fuses PyTorch's own operations and cannot
    see into kernels.
    """
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def layer_norm(x, weight, bias=None, eps=1e-5, out_dtype=None):
    """
    Returns LayerNorm over the last dimension, like torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps).
    Uses Triton kernels where they can run (see kernels.available), and that function elsewhere.

    x: (..., N), float32, bfloat16 or float16, with any strides and any number of rows, including none. weight, bias (or
    None): (N,), in the dtype of x or a wider one. Returns (..., N) in out_dtype, contiguous if the kernels ran.
    out_dtype defaults to F.layer_norm's: float32 under autocast, otherwise the dtype of x. If a matmul follows, pass
    torch.get_autocast_dtype(...), and no cast is needed.

    Differentiable once in x, weight and bias; the backward is deterministic. PyTorch computes the gradients of rows
    wider than 12,288. It also computes everything under torch.compile, for other dtypes (float64) and for rows wider
    than 65,536.

    Raises ValueError for a weight or bias of another shape or device, TypeError for one narrower than x.
    """
    check_parameters(x, weight, bias)
    if out_dtype is None:
        out_dtype = reference_dtype(x)
    if not (
        runs_eagerly(x)
        and x.dtype in FLOAT_DTYPES
        and weight.dtype in FLOAT_DTYPES
        and 0 < x.shape[-1] <= MAX_WIDTH
        and available(x.device)
    ):
        return reference(x, weight, bias, eps, out_dtype)
    return LayerNormFunction.apply(x, weight, bias, eps, out_dtype)


def reference_dtype(x):
    """Returns the dtype of F.layer_norm's result for x. Autocast on CUDA (not on the CPU) makes it float32."""
    return (
        torch.float32
        if x.device.type == 'cuda' and x.dtype in FLOAT_DTYPES and torch.is_autocast_enabled('cuda')
        else x.dtype
    )


def reference(x, weight, bias=None, eps=1e-5, out_dtype=None):
    """Returns F.layer_norm, also for weights wider than x, which CUDA refuses."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps).to(
        out_dtype or x.dtype
    )
