"""
Shards a GPT with fully sharded data parallelism (FSDP2, torch.distributed.fsdp.fully_shard), and steps AdamW on the
shards.

Each of k ranks keeps 1/k of the rows of every parameter, of its gradient and of AdamW's state. Between steps it keeps
nothing else but CUDA graphs. The model is split into units, each one or more blocks. Before a unit computes, its
parameters are gathered from the ranks (all-gather, in the compute dtype). After its backward, its gradients are
averaged and each rank keeps those of its own rows (reduce-scatter). Both overlap with the computation of neighbouring
units. The idea is ZeRO stage 3: Rajbhandari et al. 2020, arxiv.org/abs/1910.02054; FSDP: Zhao et al. 2023,
arxiv.org/abs/2304.11277.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from errors import UserError

# dtype of the gathered parameters; None: unchanged
DTYPES = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class OnMeta(TorchDispatchMode):
    """
    Builds a model of any size without memory for its parameters, on the meta device: `with OnMeta() as recipe: model =
    GPT(...)`. The recipe records how each parameter would have been initialized, so that shard() can do it later.
    """

    def __init__(self):
        super().__init__()
        self.calls = []  # (identity of the storage written to, function, its arguments)

    def __enter__(self):
        self.device = torch.device('meta')
        self.device.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.device.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        creates = not any(isinstance(arg, torch.Tensor) for arg in args)
        if isinstance(result, torch.Tensor) and (creates or function._schema.is_mutable):
            # keep the tensor too, so that no other storage gets its identity
            self.calls.append((result.untyped_storage()._cdata, function, args, kwargs or {}, result))
        return result


@torch.no_grad()
def initialize(model, recipe, names):
    """
    Gives the sharded model exactly the weights that rank 0 would have without FSDP, with one full parameter at a time
    in memory. As under DDP, each rank draws all random numbers from its own generator, and rank 0's results are used.
    So the generators end in the same state as under DDP. names: {identity of a storage in the recipe: parameter}.
    """
    parameters = dict(model.named_parameters())
    last_write = {storage: i for i, (storage, *_) in enumerate(recipe.calls)}
    for i, (storage, function, args, kwargs, result) in enumerate(recipe.calls):
        if function._schema.is_mutable:
            full = torch.empty(result.shape, dtype=result.dtype)
            function(full, *args[1:], **kwargs)
        elif i == last_write[storage]:  # created with its value, like torch.ones, without random numbers
            full = function(*args, **{**kwargs, 'device': 'cpu'})
        if i == last_write[storage] and storage in names:
            p = parameters[names[storage]]
            full = full.to(p.device_mesh.device_type)
            dist.broadcast(full, src=0)
            p.to_local().copy_(own_rows(full, p))


def own_rows(full: torch.Tensor, p: DTensor) -> torch.Tensor:
    """Returns a view of the rows of the tensor `full` that this rank keeps of the parameter p."""
    rows = -(-p.shape[0] // p.device_mesh.size(-1))  # as torch.chunk cuts
    start = min(rows * p.device_mesh.get_local_rank(mesh_dim=p.device_mesh.ndim - 1), p.shape[0])
    return full[start : min(start + rows, p.shape[0])]


def make_mesh(device_type, world_size, shard_size):
    """
    Returns the ranks as a mesh (world_size,), or with 0 < shard_size < world_size as a mesh (replicas, shard_size) for
    hybrid sharding, which shards within groups of neighbouring ranks and replicates across the groups. Raises UserError
    if shard_size does not divide world_size.
    """
    if not 0 <= shard_size <= world_size or world_size % (shard_size or 1) or shard_size == 1:
        raise UserError(
            f'fsdp_shard_size={shard_size}, but it must divide the {world_size} processes and be 2 or more '
            '(0: all of them)'
        )
    if shard_size in (0, world_size):
        return init_device_mesh(device_type, (world_size,))
    return init_device_mesh(device_type, (world_size // shard_size, shard_size), mesh_dim_names=('replicate', 'shard'))


def group_blocks(blocks, min_num_params):
    """Groups consecutive blocks into units of at least min_num_params parameters. Returns (units, remaining blocks)."""
    units, unit = [], []
    for block in blocks:
        unit.append(block)
        if sum(p.numel() for b in unit for p in b.parameters()) >= min_num_params:
            units.append(unit)
            unit = []
    return units, unit


def choose_reshard(config: dict, num_params: int) -> bool:
    """
    Returns config['fsdp_reshard'] as a bool. 'auto' becomes True with CPU offload, or if whole bfloat16 parameters and
    float32 gradients, 6 bytes per parameter, would take more than an eighth of the GPU's memory; False without a GPU.
    """
    wanted, device = config['fsdp_reshard'], config['device']
    if wanted == 'auto' and device.startswith('cuda'):
        return config['fsdp_cpu_offload'] or 6 * num_params > torch.cuda.get_device_properties(device).total_memory / 8
    return wanted is True


def shard(model: nn.Module, config: dict, recipe: OnMeta | None = None) -> None:
    """
    Shards the model in place over all ranks and prints how. config: the flags fsdp_*, `device` (this rank's),
    `compile`, and `dtype`, the compute dtype: parameters, gradients and AdamW's state stay in float32. With
    fsdp_reshard, a unit's whole parameters are freed after its forward and gathered again for its backward, and
    gradients are reduced in each micro-step (least memory). Without it, a unit is gathered once and reduced once per
    iteration (least traffic). recipe: the OnMeta context in which the model was built, to initialize it; None: the
    weights are loaded later. Raises UserError for wrong flags.
    """
    print('Wrapping model with FSDP...')
    num_params = sum(p.numel() for p in model.parameters())
    names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
    device_type, half, cpu_offload = config['device'].split(':')[0], DTYPES[config['dtype']], config['fsdp_cpu_offload']
    mesh = make_mesh(device_type, dist.get_world_size(), config['fsdp_shard_size'])
    reshard_after_forward = choose_reshard(config, num_params)
    if config['fsdp_min_num_params'] < 1:
        raise UserError(f'fsdp_min_num_params={config["fsdp_min_num_params"]}, but it must be at least 1')
    # matmuls in dtype as under autocast, but the cast happens once, before the all-gather, and halves its traffic
    options = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half and torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=device_type == 'cuda') if cpu_offload else OffloadPolicy(),
    )
    if half:  # the loss needs float32
        model.lm_head.register_forward_hook(lambda module, args, logits: logits.float())
    units, rest = group_blocks(model.transformer.h, config['fsdp_min_num_params'])
    # the Triton model computes with its kernels and needs no compiler
    on_kernels = getattr(model, 'announce_kernels', lambda device: False)(torch.device(config['device']))
    if config['compile'] and not on_kernels:
        print('compiling the model... (takes a ~minute)')
        compile_parts(model, units)
    for unit in units:
        fully_shard(unit if len(unit) > 1 else unit[0], reshard_after_forward=reshard_after_forward, **options)
    # The rest is the root unit: embeddings and head (which share a weight) and final norm. Its parameters are used
    # first and last, so they are kept from forward to backward.
    fully_shard(model, **options)
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device='cpu' if cpu_offload else config['device'])
        if recipe:
            initialize(model, recipe, names)
    # set_last_micro_step() reads the first and sets the second, which sharded_cuda_graph.py reads
    model.reshard_after_step, model.last_micro_step = not reshard_after_forward, None
    print_sharding(model, units, len(rest), mesh.size(-1), reshard_after_forward, cpu_offload)


def print_sharding(model, units, blocks_in_root, ranks_per_copy, reshard_after_forward, cpu_offload):
    """Prints the units with their parameters, the size of a rank's shards, and when whole parameters are freed."""
    num_params = sum(p.numel() for p in model.parameters())
    sizes = [sum(p.numel() for block in unit for p in block.parameters()) for unit in units]
    parts = [f'{sizes.count(size)} of {size:,} parameters' for size in dict.fromkeys(sizes)]
    parts.append(f'the root of {num_params - sum(sizes):,}')
    if blocks_in_root:
        parts[-1] += f' (with {blocks_in_root} block{"s" * (blocks_in_root > 1)})'
    print(f'{len(units) + 1} unit{"s" * bool(units)}: {", ".join(parts)}')
    held, copies = sum(p.to_local().numel() for p in model.parameters()), dist.get_world_size() // ranks_per_copy
    print(
        f'each rank holds {held:,} of {num_params:,} parameters, with gradients and AdamW {16 * held / 2**20:,.1f} MiB'
        + ' of CPU memory' * cpu_offload
        + f'; {copies} groups of ranks hold all of them' * (copies > 1)
    )
    freed_after = 'each forward' if reshard_after_forward else 'the last backward of an iteration'
    print(f'whole parameters are freed after {freed_after}')


def set_last_micro_step(model: nn.Module, last: bool) -> None:
    """
    Tells FSDP whether the next micro-step completes the gradients of the iteration. Call it before each micro-step.
    """
    if last == model.last_micro_step:  # the calls below traverse all modules
        return
    model.last_micro_step = last
    if model.reshard_after_step:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    else:
        # between the replicas of hybrid sharding; within a group each micro-step reduces
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters. Call it after an evaluation, which has no backward that would free them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def compile_parts(model, units):
    """
    Compiles the model in one piece if there are no units. Otherwise FSDP's hooks, which torch.compile cannot trace, run
    between the blocks. The blocks are then compiled separately (one compilation serves all), as are the parts before
    and after them.
    """
    transformer, original = model.transformer, model.forward

    def whole(idx, targets):
        return None, original(idx, targets)[1]  # logits are not returned, so float32 logits are never written

    @torch.compile
    def embed(idx):
        pos = torch.arange(idx.size(1), device=idx.device)
        return transformer.drop(transformer.wte(idx) + transformer.wpe(pos))

    @torch.compile
    def loss_of(x, targets):
        x = transformer.ln_f(*x)
        logits = model.lm_head(x[1] if isinstance(x, tuple) else x)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def in_parts(idx, targets):
        x, recompute = (embed(idx),), model.config.activation_checkpointing and model.training
        for block in transformer.h:
            if recompute:
                x = activation_checkpoint(block, *x, use_reentrant=False, preserve_rng_state=model.config.dropout > 0)
            else:
                x = block(*x)
            x = x if isinstance(x, tuple) else (x,)  # the Triton model's blocks return a pair
        return None, loss_of(x, targets)

    if units:
        for block in transformer.h:
            block.forward = torch.compile(block.forward)
    model.forward = in_parts if units else torch.compile(whole)


class FSDPGradScaler(ShardedGradScaler):
    """
    PyTorch's ShardedGradScaler, which skips a step on all ranks if gradients overflow on one. For offloaded gradients,
    PyTorch's version would not wait until its tensors reach the CPU (pytorch #176429).
    """

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16=True):
        device = optimizer.shards[0].device
        return super()._unscale_grads_(optimizer, inv_scale.to(device), found_inf.to(device), allow_fp16)


class ShardedAdamW(torch.optim.AdamW):
    """
    AdamW over this rank's shards as plain tensors. A sharded parameter is a DTensor. AdamW accepts DTensors too, but
    then each step spends tens of milliseconds of CPU time in DTensor's dispatch. optimizer: the AdamW from
    model.configure_optimizers, whose groups and options are kept.
    """

    def __init__(self, optimizer: torch.optim.AdamW):
        # DTensors, in the order of AdamW's indices
        self.sharded = [p for group in optimizer.param_groups for p in group['params']]
        shards = iter([nn.Parameter(p.to_local().detach()) for p in self.sharded])
        groups = [{**group, 'params': [next(shards) for _ in group['params']]} for group in optimizer.param_groups]
        super().__init__(groups, fused=optimizer.defaults['fused'])
        self.shards = [p for group in self.param_groups for p in group['params']]
        mesh = self.sharded[0].device_mesh
        self.group = mesh.get_group(mesh.ndim - 1)  # ranks that together hold one copy of the parameters

    @torch.no_grad()
    def collect_gradients(self):
        """
        Passes the gradients from FSDP to AdamW and a gradient scaler. Call it after the last backward of an iteration.
        """
        for local, p in zip(self.shards, self.sharded):
            local.data, local.grad = p.to_local(), p.grad.to_local()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """
        Scales the gradients so that their norm over all shards is at most max_norm. Returns the norm before: a tensor
        of shape (), equal on all ranks, on the compute device.
        """
        square = torch.nn.utils.get_total_norm([local.grad for local in self.shards]) ** 2
        dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.shards, max_norm, norm)
        return norm.to(self.sharded[0].device_mesh.device_type)

    def step(self, closure=None):
        if getattr(self, 'found_inf', None) is not None:
            # StepGuard (step_guard.py) sets it, or ShardedGradScaler, as the number of overflowed ranks with shape
            # (1,). Fused AdamW skips the step if it is 1, with shape (). AdamW on offloaded shards runs on the CPU, so
            # the number must be there first
            self.found_inf = self.found_inf.to(self.shards[0].device).reshape(()).clamp(max=1)
        return super().step(closure)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        for p in self.sharded:
            p.grad = None

    def state_dict(self) -> dict:
        """Returns AdamW's state_dict, with each shard of a parameter's state as a DTensor of the parameter's shape."""
        result = super().state_dict()
        for i, state in result['state'].items():
            p = self.sharded[i]
            result['state'][i] = {k: v if v.dim() == 0 else as_dtensor(p, v) for k, v in state.items()}
        return result


def as_dtensor(p: DTensor, local: torch.Tensor) -> DTensor:
    """Returns this rank's shard of a tensor as a DTensor that is sharded like p."""
    return DTensor(local, p._spec, requires_grad=False)  # from_local() would move a CPU tensor to the GPU
