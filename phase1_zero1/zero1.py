"""
ZeRO stage 1: each rank keeps the optimizer state of its share of the parameters, updates that share, and sends the
result to the other ranks. Rajbhandari et al. 2020, section 5.1: arxiv.org/abs/1910.02054

    optimizer = Zero1Optimizer(torch.optim.AdamW(...))  # used like AdamW: step, zero_grad, state_dict, load_state_dict

torch.distributed.optim.ZeroRedundancyOptimizer assigns the parameters to ranks and steps them. It assigns whole
tensors, but GPT-2's token embedding alone is 31% of the model: 2.5 times the share of one rank in 8. This module
therefore passes it even pieces of the parameters, which are views of the parameters' own memory.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.distributed.optim import ZeroRedundancyOptimizer

from distributed import gather_from_ranks

ALIGN = 32  # elements: pieces start at multiples of 128 bytes, for vectorized kernels and NCCL
# the name from torch 2.13 on, and the earlier one
all_gather = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor


@dataclass(eq=False)
class Piece:
    """Elements start to stop of a flattened parameter."""

    param: torch.nn.Parameter
    index: int  # the parameter's number through all groups, as in AdamW's state_dict
    start: int
    stop: int
    shard: torch.nn.Parameter  # (stop - start,), a view of the parameter's memory
    owner: int = -1  # the rank that updates it


def split(param: torch.nn.Parameter, index: int, world_size: int) -> list[Piece]:
    """
    Splits the parameter into world_size equal pieces and one more for the few remaining elements. AdamW treats every
    element independently, so any split is correct. Vectors stay whole: they are 0.02% of a GPT, 0.1% with biases.
    """
    flat = param.detach().view(-1)
    size = flat.numel() // world_size // ALIGN * ALIGN if param.dim() >= 2 else 0
    cuts = [0] + [r * size for r in range(1, world_size + 1) if size]
    cuts += [flat.numel()] if cuts[-1] < flat.numel() else []
    return [Piece(param, index, a, b, torch.nn.Parameter(flat[a:b], param.requires_grad)) for a, b in pairwise(cuts)]


class EvenZero(ZeroRedundancyOptimizer):
    """
    ZeroRedundancyOptimizer over pieces of the parameters in param_groups. One grouped all-gather sends updated pieces
    to the other ranks; the original broadcasts each tensor separately.
    """

    def __init__(self, param_groups, optimizer_class, **defaults):
        world_size = dist.get_world_size()
        params = list(chain.from_iterable(group['params'] for group in param_groups))
        pieces = {p: split(p, i, world_size) for i, p in enumerate(params)}
        shards = {p: [piece.shard for piece in pieces[p]] for p in params}
        groups = [
            {**group, 'params': list(chain.from_iterable(shards[p] for p in group['params']))} for group in param_groups
        ]
        # parameters_as_bucket_view=True would put all parameters of a rank into one large storage. torch.compile's
        # DDPOptimizer splits the graph where parameter storages add up to a gradient bucket. With one large storage it
        # would split at almost every parameter and lose the fusions across the splits
        super().__init__(groups, optimizer_class, parameters_as_bucket_view=False, **defaults)
        self.pieces = list(chain.from_iterable(pieces.values()))
        for piece in self.pieces:
            piece.owner = self._param_to_rank[piece.shard]
        self._plan_sync(pieces)

    def _plan_sync(self, pieces):
        # ZeroRedundancyOptimizer assigns tensors in order of decreasing size, each to the rank with the least so far.
        # Equal pieces are thus assigned in turn, piece r to rank r, as an in-place all-gather requires
        self.in_place = []  # (elements of a parameter, this rank's part of them)
        rest = []  # vectors, and the remainders of matrices
        for param, its in pieces.items():
            if [piece.owner for piece in its[: self.world_size]] == list(range(self.world_size)):
                whole = param.detach().view(-1)[: its[self.world_size - 1].stop]
                self.in_place.append((whole, whole.chunk(self.world_size)[self.rank]))
                its = its[self.world_size :]
            rest += its
        # the rest is sent in one small buffer with one row per rank
        rows = [[piece for piece in rest if piece.owner == rank] for rank in range(self.world_size)]
        sizes = [[piece.shard.numel() for piece in row] for row in rows]
        self.buffer = self._all_params[0].new_empty(self.world_size, max(map(sum, sizes)))
        views = [self.buffer[rank, : sum(sizes[rank])].split(sizes[rank]) for rank in range(self.world_size)]
        shards = [[piece.shard.detach() for piece in row] for row in rows]
        self.sent = list(views[self.rank]), shards[self.rank]
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self.received = [s for rank in others for s in shards[rank]], [v for rank in others for v in views[rank]]

    @torch.no_grad()
    def _sync_params(self):
        """Ends step(): sends every rank the pieces that the other ranks updated."""
        if self.in_place:
            # gloo coalesces collectives for CPU tensors only (pytorch #152645)
            with nullcontext() if self.buffer.is_cuda and dist.get_backend() == 'gloo' else _coalescing_manager():
                for whole, own in self.in_place:
                    all_gather(whole, own)
        if self.buffer.numel():
            _copy(*self.sent)
            all_gather(self.buffer.view(-1), self.buffer[self.rank])
            _copy(*self.received)


def _copy(targets, sources):
    if targets:
        torch._foreach_copy_(targets, sources)  # few kernels for many tensors


class Zero1Optimizer(torch.optim.Optimizer):
    """
    Replaces `optimizer`, whose state must be empty, and shards its state over all ranks. param_groups, defaults and the
    gradients it reads belong to the whole parameters. Learning rates may be set in param_groups, and
    torch.amp.GradScaler works as usual. Every rank must call every method except zero_grad. moment_bytes: the size of
    AdamW's moments on this rank.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._step_supports_amp_scaling = getattr(optimizer, '_step_supports_amp_scaling', False)
        # its other options are in its param_groups
        options = {k: optimizer.defaults[k] for k in ('lr', 'fused') if k in optimizer.defaults}
        self.zero = EvenZero(self.param_groups, type(optimizer), **options)
        self.own = [piece for piece in self.zero.pieces if piece.owner == self.zero.rank]
        self.moment_bytes = self._moment_bytes()[self.zero.rank]

    def _moment_bytes(self) -> list[int]:
        sizes = [0] * self.zero.world_size
        for piece in self.zero.pieces:
            sizes[piece.owner] += 2 * piece.shard.numel() * piece.shard.element_size()
        return sizes

    def state_bytes(self):
        """Bytes of AdamW's two float32 moments: (on the rank with most, unsharded)."""
        sizes = self._moment_bytes()
        return max(sizes), sum(sizes)

    @torch.no_grad()
    def step(self):
        """Updates this rank's pieces, then gathers the others'. Gradients must be equal on all ranks, as after DDP."""
        for piece in self.own:
            grad = piece.param.grad
            piece.shard.grad = None if grad is None else grad.view(-1)[piece.start : piece.stop]
        for group, shard_group in zip(self.param_groups, self.zero.param_groups):
            shard_group.update({k: v for k, v in group.items() if k != 'params'})  # for this step's learning rate
        # GradScaler or StepGuard (step_guard.py) sets these here; a fused optimizer then skips its step on the GPU
        self.zero.optim.grad_scale = getattr(self, 'grad_scale', None)
        self.zero.optim.found_inf = getattr(self, 'found_inf', None)
        self.zero.step()
        for piece in self.own:
            piece.shard.grad = None  # a reference would keep the whole gradient alive

    @torch.no_grad()
    def state_dict(self) -> dict:
        """
        Returns on rank 0 the state_dict of the unsharded optimizer, with tensors on the CPU, and on other ranks a
        state_dict without state. Pieces are sent from CPU to CPU, each into its place in the whole tensor, and need no
        GPU memory.
        """
        result = super().state_dict()  # numbers the parameters; its state is empty, as self.zero holds the state
        number = {piece: n for n, piece in enumerate(self.zero.pieces)}
        state = {number[piece]: self.zero.optim.state.get(piece.shard, {}) for piece in self.own}
        # first, for each piece, its scalars, such as step, and the dtypes of its shards
        facts = {n: {k: v.cpu().clone() if v.dim() == 0 else v.dtype for k, v in s.items()} for n, s in state.items()}
        facts = gather_from_ranks(facts)
        if self.zero.rank != 0:
            for n, s in state.items():
                for k, v in s.items():
                    if v.dim():
                        dist.send(v.cpu(), dst=0)
            return result
        facts = {n: fact for rank in facts for n, fact in rank.items()}
        arriving = []
        for n, piece in enumerate(self.zero.pieces):
            for k, v in facts[n].items():
                whole = result['state'].setdefault(piece.index, {})
                if isinstance(v, torch.Tensor):
                    whole.setdefault(k, v)
                    continue
                if k not in whole:
                    whole[k] = torch.empty(piece.param.shape, dtype=v)
                part = whole[k].view(-1)[piece.start : piece.stop]
                if piece.owner == 0:
                    part.copy_(state[n][k])
                else:
                    arriving.append(dist.irecv(part, src=piece.owner))
        for request in arriving:
            request.wait()
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """
        Loads this rank's pieces from the state_dict of an unsharded optimizer, saved by any trainer at any world size.
        Reads only these pieces if the tensors are memory-mapped, and does not change state_dict.
        """
        for group, saved in zip(self.param_groups, state_dict['param_groups']):
            group.update({k: v for k, v in saved.items() if k != 'params'})
        pieces = {piece.shard: piece for piece in self.own}
        shards = chain.from_iterable(group['params'] for group in self.zero.optim.param_groups)
        state = {}
        for n, piece in enumerate(pieces[shard] for shard in shards):
            saved = state_dict['state'].get(piece.index, {})
            # a copy, because two pieces must not share one step tensor. The inner optimizer puts the step on the CPU or
            # the GPU, as it needs; ZeroRedundancyOptimizer.load_state_dict always puts it on the CPU, where fused AdamW
            # fails
            state[n] = {
                k: v.reshape(-1)[piece.start : piece.stop].to(piece.shard.device, copy=True) if v.dim() else v.clone()
                for k, v in saved.items()
            }
        self.zero.optim.load_state_dict({'state': state, 'param_groups': self.zero.optim.state_dict()['param_groups']})
