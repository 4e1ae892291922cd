"""The second half of LayerNorm's weight gradients: adding up the shares that the programs of its backward have left.

Each backward leaves P shares of dweight and dbias, and a small kernel sums them. GPT-2 124M has 25 LayerNorms, so that is 25 launches in
a backward, and 25 more for autograd to add the sums to .grad: 0.26 ms of a micro-step of 22.6 ms on an H200, most of it latency. While a
CUDA graph is captured, the shares of up to 16 LayerNorms wait instead, one launch sums them all, and another adds the sums to .grad.
Both ways sum in the same order and give the same bits.

Then .grad is complete at the end of the backward and not before. So gradients wait only where nothing reads them earlier: not with hooks,
in autograd.grad, in the micro-step in which DDP averages gradients, or under FSDP. Without CUDA graphs they do not wait either.
"""

from functools import cache, partial
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel as DDP

from . import linear as linear_module
from .device import interpreted, jit, programmatic_launch, tl, triton
from .launch import Config, launch

TOGETHER = 16  # LayerNorms whose shares wait at a time: 26 MB for GPT-2 124M


@jit
def reduce_kernel(
    partial_ptr,  # (L, 2, P, N) float32 of L LayerNorms
    dw_ptr,  # (L, N), written by programs (i, 0, layer)
    db_ptr,  # (L, N), written by programs (i, 1, layer)
    P,
    N,
    FIRST: tl.constexpr,  # 0, or 1 where only dbias is wanted
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    which, layer = tl.program_id(1) + FIRST, tl.program_id(2)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, P, ROWS):
        rows = (layer * 2 + which) * P + start + tl.arange(0, ROWS)
        mask = ((start + tl.arange(0, ROWS)) < P)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    if which == 0:
        tl.store(dw_ptr + layer * N + cols, tl.sum(total, 0).to(dw_ptr.dtype.element_ty), mask=cols < N)
    else:
        tl.store(db_ptr + layer * N + cols, tl.sum(total, 0).to(db_ptr.dtype.element_ty), mask=cols < N)


def cdiv(a, b):
    return -(-a // b)  # triton.cdiv, but not 4 µs


@cache
def reduce_config(P, N, pdl):
    """Config of reduce_kernel (chunk: columns): enough programs to fill the GPU, and as many rows at once as registers hold."""
    cols = 16 if N <= 2048 else 32
    if interpreted:  # which pays per program
        cols = min(1024, triton.next_power_of_2(N))
    return Config(min(triton.next_power_of_2(P), max(1, 8192 // cols)), cols, pdl=pdl)


def launch_reduce(partial, dw, db):
    """Sums the shares partial (L, 2, P, N) to dw (L, N) and db (L, N), or (N,) for L = 1; neither where it is None."""
    L, _, P, N = partial.shape
    c = reduce_config(P, N, programmatic_launch(partial.device))
    launch(
        reduce_kernel,
        (cdiv(N, c.chunk), (dw is not None) + (db is not None), L),
        (partial, partial if dw is None else dw, partial if db is None else db),
        (P, N),
        (0 if dw is not None else 1, c.rows, c.chunk, c.pdl),
        c,
    )


def read_early():
    """
    Whether a wrapper may read gradients before the end of the backward of the forward that runs: FSDP, and DDP where it averages them.
    In a forward that is repeated for activation checkpointing DDP cannot be seen, and the answer is yes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    ddp = DDP._active_ddp_module
    return ddp is None or ddp.require_backward_grad_sync


def may_wait(parameters):
    """Whether the gradients of these parameters may be complete at the end of the backward only, as far as they can tell."""
    return linear_module.capturing(parameters[0]) and all(
        linear_module.can_leave_gradient(p) and linear_module.accumulates(p) and not p._post_accumulate_grad_hooks
        for p in parameters
    )


class Shares:
    """Shares of LayerNorms' gradients that wait in one backward, all of one shape."""

    def __init__(self):
        self.memory, self.waiting = None, []

    def place(self, parameters, P, N):
        """Memory (2, P, N) for the shares of one more LayerNorm with parameters [weight] or [weight, bias]."""
        shape = TOGETHER, 2, P, N
        if self.waiting and (
            len(self.waiting) == TOGETHER or self.memory.shape != shape or len(self.waiting[0]) != len(parameters)
        ):
            self.add_up()
        if self.memory is None or self.memory.shape != shape:
            self.memory = torch.empty(shape, dtype=torch.float32, device=parameters[0].device)
        self.waiting.append(parameters)
        return self.memory[len(self.waiting) - 1]

    @torch.no_grad()
    def add_up(self):
        """Sums what waits, and adds it to .grad."""
        L, N = len(self.waiting), self.memory.shape[-1]
        sums = torch.empty((len(self.waiting[0]), L, N), dtype=torch.float32, device=self.memory.device)
        launch_reduce(self.memory[:L], sums[0], sums[1] if len(sums) > 1 else None)
        total = {}
        for parameters, layer_sums in zip(self.waiting, sums.unbind(1)):
            for p, grad in zip(parameters, layer_sums):
                total[p] = total[p] + grad if p in total else grad  # a LayerNorm may be used twice
        there = [p for p in total if p.grad is not None]
        for p, grad in total.items():
            if p.grad is None:
                p.grad = grad
        if there:
            torch._foreach_add_([p.grad for p in there], [total[p] for p in there])
        self.waiting = []


shares = WeakValueDictionary()  # by backward and device; a backward that fails takes its own along


def place(parameters, P, N):
    """Shares.place() of the backward that runs, which adds up at its end."""
    key = torch._C._current_graph_task_id(), parameters[0].device
    here = shares.get(key)
    if here is None:
        here = shares[key] = Shares()
        Variable._execution_engine.queue_callback(here.add_up)
    return here.place(parameters, P, N)


def place_of_shares(ctx, need_dw, need_db):
    """launch_backward's `place` where a LayerNorm's gradients may wait, else None. ctx: with parameters (weight, bias), read_early."""
    weight, bias = ctx.parameters
    parameters = [weight] if bias is None else [weight, bias]
    needed = need_dw and (bias is None or need_db)
    return partial(place, parameters) if needed and not ctx.read_early and may_wait(parameters) else None
