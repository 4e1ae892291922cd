"""
The second half of LayerNorm's weight gradients: sums the shares that the programs of its backward have written.

Each LayerNorm's backward writes P shares of dweight and dbias, and a small kernel sums them. GPT-2 124M has 25
LayerNorms, so a backward has 25 of these launches, and 25 more in which autograd adds the sums to .grad: 0.26 ms of a
micro-step of 22.6 ms on an H200, most of it latency. During the capture of a CUDA graph, the shares of up to 16
LayerNorms are collected instead; one launch sums them all, and another adds the sums to .grad. Both ways add in the
same order and give the same bits.

Collected gradients reach .grad only at the end of the backward. Shares are therefore collected only where nothing reads
.grad earlier: not with hooks, in autograd.grad, under FSDP, or in the micro-step in which DDP averages gradients.
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

LAYER_NORMS_PER_LAUNCH = 16  # their shares take 26 MB for GPT-2 124M


@jit
def reduce_kernel(
    partial_ptr,  # (L, 2, P, N) float32: the shares of L LayerNorms
    dw_ptr,  # (L, N), written by programs (i, 0, layer)
    db_ptr,  # (L, N), written by programs (i, 1, layer)
    P,
    N,
    FIRST: tl.constexpr,  # 0; or 1 to compute dbias only
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
    return -(-a // b)  # triton.cdiv takes 4 µs


@cache
def reduce_config(P, N, pdl):
    """Returns reduce_kernel's Config: enough programs to fill the GPU, as many rows at a time as registers hold."""
    cols = 16 if N <= 2048 else 32
    if interpreted:  # the interpreter's time grows with the number of programs
        cols = min(1024, triton.next_power_of_2(N))
    return Config(min(triton.next_power_of_2(P), max(1, 8192 // cols)), cols, pdl=pdl)


def launch_reduce(partial, dw, db):
    """Sums the shares partial (L, 2, P, N) into dw and db, each (L, N), or (N,) for L = 1, or None if not wanted."""
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
    Returns whether a wrapper of the forward in progress may read gradients before the end of its backward: FSDP, or DDP
    in the micro-step that averages gradients. Also returns True in a forward that activation checkpointing repeats,
    because DDP is not visible there.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    ddp = DDP._active_ddp_module
    return ddp is None or ddp.require_backward_grad_sync


def may_wait(parameters):
    """Returns whether a graph is being captured and nothing attached to these parameters reads .grad early."""
    return linear_module.capturing(parameters[0]) and all(
        linear_module.can_leave_gradient(p) and linear_module.accumulates(p) and not p._post_accumulate_grad_hooks
        for p in parameters
    )


class Shares:
    """Collects the shares of several LayerNorms, all of one shape, during one backward."""

    def __init__(self):
        self.memory, self.waiting = None, []

    def place(self, parameters, P, N):
        """Returns memory (2, P, N) for the shares of one more LayerNorm, with parameters [weight] or [weight, bias]."""
        shape = LAYER_NORMS_PER_LAUNCH, 2, P, N
        if self.waiting and (
            len(self.waiting) == LAYER_NORMS_PER_LAUNCH
            or self.memory.shape != shape
            or len(self.waiting[0]) != len(parameters)
        ):
            self.add_up()
        if self.memory is None or self.memory.shape != shape:
            self.memory = torch.empty(shape, dtype=torch.float32, device=parameters[0].device)
        self.waiting.append(parameters)
        return self.memory[len(self.waiting) - 1]

    @torch.no_grad()
    def add_up(self):
        """Sums the collected shares and adds the sums to .grad."""
        L, N = len(self.waiting), self.memory.shape[-1]
        sums = torch.empty((len(self.waiting[0]), L, N), dtype=torch.float32, device=self.memory.device)
        launch_reduce(self.memory[:L], sums[0], sums[1] if len(sums) > 1 else None)
        total = {}
        for parameters, layer_sums in zip(self.waiting, sums.unbind(1)):
            for p, grad in zip(parameters, layer_sums):
                total[p] = total[p] + grad if p in total else grad  # a LayerNorm that is used twice
        there = [p for p in total if p.grad is not None]
        for p, grad in total.items():
            if p.grad is None:
                p.grad = grad
        if there:
            torch._foreach_add_([p.grad for p in there], [total[p] for p in there])
        self.waiting = []


shares = WeakValueDictionary()  # (backward, device) -> Shares; autograd's callback holds them until the backward ends


def place(parameters, P, N):
    """Calls Shares.place() for the backward in progress, at whose end the shares are added up."""
    key = torch._C._current_graph_task_id(), parameters[0].device
    here = shares.get(key)
    if here is None:
        here = shares[key] = Shares()
        Variable._execution_engine.queue_callback(here.add_up)
    return here.place(parameters, P, N)


def place_of_shares(ctx, need_dw, need_db):
    """
    Returns the `place` argument of launch_backward if a LayerNorm's shares may be collected, else None. ctx: has
    .parameters, (weight, bias), and .read_early.
    """
    weight, bias = ctx.parameters
    parameters = [weight] if bias is None else [weight, bias]
    needed = need_dw and (bias is None or need_db)
    return partial(place, parameters) if needed and not ctx.read_early and may_wait(parameters) else None
