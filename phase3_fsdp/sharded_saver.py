"""
Saves the state of a sharded run, in either format (see sharded_checkpoint.py): rank 0 gathers it and writes ckpt.pt, or
each rank writes its own shards while training continues.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from checkpoint import write_from_rank_0
from distributed import max_over_ranks
from end_of_run import at_end
from errors import UserError
from sharded_checkpoint import (
    FOLDER,
    discard_unfinished,
    first_cause,
    named_by,
    prepare,
    saved_names,
    split,
    write_sharded,
)
from sharding import as_dtensor, own_rows

# after a failure, rounds of at most a second to wait for the ranks that still write; usually the failed one tells them
PATIENCE = 5


def make_saver(config: dict, model, optimizer, on_saved):
    """
    Returns the saver for config['ckpt_format']. Its methods are collective. save(checkpoint, model, best, required)
    returns False if the best checkpoint could not be written. wait() returns once no save is running, False if the last
    one failed. on_saved(iter_num, path=, bytes=, seconds=, ...) is called after a checkpoint is written.
    """
    if config['ckpt_format'] == 'sharded':
        return ShardedSaver(config['out_dir'], model, optimizer, on_saved)
    return FullSaver(config['out_dir'], on_saved)


class FullSaver:
    """Gathers the whole state on rank 0, which writes it to out_dir/ckpt.pt."""

    def __init__(self, out_dir: str, on_saved):
        self.out_dir, self.on_saved = out_dir, on_saved

    def save(self, checkpoint: dict, model, best: bool, required: bool) -> bool:
        written = write_from_rank_0(gather_full(checkpoint, model), self.out_dir, best, required)
        self.on_saved(checkpoint['iter_num'], **written)
        return written['best']

    def wait(self) -> bool:
        return True  # save() waits itself


def gather_full(checkpoint: dict, model) -> dict | None:
    """
    Returns on rank 0 the checkpoint with full tensors on the CPU, and None on the other ranks. Sends from CPU to CPU,
    one shard at a time. Collective.
    """
    names = saved_names(model)
    weights = {name: to_rank_0(p) for name, p in checkpoint['model'].items() if names[name] == name}
    state = checkpoint['optimizer']['state']
    state = {i: {k: to_rank_0(v) if isinstance(v, DTensor) else v for k, v in s.items()} for i, s in state.items()}
    if dist.get_rank() != 0:
        return None
    model_state = {name: weights[names[name]] for name in checkpoint['model']}
    return {**checkpoint, 'model': model_state, 'optimizer': {**checkpoint['optimizer'], 'state': state}}


def to_rank_0(p: DTensor) -> torch.Tensor | None:
    """Returns the DTensor p as a full tensor on the CPU of rank 0, None on other ranks. Collective."""
    mesh = p.device_mesh
    # the ranks that share a copy of the parameters with rank 0
    ranks = mesh.mesh.tolist() if mesh.ndim == 1 else mesh.mesh[0].tolist()
    rank, shard = dist.get_rank(), p.to_local().cpu()
    if rank == 0:
        full = torch.empty(p.shape, dtype=p.dtype)
        own_rows(full, p).copy_(shard)
        rows = -(-p.shape[0] // len(ranks))
        for i, source in enumerate(ranks[1:], 1):
            piece = full[i * rows : (i + 1) * rows]
            if piece.numel():
                dist.recv(piece, source)
        return full
    if rank in ranks and shard.numel():
        dist.send(shard, 0)


class ShardedSaver:
    """Writes sharded checkpoints to out_dir while training continues, one at a time. Every method is collective."""

    def __init__(self, out_dir: str, model, optimizer, on_saved):
        self.on_saved = on_saved
        self.folder = os.path.join(out_dir, FOLDER)
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise UserError(f'{self.folder} is not a folder, so no checkpoint can be saved there: rename it')
        max_over_ranks(0)  # fails at once if a rank has ended, as one that cannot make out_dir; new_group() would wait
        self._start_writer()
        self.running = None
        at_end('save', self._finish)
        # saves are written from a copy in CPU memory. It is pinned, which makes copying fast but allocation slow, so
        # allocate once
        shards = {f'model.{name}': p.to_local() for name, p in model.named_parameters()}
        shards |= {
            f'optimizer.{i}.{k}': p.to_local()
            for i, p in enumerate(optimizer.sharded)
            for k in ('exp_avg', 'exp_avg_sq')
        }
        self.copies = {
            name: torch.empty_like(shard, device='cpu', pin_memory=shard.is_cuda) for name, shard in shards.items()
        }

    def save(self, checkpoint: dict, model, best: bool, required: bool) -> bool:
        """
        Starts a save and returns True once the state is copied. Waits first for the previous save, and for this one if
        it is required. On rank 0 a later save() or wait() calls on_saved(iter_num, path=, bytes=, seconds=,
        stall_seconds=). A failed save prints a warning; if it is required, raises UserError.
        """
        started = time.monotonic()
        self.wait()
        tensors, rest = split(checkpoint, saved_names(model))
        for name, p in tensors.items():
            self.copies[name].copy_(p.to_local(), non_blocking=True)
        copies = {name: as_dtensor(p, self.copies[name]) for name, p in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        unfinished = [prepare(self.folder) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(unfinished)  # from now on the folder exists
        future = self.executor.submit(write_sharded, copies, rest, self.folder, *unfinished, best, self.group)
        self.running = future, checkpoint['iter_num'], required, started, time.monotonic() - started
        if required:
            self.wait()
        return True  # no failure so far; wait() returns the outcome

    def _start_writer(self):
        """Makes the thread that writes, and the process group through which it talks to those of the other ranks."""
        # Background writes must not share a process group with the training. Its timeout is long, because a slow disk
        # is not a lost rank.
        self.group = dist.new_group(backend='gloo', timeout=6 * dist.distributed_c10d.default_pg_timeout)
        self.executor = ThreadPoolExecutor(max_workers=1)

    def _finish(self, error):
        """Finishes the running save before a UserError ends this process; the other ranks finish their parts too."""
        if isinstance(error, UserError):
            self.wait(together=False)

    def wait(self, together: bool = True) -> bool:
        """
        Returns once no save is running: True if there was none or it succeeded, the same on every rank. together: False
        on a rank that is about to end, whose peers may not call wait().
        """
        if self.running is None:
            return True
        future, iter_num, required, started, stall_seconds = self.running
        self.running = None
        # The ranks tell each other every second that they are alive, through the training's group: a slow disk is
        # allowed, but a lost rank ends this loop after dist_timeout.
        period_s = min(1, dist.distributed_c10d.default_pg_timeout.total_seconds() / 4)
        busy, rounds, failed, broken = together, 0, None, False
        while busy and rounds < PATIENCE:
            wait_for([future], timeout=period_s)
            done = future.done()
            state = torch.tensor([not done, done and future.exception() is not None], dtype=torch.int)
            dist.all_reduce(state, op=dist.ReduceOp.MAX)
            busy, rounds = state[0].item(), rounds + state[1].item()
        if not busy or future.done():
            try:
                path, size, ended = future.result()
            except (Exception, CheckpointException) as e:  # the latter is a BaseException
                failed, broken = first_cause(e), isinstance(e, RuntimeError)
        if together:
            # rank 0 writes more than the others, so it can be the only one that fails
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (failed, broken))
            failed = next((failed for failed, _ in everyone if failed), None)
            broken = busy or any(broken for _, broken in everyone)
        if failed:
            latest = named_by('latest', self.folder)
            earlier = 'the earlier one is untouched' if latest and os.path.exists(latest) else 'there is no earlier one'
            problem = f'a checkpoint could not be saved in {self.folder} ({failed}); {earlier}'
            if dist.get_rank() == 0:
                discard_unfinished(self.folder)  # it only takes space
            if required:
                raise UserError(problem) from None
            if dist.get_rank() == 0:
                print(f'WARNING: {problem}, and training continues', file=sys.stderr)
            if broken:
                self._start_writer()  # a rank may still be waiting in the old group for one that has failed
            return False
        if dist.get_rank() == 0:
            self.on_saved(iter_num, path=path, bytes=size, seconds=ended - started, stall_seconds=stall_seconds)
        return True
