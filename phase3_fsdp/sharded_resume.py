"""Continues a sharded run from a checkpoint of either format, written by any trainer at any world size: each rank reads its own part."""

import torch
import torch.distributed as dist

from checkpoint import fit_names
from resume import Resume
from sharded_checkpoint import load_checkpoint, open_sharded, read_tensors
from sharding import as_dtensor, own_rows


class ShardedResume(Resume):
    """Resume for a model that sharding.shard() has sharded and for ShardedAdamW."""

    def read(self, path: str) -> dict:
        return load_checkpoint(path, fsdp=True)

    def load(self, model, optimizer, scaler):
        if self.path:
            self.checkpoint = own_part(self.checkpoint, model, optimizer)
        super().load(model, optimizer, scaler)


def own_part(checkpoint, model, optimizer):
    """
    The checkpoint, full or sharded, written by any number of ranks, with this rank's shards of its tensors: of the weights as
    DTensors, of ShardedAdamW's state as it has them. A tensor that does not fit is left as it is, for load_model() and
    load_optimizer() of resume.py to report. Collective.
    """
    to_read, block_size = {}, checkpoint['model_args'].get('block_size')
    reader, metadata = None, None
    if 'folder' in checkpoint:
        crcs = checkpoint.get('crc32_of_chunks')
        reader, metadata = open_sharded(checkpoint['folder'], crcs, dist.get_rank(), dist.get_world_size())

    def part(name, full, p):
        """(this rank's shard, it as a DTensor) of a full tensor, or of what a sharded checkpoint has under that name."""
        if reader:
            full = torch.empty(metadata.state_dict_metadata[name].size, device='meta')
        cut = (
            full.dim() and full.shape[0] == block_size > p.shape[0]
        )  # position embeddings, and their state, to a shorter block_size
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
