"""
FSDP builds the model on the meta device. Its first weights and each rank's generator are those of the reference, built whole:
rank 0 prints 'equal'. `fsdp_first_weights.py FOLDER` of phase3_fsdp.
"""

import sys

sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from model import GPT, GPTConfig
from sharded_checkpoint import gather_full
from sharding import OnMeta, shard

dist.init_process_group('gloo')
rank = dist.get_rank()
config = GPTConfig(vocab_size=40, n_layer=3, n_head=2, n_embd=32, block_size=16, bias=True)
torch.manual_seed(1337 + rank)
reference = GPT(config)
state = torch.get_rng_state()
torch.manual_seed(1337 + rank)
with OnMeta() as recipe:
    model = GPT(config)
assert all(p.is_meta for p in model.parameters())
flags = dict(fsdp_min_num_params=20000, fsdp_shard_size=0, fsdp_reshard='auto', fsdp_cpu_offload=False)
shard(model, dict(device='cpu', dtype='float32', compile=False, **flags), recipe)
assert torch.equal(torch.get_rng_state(), state)
full = gather_full({'model': model.state_dict(), 'optimizer': {'state': {}}}, model)
if rank == 0:
    want = reference.state_dict()
    assert list(full['model']) == list(want) and all(torch.equal(full['model'][k], want[k]) for k in want)
    assert full['model']['lm_head.weight'] is full['model']['transformer.wte.weight']
    print('equal')
dist.destroy_process_group()
