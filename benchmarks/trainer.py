"""
The training step of train.py, for benchmarks that build or replace its parts.

A Trainer builds the model, optimizer, micro-step and step guard as train.py does in nanoGPT/ (ddp), phase1_zero1/
(zero1) or phase3_fsdp/ (fsdp), with the model of nanoGPT/ or phase2_triton/. step() is one iteration of its loop. A
test (tests/test_report.py) compares the losses with train.py's.
"""

import gc
import importlib.util
import re
import sys
import time
from contextlib import nullcontext, redirect_stdout

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from common import ROOT, memory, reset_peak

# a module that several of these folders have is the same file in each
sys.path += [str(ROOT / folder) for folder in ('phase3_fsdp', 'phase1_zero1', 'phase2_triton')]
import hardware
from cuda_graph import MicroStep, use_side_stream
from distributed import join_ranks, mean_over_ranks
from errors import out_of_memory  # noqa: F401  for the benchmarks
from step_guard import StepGuard

FSDP_FLAGS = dict(fsdp_min_num_params=1_000_000, fsdp_shard_size=0, fsdp_reshard='auto', fsdp_cpu_offload=False)
SIZES = {
    '124M': dict(n_layer=12, n_head=12, n_embd=768),
    '350M': dict(n_layer=24, n_head=16, n_embd=1024),
    '1.5B': dict(n_layer=48, n_head=25, n_embd=1600),
    'tiny': dict(n_layer=3, n_head=2, n_embd=64),
}


def start_ranks(cpu: bool):
    """
    Joins the ranks that torchrun started; a single process also gets a process group. Returns (device, rank,
    world_size).
    """
    device, *_, backend = hardware.resolve_auto('cpu' if cpu else 'cuda', 'auto', 'auto', 'auto')
    rank, world_size = join_ranks(backend, 600)
    if world_size == 1:
        dist.init_process_group('gloo' if cpu else 'cpu:gloo,cuda:nccl')
    return device, rank, world_size


def load_model(folder):
    """Returns the module folder/model.py, loaded again, because two trainers may have different models."""
    spec = importlib.util.spec_from_file_location(re.sub(r'\W', '_', f'model_of_{folder}'), ROOT / folder / 'model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


class Trainer:
    """
    kind: ddp, zero1 or fsdp; without a process group, ddp is the bare model. shape, options: arguments of GPTConfig.
    device: this rank's. model: folder of model.py. compile: the flag, or 'blocks' with fsdp, which compiles only the
    blocks. fsdp: flags that differ from their defaults. init: 'cpu' draws the weights as train.py does, 'gpu' draws
    them on the device, 'fill' repeats random numbers, which is fast for billions of weights. logits=False: the model
    returns no logits. Memory that was allocated before is not counted.
    """

    def __init__(
        self,
        kind: str,
        shape: dict,
        device: str,
        *,
        batch_size: int,
        block_size: int = 1024,
        model: str = 'nanoGPT',
        dtype: str = 'bfloat16',
        compile: bool | str = True,
        cuda_graph: bool = False,
        fsdp: dict | None = None,
        seed: int = 1337,
        init: str = 'cpu',
        logits: bool = True,
        **options,
    ):
        self.kind, self.device, self.batch_size, self.block_size = kind, device, batch_size, block_size
        self.device_type, self.compile, self.cuda_graph = device.split(':')[0], compile, cuda_graph
        self.fsdp = {**FSDP_FLAGS, **(fsdp or {})} if kind == 'fsdp' else {}
        self.base_bytes, started = memory(device), time.perf_counter()
        reset_peak(device)
        if cuda_graph and torch.cuda.current_stream() == torch.cuda.default_stream():
            use_side_stream(device)
        dtype = dtype if self.device_type == 'cuda' else 'float32'
        self.context = nullcontext() if kind == 'fsdp' else hardware.autocast(device, dtype)
        torch.manual_seed(seed + (dist.get_rank() if dist.is_initialized() else 0))
        self.module = load_model(model)
        config = self.module.GPTConfig(**{**dict(block_size=block_size, bias=False), **shape, **options})
        with redirect_stdout(None):
            self.raw_model = self._shard(config, dtype, init) if kind == 'fsdp' else self._build(config, init)
        self.parameters = sum(p.numel() for p in self.raw_model.parameters())
        if not logits:
            forward = self.raw_model.forward
            self.raw_model.forward = lambda idx, targets: (None, forward(idx, targets)[1])
        self.set_optimizer(kind)
        self.wrap()
        self.init_seconds = time.perf_counter() - started

    def _build(self, config, init):
        with {'cpu': nullcontext(), 'gpu': torch.device(self.device), 'fill': torch.device('meta')}[init]:
            model = self.module.GPT(config)
        if init == 'fill':
            model.to_empty(device=self.device)
            model.transformer.wte.weight = model.lm_head.weight  # to_empty() unties them
            fill(model.parameters())
        return model.to(self.device)

    def _shard(self, config, dtype, init):
        import sharding

        with sharding.OnMeta() as recipe:
            model = self.module.GPT(config)
        if self.compile == 'blocks':
            for block in model.transformer.h:
                block.forward = torch.compile(block.forward)
        flags = dict(device=self.device, dtype=dtype, compile=self.compile is True, **self.fsdp)
        with torch.device(self.device) if init == 'gpu' else nullcontext():
            sharding.shard(model, flags, None if init == 'fill' else recipe)
        if init == 'fill':
            fill(p.to_local() for p in model.parameters())
        return model

    def set_optimizer(self, kind: str):
        """Replaces the optimizer by a new one without state: plain AdamW (adamw), or that of ddp, zero1 or fsdp."""
        self.optimizer = self.step_guard = None
        collect()
        with redirect_stdout(None):
            optimizer = self.raw_model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), self.device_type)
        if kind == 'zero1' and dist.is_initialized():
            from zero1 import Zero1Optimizer

            optimizer = Zero1Optimizer(optimizer)
        if kind == 'fsdp':
            from sharding import ShardedAdamW

            optimizer = ShardedAdamW(optimizer)
        self.optimizer, self.scaler = optimizer, torch.amp.GradScaler(self.device_type, enabled=False)
        self.step_guard = StepGuard(self.device, self.scaler)

    def wrap(self):
        """Compiles the model, wraps it in DDP and builds the micro-step. Call it again after parameters have moved."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.model, self.micro_steps, micro_step = self.raw_model, None, MicroStep
        if self.kind == 'fsdp':
            from sharded_cuda_graph import ShardedMicroStep as micro_step
        else:
            if self.compile:
                self.raw_model.compile()  # in place
            if dist.is_initialized():
                ids = [self.device] if self.device_type == 'cuda' else None
                self.model = DDP(self.raw_model, device_ids=ids, gradient_as_bucket_view=True)
        self.micro_step = micro_step(self.forward_backward, self.model, capture=self.cuda_graph)

    def forward_backward(self, X, Y):
        with self.context:
            loss = self.model(X, Y)[1]  # do not bind the logits: a reference would keep them alive
            loss = loss / self.micro_steps
        self.scaler.scale(loss).backward()
        return loss.detach()

    def feed(self, next_batch):
        """
        Sets the source of batches: next_batch(trainer) returns (X, Y), int64 (batch_size, block_size), on the device.
        It is called at once for the first batch.
        """
        self.next_batch, self.batch = next_batch, next_batch(self)

    def step(self, micro_steps: int = 1) -> torch.Tensor:
        """Runs one iteration. Returns the mean loss over micro-steps and ranks, shape (), on the device."""
        if micro_steps != self.micro_steps:
            self.micro_step.release()  # the divisor of the loss is captured
            self.micro_steps = micro_steps
        loss_sum = torch.zeros((), device=self.device)
        for step in range(micro_steps):
            last = step == micro_steps - 1
            if self.kind == 'fsdp':
                from sharding import set_last_micro_step

                set_last_micro_step(self.model, last)
            elif dist.is_initialized():
                self.model.require_backward_grad_sync = last
            loss_sum += self.micro_step(*self.batch)
            self.batch = self.next_batch(self)
        self.clip_and_step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_over_ranks(loss_sum)

    def clip_and_step(self):
        """
        Stores the gradients' norm in self.grad_norm, clips them to a norm of 1, and steps the optimizer if the norm is
        finite.
        """
        if hasattr(self.optimizer, 'collect_gradients'):  # FSDP's
            self.optimizer.collect_gradients()
            grad_norm = self.optimizer.clip_grad_norm_(1.0)
        else:
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, 'full_tensor') else grad_norm
        self.grad_norm = grad_norm
        self.step_guard.step(self.optimizer, grad_norm)

    def timed_steps(self, micro_steps: int, steps: int) -> list[float]:
        """Returns the seconds of each step. Each loss is read, which waits for the GPU, as when train.py logs."""
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            self.step(micro_steps).item()
            seconds.append(time.perf_counter() - started)
        return seconds

    def tokens(self, micro_steps: int) -> int:
        """Returns the number of tokens of one iteration over all ranks."""
        return self.batch_size * self.block_size * micro_steps * (dist.get_world_size() if dist.is_initialized() else 1)

    def warm_up(self, micro_steps: int, steps: int = 4):
        """
        Runs steps that compile and capture. Returns the seconds of the first step, and the bytes at rest and at the
        peak (None on a CPU).
        """
        started = time.perf_counter()
        self.step(1).item()
        first = time.perf_counter() - started
        reset_peak(self.device)
        for _ in range(steps):
            self.step(micro_steps).item()
        if self.device_type == 'cpu':
            return first, None, None
        torch.cuda.synchronize()
        return first, memory(self.device) - self.base_bytes, memory(self.device, peak=True) - self.base_bytes

    def free(self):
        """Drops the model, the optimizer and everything else that holds memory."""
        self.__dict__.clear()
        collect()


@torch.no_grad()
def fill(parameters):
    """Fills the parameters with 2^20 random numbers over and over: drawing billions takes a CPU a minute."""
    for p in parameters:
        some = torch.randn(2**20, device=p.device) * 0.02
        for part in p.view(-1).split(2**20):
            part.copy_(some[: len(part)])


def collect():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if device.startswith('cuda') else x


def random_batch(trainer: Trainer):
    """Returns a batch of random tokens of GPT-2's vocabulary."""
    vocab_size = min(50257, trainer.raw_model.config.vocab_size)
    rows = torch.randint(vocab_size, (trainer.batch_size, trainer.block_size + 1))
    return tuple(to_device(x.contiguous(), trainer.device) for x in (rows[:, :-1], rows[:, 1:]))


def batches_of(tokens):
    """Returns next_batch() for feed(): random windows of tokens, an integer tensor or array of shape (n,)."""

    def next_batch(trainer):
        at = torch.randint(len(tokens) - trainer.block_size - 1, (trainer.batch_size,), generator=next_batch.generator)
        rows = torch.stack([torch.as_tensor(tokens[i : i + trainer.block_size + 1].astype('int64')) for i in at])
        return tuple(to_device(x.contiguous(), trainer.device) for x in (rows[:, :-1], rows[:, 1:]))

    next_batch.generator = None
    return next_batch
