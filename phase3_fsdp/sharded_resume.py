"""
Resumes a sharded run from a checkpoint in either format, written by any trainer at any world size: each rank reads its
part.
"""

import os
from contextlib import suppress

import torch
import torch.distributed as dist

from checkpoint import fit_names
from errors import UserError
from resume import Resume
from sharded_checkpoint import load_checkpoint, named_by, open_sharded, read_tensors, unsharded_file
from sharding import as_dtensor, own_rows


class ShardedResume(Resume):
    """Resume for a model sharded by sharding.shard() and for ShardedAdamW."""

    def read(self, path: str) -> dict:
        return load_checkpoint(path, fsdp=True)

    def main_file(self, path: str) -> str:
        return path if path.endswith('.pt') else unsharded_file(path)

    def best_path(self, path: str) -> str:
        if path.endswith('.pt'):
            return super().best_path(path)
        best = None
        with suppress(UserError):  # training can continue without it
            best = named_by('best', os.path.dirname(path))
        return unsharded_file(best) if best else ''

    def load(self, model, optimizer, scaler) -> None:
        if self.path:
            self.checkpoint = own_part(self.checkpoint, model, optimizer)
        super().load(model, optimizer, scaler)


def own_part(checkpoint: dict, model, optimizer) -> dict:
    """
    Returns the checkpoint, full or sharded, with this rank's shards of its tensors: weights as DTensors, optimizer
    state as ShardedAdamW holds it. Leaves a tensor that does not fit unchanged, so that load_model() and
    load_optimizer() report it. Collective.
    """
    to_read, block_size = {}, checkpoint['model_args'].get('block_size')
    reader, metadata = None, None
    if 'folder' in checkpoint:
        crcs = checkpoint.get('crc32_of_chunks')
        reader, metadata = open_sharded(checkpoint['folder'], crcs, dist.get_rank(), dist.get_world_size())

    def part(name, full, p):
        """Returns (this rank's shard, the same as a DTensor) of a full tensor, or of a sharded checkpoint's tensor."""
        if reader:
            full = torch.empty(metadata.state_dict_metadata[name].size, device='meta')
        # position embeddings, and their state, cropped to a smaller block_size
        cut = full.dim() and full.shape[0] == block_size > p.shape[0]
        if not full.dim() or full.shape[1:] != p.shape[1:] or not (cut or full.shape == p.shape):
            return full, full
        if reader and cut:
            full = to_read.setdefault(name, torch.empty(full.shape))
        shard = own_rows(full, p)
        if reader and not cut:
            shard = to_read[name].to_local() if name in to_read else torch.empty(shard.shape)
            to_read[name] = as_dtensor(p, shard)
        return shard, as_dtensor(p, shard)

    weights, state = model.state_dict(), {}
    saved = {
        k: part(f'model.{v if reader else k}', v, weights[k])[1] if k in weights else v
        for k, v in fit_names(checkpoint['model'], weights).items()
    }
    for i, s in checkpoint['optimizer']['state'].items():
        if reader:
            s = s | {k: None for k in ('exp_avg', 'exp_avg_sq') if f'optimizer.{i}.{k}' in metadata.state_dict_metadata}
        fits = 0 <= i < len(optimizer.sharded)
        state[i] = {
            k: part(f'optimizer.{i}.{k}', v, optimizer.sharded[i])[0] if fits and k != 'step' else v
            for k, v in s.items()
        }
    checkpoint = {**checkpoint, 'optimizer': {**checkpoint['optimizer'], 'state': state}}
    if reader:
        read_tensors(to_read, reader, no_dist=False)
    return {**checkpoint, 'model': saved}
