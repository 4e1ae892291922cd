"""The loss is scaled up by 2 ** 22, so that gradients overflow in float16. With FUSED=1, AdamW is fused, as on a GPU."""

import os

import torch
from script import run_script
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

adamw, scaler = torch.optim.AdamW.__init__, ShardedGradScaler.__init__


def make_adamw(self, *args, **kwargs):
    adamw(self, *args, **{**kwargs, 'fused': os.environ['FUSED'] == '1'})


def make_scaler(self, *args, **kwargs):
    scaler(self, *args, init_scale=2.0**22, **kwargs)


torch.optim.AdamW.__init__, ShardedGradScaler.__init__ = make_adamw, make_scaler
run_script()
