"""
Computes the GPU memory of a run, tensor by tensor. docs/planner.md derives each line.

memory(run) returns the bytes that torch reserves on the GPU with the most, by component. Everything is derived from the
code; only the numbers of ALLOCATOR, which describe rounding and fragmentation in torch's allocator, are fitted
(benchmarks/bench_planner.py).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from planner.gpus import GIB
from planner.run import Run

FITTED = Path(__file__).with_name('efficiencies.json')

COMPONENTS = (
    'parameters',
    'gradients',
    'optimizer',
    'activations',
    'logits',
    'gathered_units',
    'half_copies',
    'graph_pools',
    'allocator',
)


@dataclass(frozen=True)
class Allocator:
    """Overhead of torch's caching allocator beyond the bytes of the tensors."""

    workspace: float = 0.063 * GIB  # cuBLAS, and allocations before the model
    rounding: float = 0.009  # fraction of all tensors: blocks larger than their tensor, half-used pages
    # fraction of the gradients, which a compiled backward returns all at once: space in a graph's pool
    pool_compiled: float = 0.45
    pool_kernels: float = 0.2  # the same with the kernels, which add each gradient as soon as it is computed


CONTEXT = 0.685 * GIB  # CUDA's own memory, outside torch's allocator; measured on an H200
OFFLOADED = 17  # bytes per parameter that --fsdp_cpu_offload takes from the machine (phase3_fsdp/IMPLEMENTATION.md)
NCCL = 0.35 * GIB  # buffers of the communicators; assumed, within the free memory of the largest models that trained


def saved_per_layer(run):
    """
    Returns the bytes per token that a block keeps for its backward. The residual stream is float32 under autocast and
    16 bits under FSDP.
    """
    h, half = run.n_embd, run.half_bytes
    residual = half if run.sharded or run.half_residual else 4
    if run.checkpointing:  # the input of each block; the kernels' blocks also pass a branch that is not yet added
        return h * (residual + half * run.kernels)
    saved = 2 * residual  # inputs of the LayerNorms
    saved += 2 * half  # outputs of the LayerNorms
    saved += 3 * half + half  # query, key and value; the output of attention
    saved += 4 * half + 4 * half  # input and output of GELU
    return h * saved + 4 * run.n_head + 4 * 4  # and the softmax's sums per head, mean and 1/std of each LayerNorm


def saved_at_ends(run):
    """Returns the bytes per token kept before the first and after the last block, without logits."""
    h, half = run.n_embd, run.half_bytes
    residual = half if run.sharded or run.half_residual else 4
    return h * (2 * residual + 2 * half if run.kernels else residual + half) + 16  # tokens and targets, int64


def logits_bytes(run):
    """Returns the bytes of all tensors with the shape of the logits at the start of the backward."""
    half, rows = run.half_bytes, run.tokens
    if run.kernels and run.loss_rows:
        rows = 2 * min(run.loss_rows, run.tokens)  # one chunk and its gradient
    if run.kernels:
        per_logit = half + run.fp8_head  # the gradient replaces the logits in place; FP8 also has it in 8 bits
    elif run.path == 'compiled':
        per_logit = half if run.sharded else 3 * half  # under DDP also their gradient and a gradient of zeros
    else:
        per_logit = half + 4 + 4  # rounded, log-softmax in float32, and its gradient
    extra = 4 * run.vocab_size * run.n_embd + 2 * run.tokens * run.n_embd if run.kernels and run.loss_rows else 0
    return per_logit * rows * run.vocab_size + extra


def half_copies(run):
    """
    Returns the bytes of the weights' copies in 16 or 8 bits that the backward needs, apart from FSDP's gathered units.
    """
    n, half, head = run.parameters, run.half_bytes, run.vocab_size * run.n_embd
    if half == 4:
        return 0.0
    if run.fp8:
        narrow = 0 if run.fp8_everywhere else run.n_layer * run.n_embd**2  # a third of c_attn; the output of attention
        if run.graphs and not run.sharded:  # graphs keep two copies of 8 bits, and these two weights also in 16 bits
            return 2 * n + 2 * 4 * narrow
        # otherwise one copy of 8 bits waits for the backward, or one of 16 bits, which FSDP has gathered anyway
        rounded = 3 * narrow * (not run.checkpointing) + head * (not run.fp8_head)
        return (head if run.checkpointing else n) - rounded + half * rounded * (not run.sharded)
    if run.sharded:
        return 0.0
    # recomputed blocks round again, but graphs with kernels keep theirs
    if not run.checkpointing or (run.kernels and run.graphs):
        return half * n
    # what autocast cached, of which recomputed blocks keep nothing
    return half * head if run.path == 'eager' else 0.0


def adamw(run):
    """Returns the bytes of AdamW's two moments on the GPU."""
    return 0.0 if run.offload else 8 * run.parameters / (run.gpus if run.trainer == 'zero1' else run.shards)


def at_loss(run):
    """Returns the bytes by component when the last micro-step's backward starts, with the activations of all blocks."""
    n, half, shards = run.parameters, run.half_bytes, run.shards
    several = run.micro_steps > 1
    result = dict.fromkeys(COMPONENTS, 0.0)
    result['parameters'] = 4 * n / shards
    result['optimizer'] = adamw(run)
    result['activations'] = run.tokens * (run.n_layer * saved_per_layer(run) + saved_at_ends(run))
    result['logits'] = logits_bytes(run)
    root = half * run.root_parameters
    if run.sharded:
        # whole float32 gradients until the last micro-step reduces them; with reshard each micro-step does
        result['gradients'] = several * 4 * n / (shards if run.reshard else 1)
        result['gathered_units'] = root + (root + 2 * half * run.unit_parameters if run.reshard else half * n)
        if run.offload:
            result['parameters'] = result['gradients'] = 0.0
    else:
        result['gradients'] = 4 * n * several + 4 * n * (run.gpus > 1)  # and DDP's buckets
    result['half_copies'] = half_copies(run)
    return result


def at_forward_end(run):
    """Returns the bytes by component when the loss is computed: the peak of eager mode with recomputed blocks."""
    result = at_loss(run)
    if run.path != 'eager' or run.sharded or not run.checkpointing:
        return result
    half = run.half_bytes
    weights = half * run.parameters if half < 4 else 0.0  # autocast's cache still has them
    return result | {'half_copies': weights, 'logits': (4 + 4) * run.tokens * run.vocab_size}


def at_end(run):
    """Returns the bytes by component when the backward ends, with all gradients and one block's activations."""
    n, half, shards, h = run.parameters, run.half_bytes, run.shards, run.n_embd
    tied = run.vocab_size * h  # the embedding's second gradient, from the output layer
    result = at_loss(run) | {'logits': 0.0, 'activations': run.tokens * 60.0 * h, 'half_copies': 0.0}
    if run.sharded:
        root, unit = run.root_parameters, run.unit_parameters
        in_flight = (half + half + 4) * root + 4 * unit  # weights, gradients and reductions in flight
        result['gathered_units'] = in_flight + (2 * half * unit if run.offload else 0.0)
        result['gradients'] = 0.0 if run.offload else 4 * n / shards
        if not run.reshard:
            result['gathered_units'] += half * n
        return result
    if run.kernels and run.graphs:
        result['half_copies'] = half_copies(run)
    if run.path == 'compiled' and run.gpus == 1:  # the backward returns all gradients before any is added
        result['gradients'] += 4 * n
        result['activations'] += (4 + half) * tied
    elif run.micro_steps == 1 and run.gpus == 1:
        result['gradients'] = 4 * n
    return result


def at_head(run):
    """
    Returns the bytes by component after the output layer's weight gradient: the peak of wide layers with few tokens.
    """
    tied = run.vocab_size * run.n_embd
    result = at_loss(run)
    if run.path != 'eager' or run.sharded:
        return result
    result['logits'] = run.half_bytes * run.tokens * run.vocab_size + 4 * tied
    result['gradients'] += run.half_bytes * tied
    return result


def largest_of(*moments):
    return max(moments, key=lambda moment: sum(moment.values()))


def tensors(run):
    """Returns the tensors' bytes at the peak, by component: torch.cuda.max_memory_allocated() with launched kernels."""
    peak = largest_of(at_forward_end(run), at_loss(run), at_head(run), at_end(run))
    return peak | {'allocator': ALLOCATOR.workspace}


def streams_apart(run):
    """
    Returns the bytes by component if no stream reuses the memory of another, as torch's allocator keeps it. Under FSDP,
    reduced gradients are allocated on the stream of the reductions, so they need new memory although the backward frees
    activations. Equal to tensors() where gradients existed before.
    """
    peak = tensors(run)
    if not run.sharded or run.offload or (run.reshard and run.micro_steps > 1):
        return peak
    start = at_loss(run)
    start['gradients'] += 4 * run.parameters / run.shards
    return largest_of(peak, start | {'allocator': ALLOCATOR.workspace})


def stale_logits(run):
    """
    Returns the bytes that the logits leave unused. Tensors that are allocated after them and stay settle in their
    memory: the blocks' gradients if more micro-steps follow, or AdamW's new state. If the next logits do not fit into
    the rest of that memory, they get new memory, and the rest is lost. bench_memory.py --history traced this for the
    Triton model, and under FSDP for the compiled model with several micro-steps. FSDP with one micro-step is inferred
    from sizes, and so is FP8, whose gradient of the logits in 8 bits leaves memory, too.
    """
    several, logits = run.micro_steps > 1, run.half_bytes * run.tokens * run.vocab_size
    freed = logits + run.fp8_head * run.tokens * run.vocab_size
    gradients = 4 * run.n_layer * run.block_parameters
    if run.path == 'eager':  # gradients settle in the other tensors of this shape
        return logits if several and not run.sharded else 0.0
    if run.loss_rows and run.kernels:
        return 0.0
    if run.sharded and not several:
        return 0.0 if run.checkpointing else max(0.0, freed - adamw(run)) % logits
    if run.sharded and run.kernels:
        return 0.0
    if run.sharded and run.checkpointing:  # the last block's gradients settle above the activations that it recomputes
        return min(logits, run.tokens * saved_per_layer(run.change(checkpointing=False)))
    if run.sharded:
        return max(0.0, logits - gradients - adamw(run))
    if not (run.kernels and several):
        return 0.0
    lost = max(0.0, freed - gradients) % logits
    # on several GPUs, no gradients settle in the graphs, and AdamW's state settles in what launched kernels lost
    return lost if run.gpus == 1 else max(0.0, lost - adamw(run))


def first_bucket(run):
    """
    Returns the bytes of gradients that DDP and ZeRO-1 have in addition in the second iteration. In the first iteration,
    all gradients are in one bucket, which smaller ones replace. NCCL's process group refers to the first bucket until
    the CPU notices that its reduction has ended. With one micro-step, that is often too late. by_chance() covers
    the other runs.
    """
    return 0.0 if run.gpus == 1 or run.sharded or run.micro_steps > 1 else 4.0 * run.parameters


def by_chance(run):
    """
    Returns the bytes that some runs of several ranks under DDP and ZeRO-1 reserve in addition with several micro-steps:
    the first bucket, or a set of logits. Identical runs differ.
    """
    if run.gpus == 1 or run.sharded or run.micro_steps == 1:
        return 0.0
    return max(4 * run.parameters, run.half_bytes * run.tokens * run.vocab_size)


def settled(run, allocator):
    """Returns {component: bytes} like memory(), without first_bucket() and the total."""
    result, n = streams_apart(run), run.parameters
    result['allocator'] = allocator.workspace + allocator.rounding * sum(result.values()) + stale_logits(run)
    if run.graphs and not run.sharded:
        pool = allocator.pool_kernels if run.kernels else allocator.pool_compiled
        # with several ranks the gradients are in DDP's buckets, outside the pool
        result['graph_pools'] = 0.12 * GIB + (pool * 4 * n if run.gpus == 1 else 0.0)
    return result


def memory(run: Run, allocator: Allocator | None = None) -> dict[str, float]:
    """
    Returns {component: bytes, 'total': bytes}: torch.cuda.max_memory_reserved() on the GPU with the most, with
    expandable segments, which train.py enables.
    """
    result = settled(run, allocator or ALLOCATOR)
    # the largest models that trained had no room for it
    if sum(result.values()) + first_bucket(run) + outside_torch(run) <= run.gpu.memory_bytes:
        result['gradients'] += first_bucket(run)
    return result | {'total': sum(result.values())}


def needed(run: Run, allocator: Allocator | None = None) -> float:
    """
    Returns the least bytes with which the run can train. When memory runs out, torch frees unused blocks, which costs
    speed.
    """
    allocator = allocator or ALLOCATOR
    total = sum(settled(run, replace(allocator, pool_compiled=0.0, pool_kernels=0.0)).values())
    apart = run.reshard * (sum(streams_apart(run).values()) - sum(tensors(run).values()))
    return total - stale_logits(run) - (1 + allocator.rounding) * apart


def outside_torch(run: Run) -> float:
    """Returns the bytes that CUDA and NCCL take from the GPU in addition to torch's."""
    return CONTEXT + NCCL * (run.gpus > 1)


def offloaded(run: Run) -> float:
    """Returns the bytes of each machine's memory that its ranks take with CPU offload."""
    return run.offload * OFFLOADED * run.parameters * min(run.gpus, run.gpu.per_machine) / run.shards


def tight(run: Run) -> bool:
    """Returns whether torch wants to reserve more than the GPU has."""
    return memory(run)['total'] + outside_torch(run) > run.gpu.memory_bytes


def load(path=FITTED):
    return Allocator(**json.loads(path.read_text())['allocator']) if path.exists() else Allocator()


ALLOCATOR = load()
