"""
A matmul for Hopper GPUs (H100, H200) that changes its result before it writes it. Here it writes exponentials of
logits.

    c = a @ b.T    or    c = exp2(log2(e) * a @ b.T - shift)

a (M, K), b (N, K) and c (M, N) are bfloat16, sums are float32.

A matmul that computes a function f of its result saves the kernel that would read the result again. But while a
program computes f and stores, in its *epilogue*, its tensor cores have nothing to do. That can cost more than it
saves, above all where K is as small as 768 and an epilogue comes often. The remedy is *warp specialization*: the
warps of a program do different things at the same time. In Triton, all warps of a program do the same. This kernel is
written in Gluon, the language below Triton in the same package. There, the program says which warps do what, where
data lies, and who waits for whom.

**Tiles.** c is cut into tiles of 128 x 128 numbers. There is one program per multiprocessor, 132 on an H200. Program
0 computes tiles 0, 132, 264 and so on. For a tile, it walks along K in steps of 64. In each step it multiplies 128 x
64 numbers of a by 64 x 128 numbers of b.

**Roles.** A program has three parts, which run at the same time:

    load         1 warp    asks the copy engine (TMA, tensor memory accelerator) to bring a and b to shared memory
    multiply 0   4 warps   computes every other tile of this program, starting with the first
    multiply 1   4 warps   computes the tiles between

The multiplying parts take turns (CUTLASS calls this ping-pong). While one computes f and stores, the other
multiplies, so the tensor cores always have work:

    multiply 0   | multiply tile 0 | f, store |       | multiply tile 2 | f, store |       | ...
    multiply 1                     | multiply tile 1  | f, store |      | multiply tile 3  | ...

Four warps are a *warpgroup*, the unit for which Hopper's tensor cores multiply (instruction wgmma). It keeps the sums
in registers: 128 x 128 numbers for 128 threads are 128 registers of each thread. The loading warp needs few registers
and gives up most of its share, so each multiplying thread may have 240.

**A ring of stages.** Shared memory holds 5 steps of a and b, with 32 KB each, and a tile of c for each part that
stores. The loading warp fills stage 0 to stage 4, then stage 0 again. Two barriers per stage say when it can be read
and when it can be overwritten:

    load        waits for freed[stage],    starts two copies, which arrive at filled[stage] when they are complete
    multiply    waits for filled[stage],   multiplies, then arrives at freed[stage]

These barriers (mbarriers) have *phases*. A phase completes when everything has arrived that the barrier was told to
expect, and the next phase begins. A wait names the parity of a phase, 0 or 1. It returns if the
latest phase of this parity is complete; the phase before the first counts as complete. A part that waits for a phase
too early would therefore pass. That is why there is a third pair of barriers, turn[0] and turn[1]: no part waits for
a stage before its turn.

**Locality.** 132 tiles are computed at a time. If they form a block of 12 x 11 tiles, they read only 12 + 11
different strips of a and b, so most copies find in the L2 cache what another program has fetched.

**Edges.** The copy engine reads zeros beyond the edges of a and b, and writes nothing beyond the edges of c.

Sources: Gluon's tutorials 05, 07 and 08 (github.com/triton-lang/triton, python/tutorials/gluon); the PTX manual on
mbarrier and wgmma; CUTLASS's documentation, "Efficient GEMM in CUDA", on warp specialization.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import PropagateNan

KEEP_NAN = gl.constexpr(PropagateNan.ALL)


class Tiles(NamedTuple):
    """Sizes that change the speed, not the result, apart from the number of sums."""

    rows: int = 128  # of a tile
    cols: int = 128
    depth: int = 64  # of a step along K: 128 bytes, the widest row that the copy engine spreads over all memory banks
    stages: int = 5
    strip: int = 12  # tiles of a row that are computed before the next row begins


@gluon.jit
def position(tile, size, ROWS: gl.constexpr, COLS: gl.constexpr, STRIP: gl.constexpr):
    """
    Returns the first row and the first column of a tile. Tiles are counted row by row through a strip of c that is
    STRIP tiles wide, then through the next strip.
    """
    M, N, _ = size
    down, across = gl.cdiv(M, ROWS), gl.cdiv(N, COLS)
    strip, inside = tile // (STRIP * down), tile % (STRIP * down)
    width = gl.minimum(STRIP, across - strip * STRIP)  # the last strip may be narrower
    return inside // width * ROWS, (strip * STRIP + inside % width) * COLS


@gluon.jit
def load(a_desc, b_desc, ring, size, tiles, STRIP: gl.constexpr):
    """The loading warp: copies a and b to the stages of the ring, step after step."""
    a_ring, b_ring, filled, freed = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    ROWS: gl.constexpr = a_ring.shape[1]
    DEPTH: gl.constexpr = a_ring.shape[2]
    COLS: gl.constexpr = b_ring.shape[1]
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, col = position(tile, size, ROWS, COLS, STRIP)
        for k in range(0, size[2], DEPTH):
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(freed.index(stage), phase ^ 1)  # freed in the previous round
            mbarrier.expect(filled.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [row, k], filled.index(stage), a_ring.index(stage))
            tma.async_copy_global_to_shared(b_desc, [col, k], filled.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit
def halves(x):
    """Returns the left and right half of x (rows, cols). No number moves: each thread holds some of both."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def multiply(
    c_desc,
    exp_ptrs,
    ring,
    c_halves,
    turn,
    size,
    tiles,
    STRIP: gl.constexpr,
    EXP: gl.constexpr,
    MAX_EXPONENT: gl.constexpr,
    ME: gl.constexpr,
):
    """A multiplying part, ME = 0 or 1: computes every other tile of this program."""
    M, N, K = size
    shifts_ptr, sums_ptr = exp_ptrs
    a_ring, b_ring, filled, freed = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    ROWS: gl.constexpr = a_ring.shape[1]
    COLS: gl.constexpr = b_ring.shape[1]
    HALF: gl.constexpr = COLS // 2
    # wgmma decides which thread holds which numbers of a tile: here, each warp holds 16 rows of every 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])

    steps = gl.cdiv(K, a_ring.shape[2])  # per tile
    step = ME * steps  # counts the steps of both parts, as the loading warp does
    computed = 0  # tiles
    for tile in range(gl.program_id(0) + ME * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        row, col = position(tile, size, ROWS, COLS, STRIP)
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, half_layout))
        if EXP:  # loaded long before it is needed
            shift = gl.load(shifts_ptr + rows, mask=rows < M, other=0.0)

        mbarrier.wait(turn.index(ME), (computed + 1 - ME) & 1)
        acc = gl.zeros([ROWS, COLS], gl.float32, layout)
        for k in range(steps):
            stage, phase = step % STAGES, step // STAGES & 1
            mbarrier.wait(filled.index(stage), phase)
            b = b_ring.index(stage).permute([1, 0])  # a view: wgmma can read b in either order
            acc = warpgroup_mma(a_ring.index(stage), b, acc, use_acc=k > 0, is_async=True)
            # one step stays in flight; the step before is complete, so free its stage
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(freed.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - ME), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(freed.index((step + STAGES - 1) % STAGES), count=1)
        step += steps  # skip the other part's

        sums = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, half_layout))
        parts = halves(acc)
        for i in gl.static_range(2):
            z = gl.convert_layout(parts[i], half_layout, assert_trivial=True)
            first = col + i * HALF
            if EXP:
                if first + HALF > N:  # columns beyond the edge must not count in the sums
                    cols = first + gl.arange(0, HALF, gl.SliceLayout(0, half_layout))
                    z = gl.where((cols < N)[None, :], z, float('-inf'))
                exponent = z * 1.4426950408889634 - shift[:, None]
                z = gl.exp2(gl.minimum(exponent, MAX_EXPONENT, propagate_nan=KEEP_NAN))
                sums += gl.sum(z, 1)
            tma.store_wait(1)  # until the copy engine has read this half of the previous tile
            c_halves.index(i).store(z.to(c_desc.dtype))
            fence_async_shared()  # makes these writes visible to the copy engine
            tma.async_copy_shared_to_global(c_desc, [row, first], c_halves.index(i))
        if EXP:
            gl.store(sums_ptr + col // COLS * M + rows, sums, mask=rows < M)
        computed += 1
    tma.store_wait(0)


@gluon.jit
def matmul_kernel(
    a_desc,  # (M, K) in blocks (rows of a tile, depth of a step)
    b_desc,  # (N, K) in blocks (columns of a tile, depth of a step)
    c_desc,  # (M, N) in blocks of half a tile: its left and right half are stored one after the other
    shifts_ptr,  # with EXP: (M,) float32
    sums_ptr,  # with EXP: (N / columns of a tile, M) float32, sums over the columns of a tile
    M,
    N,
    K,
    STAGES: gl.constexpr,
    STRIP: gl.constexpr,
    EXP: gl.constexpr,
    MAX_EXPONENT: gl.constexpr,
):
    ROWS: gl.constexpr = a_desc.block_type.shape[0]
    DEPTH: gl.constexpr = a_desc.block_type.shape[1]
    COLS: gl.constexpr = b_desc.block_type.shape[0]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, ROWS, DEPTH], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, COLS, DEPTH], b_desc.layout)
    c_0 = gl.allocate_shared_memory(c_desc.dtype, [2, ROWS, COLS // 2], c_desc.layout)
    c_1 = gl.allocate_shared_memory(c_desc.dtype, [2, ROWS, COLS // 2], c_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(freed.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)

    tiles = gl.cdiv(M, ROWS) * gl.cdiv(N, COLS)
    ring, size, exp_ptrs = (a_ring, b_ring, filled, freed), (M, N, K), (shifts_ptr, sums_ptr)
    gl.warp_specialize(
        [
            (multiply, (c_desc, exp_ptrs, ring, c_0, turn, size, tiles, STRIP, EXP, MAX_EXPONENT, 0)),
            (multiply, (c_desc, exp_ptrs, ring, c_1, turn, size, tiles, STRIP, EXP, MAX_EXPONENT, 1)),
            (load, (a_desc, b_desc, ring, size, tiles, STRIP)),
        ],
        [4, 1],  # warps of the second and third part; the first has num_warps
        [240, 24],  # registers per thread of these parts; the first gets the remaining 240
    )


def launch_arguments(a, b, c, shifts=None, sums=None, max_exponent=0.0, tiles=Tiles()):
    """Returns positional arguments and options of matmul_kernel, which computes exponentials if shifts are given."""

    def describe(x, *block):
        layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
        return TensorDescriptor.from_tensor(x, list(block), layout)

    a_desc, b_desc = describe(a, tiles.rows, tiles.depth), describe(b, tiles.cols, tiles.depth)
    c_desc = describe(c, tiles.rows, tiles.cols // 2)
    exp = shifts is not None
    pointers = (shifts, sums) if exp else (c, c)  # not used without exponentials
    constants = (tiles.stages, tiles.strip, exp, max_exponent)
    # 12 warps (the loading warp counts as 4) x 32 threads x 168 registers fill a multiprocessor
    options = dict(num_warps=4, maxnreg=168)
    return (a_desc, b_desc, c_desc, *pointers, len(a), len(b), a.shape[1], *constants), options


def launch(programs, a, b, c, *exponentials):
    """Runs the kernel for c (M, N), which it writes; exponentials: shifts, sums and max_exponent, or nothing."""
    arguments, options = launch_arguments(a, b, c, *exponentials)
    tiles = -(-len(a) // Tiles().rows) * -(-len(b) // Tiles().cols)
    with torch.cuda.device(a.device):  # Triton launches on the current device
        matmul_kernel[(min(programs, tiles),)](*arguments, **options)


def matmul(a, b, programs):
    """
    Returns a @ b.T (M, N) for contiguous bfloat16 a (M, K) and b (N, K) on a Hopper GPU; N and K are multiples of 8.
    programs: the number of multiprocessors.
    """
    c = torch.empty(len(a), len(b), dtype=a.dtype, device=a.device)
    launch(programs, a, b, c)
    return c


def exponentials(a, b, shifts, max_exponent, programs):
    """
    Returns exp2(min(log2(e) * a @ b.T - shifts[:, None], max_exponent)), bfloat16 (M, N), and sums over groups of 128
    of its columns before they are rounded, float32 (N / 128, M). a, b and programs as for matmul(); shifts: float32
    (M,).
    """
    c = torch.empty(len(a), len(b), dtype=a.dtype, device=a.device)
    sums = torch.empty(-(-len(b) // Tiles().cols), len(a), dtype=torch.float32, device=a.device)
    launch(programs, a, b, c, shifts, sums, float(max_exponent))
    return c, sums
