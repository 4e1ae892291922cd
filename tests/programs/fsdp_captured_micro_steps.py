"""
Compares FSDP's micro-steps replayed as (fake) CUDA graphs with eager micro-steps. Rank 0 prints 'equal' if they agree
in every bit. `fsdp_captured_micro_steps.py FOLDER` of phase3_fsdp.
"""

import os
import sys

sys.path.insert(0, sys.argv[1])
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param

import fake_cuda_graph
import sharded_cuda_graph
from model import GPT, GPTConfig
from sharding import OnMeta, ShardedAdamW, reshard, set_last_micro_step, shard

dist.init_process_group('gloo')
fake_cuda_graph.install_in_torch(pytest.MonkeyPatch())
COLLECTIVES = (
    'all_gather_single',
    'all_gather_into_tensor',
    'reduce_scatter_single',
    'reduce_scatter_tensor',
    'all_reduce',
)
for name in COLLECTIVES:
    if hasattr(dist, name):  # renamed in torch 2.13
        setattr(dist, name, fake_cuda_graph.noted(getattr(dist, name)))
_fsdp_param.free_storage = lambda tensor: None  # graphs have their own memory
mean_over_ranks, limits = sharded_cuda_graph.mean_over_ranks, []
sharded_cuda_graph.mean_over_ranks = lambda x: limits.append(1) or mean_over_ranks(x)


def train(captured, **flags):
    torch.manual_seed(0)
    with OnMeta() as recipe:
        model = GPT(GPTConfig(vocab_size=40, n_layer=2, n_head=2, n_embd=32, block_size=16))
    flags = dict(fsdp_min_num_params=1, fsdp_shard_size=0, fsdp_reshard=False, fsdp_cpu_offload=False) | flags
    shard(model, dict(device='cpu', dtype='bfloat16', compile=False, **flags), recipe)
    optimizer = ShardedAdamW(model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu'))
    forwards, numbers = [], []

    def step(x, y):
        forwards.append(1)
        loss = model(x, y)[1]
        loss.backward()
        return loss.detach()

    graph = sharded_cuda_graph.ShardedMicroStep(step, model, capture=captured)
    torch.manual_seed(dist.get_rank())
    for i, count in enumerate((3, 3, 3, 4, 1, 1, 3, 2)):
        if i == 3:
            with torch.no_grad():
                model(torch.zeros(1, 8, dtype=torch.long))
            reshard(model)
        if i == 6 and captured:
            graph.release()
        for k in range(count):
            set_last_micro_step(model, k == count - 1)
            x = torch.randint(40, (2, 17))
            numbers.append(graph(x[:, :-1].contiguous(), x[:, 1:].contiguous()).item())
        optimizer.collect_gradients()
        numbers.append(optimizer.clip_grad_norm_(1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert len(forwards) == (13 if captured else 20)  # 2 x 3 of warm-up; 3 captured, 1, and 3 again
    assert len(limits) == (4 if captured else 0)  # before a capture that waits for a replay
    limits.clear()
    if captured:
        graph.release()
        with pytest.raises(RuntimeError, match='more micro-steps than were captured'):
            for last in (False, True, False, False):
                set_last_micro_step(model, last)
                graph(x[:, :-1].contiguous(), x[:, 1:].contiguous())
        limits.clear()
    return numbers


hybrid = dict(fsdp_shard_size=2) if dist.get_world_size() == 4 else dict()
for flags in (hybrid, hybrid | dict(fsdp_reshard=True)):
    assert train(True, **flags) == train(False, **flags)
if dist.get_rank() == 0:
    print('equal')
dist.destroy_process_group()
