"""
ZeRO stage 1: each rank keeps the optimizer's state for its share of the parameters, updates that share, and sends the
result to the others. Rajbhandari et al. 2020, section 5.1: arxiv.org/abs/1910.02054

    optimizer = Zero1Optimizer(torch.optim.AdamW(...))  # and then as before: step, zero_grad, state_dict, load_state_dict

torch.distributed.optim.ZeroRedundancyOptimizer decides which rank owns what, and steps it. It deals in whole tensors, and
GPT-2's token embedding alone is 31% of the model: 2.5 times the share of one rank in 8. So it gets the parameters in even
pieces, which are views of the parameters' own memory.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.distributed.optim import ZeroRedundancyOptimizer

from distributed import gather_from_ranks

ALIGN = 32  # elements: pieces start at multiples of 128 bytes, which vectorized kernels and NCCL like
all_gather = (
    getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
)  # its name from torch 2.13 on, and before


@dataclass(eq=False)
class Piece:
    """Elements start to stop of a parameter, flattened."""

    param: torch.nn.Parameter
    index: int  # of the parameter, counted through all groups, as in AdamW's state_dict
    start: int
    stop: int
    shard: torch.nn.Parameter  # (stop - start,), in the parameter's memory
    owner: int = -1  # the rank that updates it


def split(param, index, world_size):
    """
    The parameter in world_size equal pieces, and one more for the few elements left. AdamW treats every element by itself,
    so it does not matter where a parameter is cut. Vectors stay whole: they are 0.02% of a GPT, 0.1% with biases.
    """
    flat = param.detach().view(-1)
    size = flat.numel() // world_size // ALIGN * ALIGN if param.dim() >= 2 else 0
    cuts = [0] + [r * size for r in range(1, world_size + 1) if size]
    cuts += [flat.numel()] if cuts[-1] < flat.numel() else []
    return [Piece(param, index, a, b, torch.nn.Parameter(flat[a:b], param.requires_grad)) for a, b in pairwise(cuts)]


class EvenZero(ZeroRedundancyOptimizer):
    """
    ZeroRedundancyOptimizer over the pieces of param_groups' parameters. Updated pieces reach the other ranks in one grouped
    all-gather; the original broadcasts each tensor by itself.
    """

    def __init__(self, param_groups, optimizer_class, **defaults):
        world_size = dist.get_world_size()
        params = list(chain.from_iterable(group['params'] for group in param_groups))
        pieces = {p: split(p, i, world_size) for i, p in enumerate(params)}
        shards = {p: [piece.shard for piece in pieces[p]] for p in params}
        groups = [
            {**group, 'params': list(chain.from_iterable(shards[p] for p in group['params']))} for group in param_groups
        ]
        # parameters_as_bucket_view=True would put all parameters of a rank into one large storage. Then DDPOptimizer of
        # torch.compile, which cuts the graph where the storages of parameters add up to a gradient bucket, cuts it at
        # almost every parameter, and the fusions across the cuts are lost
        super().__init__(groups, optimizer_class, parameters_as_bucket_view=False, **defaults)
        self.pieces = list(chain.from_iterable(pieces.values()))
        for piece in self.pieces:
            piece.owner = self._param_to_rank[piece.shard]
        self._plan_sync(pieces)

    def _plan_sync(self, pieces):
        # ZeroRedundancyOptimizer goes from the largest tensor to the smallest and gives each to the rank that has least. With
        # equal pieces this deals them out in turn, piece r to rank r: what an all-gather needs to work in place
        self.in_place = []  # (elements of a parameter, those of them that are this rank's)
        rest = []  # vectors, and what remained of matrices
        for param, its in pieces.items():
            if [piece.owner for piece in its[: self.world_size]] == list(range(self.world_size)):
                whole = param.detach().view(-1)[: its[self.world_size - 1].stop]
                self.in_place.append((whole, whole.chunk(self.world_size)[self.rank]))
                its = its[self.world_size :]
            rest += its
        # the rest travels in one small buffer with a row for each rank
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
        """The last part of step(): every rank gets the pieces that the others updated."""
        if self.in_place:
            # gloo takes several at once of the CPU's memory only (pytorch #152645)
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
    Stands in for `optimizer`, whose state must be empty, with the state sharded over all ranks. param_groups, defaults and
    the gradients it reads are those of the whole parameters; learning rates may be set in param_groups, and torch.amp.GradScaler
    works as with the optimizer itself. Each method but zero_grad is called on every rank. moment_bytes: the size of AdamW's
    moments on this rank.
    """

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._step_supports_amp_scaling = getattr(optimizer, '_step_supports_amp_scaling', False)
        # what else the optimizer was made with is in its param_groups
        options = {k: optimizer.defaults[k] for k in ('lr', 'fused') if k in optimizer.defaults}
        self.zero = EvenZero(self.param_groups, type(optimizer), **options)
        self.own = [piece for piece in self.zero.pieces if piece.owner == self.zero.rank]
        self.moment_bytes = self._moment_bytes()[self.zero.rank]

    def _moment_bytes(self):
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
        """Updates this rank's pieces, then all parameters from their owners. Gradients must be equal on all ranks, as DDP leaves them."""
        for piece in self.own:
            grad = piece.param.grad
            piece.shard.grad = None if grad is None else grad.view(-1)[piece.start : piece.stop]
        for group, shard_group in zip(self.param_groups, self.zero.param_groups):
            shard_group.update({k: v for k, v in group.items() if k != 'params'})  # the learning rate of this step
        # set by GradScaler or StepGuard (step_guard.py) on this object: a fused optimizer then skips its step on the GPU
        self.zero.optim.grad_scale, self.zero.optim.found_inf = (
            getattr(self, 'grad_scale', None),
            getattr(self, 'found_inf', None),
        )
        self.zero.step()
        for piece in self.own:
            piece.shard.grad = None  # it would keep the whole gradient in memory

    @torch.no_grad()
    def state_dict(self):
        """
        What the unsharded optimizer's state_dict would be, with tensors on the CPU, on rank 0; without state on the others.
        The pieces travel from CPU to CPU, each to its place in the whole tensor, and need no memory on any GPU.
        """
        result = super().state_dict()  # numbers the parameters; its state is empty, as self.zero holds the state
        number = {piece: n for n, piece in enumerate(self.zero.pieces)}
        state = {number[piece]: self.zero.optim.state.get(piece.shard, {}) for piece in self.own}
        # first, what there is: for each piece the single numbers, such as step, and the dtypes of the shards
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
    def load_state_dict(self, state_dict):
        """
        Takes this rank's pieces out of the state_dict of an unsharded optimizer, of any phase and world size. Reads no more
        than those where the tensors are memory-mapped, and leaves state_dict as it is.
        """
        for group, saved in zip(self.param_groups, state_dict['param_groups']):
            group.update({k: v for k, v in saved.items() if k != 'params'})
        pieces = {piece.shard: piece for piece in self.own}
        shards = chain.from_iterable(group['params'] for group in self.zero.optim.param_groups)
        state = {}
        for n, piece in enumerate(pieces[shard] for shard in shards):
            saved = state_dict['state'].get(piece.index, {})
            # copied, because two pieces must not count their steps in one tensor. Where the step belongs, the CPU or the
            # GPU, the inner optimizer knows; ZeroRedundancyOptimizer.load_state_dict always says the CPU, where fused AdamW fails
            state[n] = {
                k: v.reshape(-1)[piece.start : piece.stop].to(piece.shard.device, copy=True) if v.dim() else v.clone()
                for k, v in saved.items()
            }
        self.zero.optim.load_state_dict({'state': state, 'param_groups': self.zero.optim.state_dict()['param_groups']})
