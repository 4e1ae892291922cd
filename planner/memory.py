"""
GPU memory of a run, tensor by tensor. docs/planner.md derives each line.

memory(run) returns the bytes that torch reserves on the GPU with most, by component. Everything is counted from the code as it is;
only the numbers of ALLOCATOR, which describe how torch's allocator rounds and fragments, are fitted (benchmarks/bench_planner.py).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from planner.gpus import GIB

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
    """What torch's caching allocator adds to the bytes of the tensors."""

    workspace: float = 0.063 * GIB  # cuBLAS and what is allocated before the model
    rounding: float = 0.009  # of all tensors: blocks that are larger than their tensor, pages half used
    stale_logits: float = 0.75  # of the logits: gradients settle in the memory that the first micro-step's logits left
    pool_compiled: float = (
        0.45  # of the gradients, which a compiled backward returns all at once: space in a graph's pool
    )
    pool_kernels: float = 0.2  # the same where the kernels add each gradient as soon as it is there


CONTEXT = 0.685 * GIB  # CUDA's own memory, outside torch's allocator; measured on an H200
NCCL = 0.35 * GIB  # buffers of the communicators; assumed, within what the largest models that trained leave free


def saved_per_layer(run):
    """Bytes per token that a block keeps for its backward. The residual stream is float32 under autocast and 16 bits under FSDP."""
    h, half = run.n_embd, run.half_bytes
    residual = half if run.sharded or run.half_residual else 4
    if run.checkpointing:  # the input of each block; the kernels' blocks pass a branch that is yet to be added
        return h * (residual + half * run.kernels)
    saved = 2 * residual  # what each LayerNorm normalizes
    saved += 2 * half  # what each LayerNorm returns
    saved += 3 * half + half  # query, key and value; what attention returns
    saved += 4 * half + 4 * half  # around GELU
    return h * saved + 4 * run.n_head + 4 * 4  # and the softmax's sums per head, mean and 1/std of each LayerNorm


def saved_at_ends(run):
    """Bytes per token kept before the first and behind the last block, without logits."""
    h, half = run.n_embd, run.half_bytes
    residual = half if run.sharded or run.half_residual else 4
    return h * (2 * residual + 2 * half if run.kernels else residual + half) + 16  # tokens and targets, int64


def logits_bytes(run):
    """Bytes of all that has the shape of the logits at the start of the backward."""
    half, rows = run.half_bytes, run.tokens
    if run.kernels and run.loss_rows:
        rows = 2 * min(run.loss_rows, run.tokens)  # one chunk and its gradient
    if run.kernels:
        per_logit = half  # the gradient takes the place of the logits
    elif run.path == 'compiled':
        per_logit = (
            half if run.sharded else 3 * half
        )  # DDP returns them, so there are a gradient and a gradient of zeros
    else:
        per_logit = half + 4 + 4  # rounded, log-softmax in float32, and its gradient
    extra = 4 * run.vocab_size * run.n_embd + 2 * run.tokens * run.n_embd if run.kernels and run.loss_rows else 0
    return per_logit * rows * run.vocab_size + extra


def at_loss(run):
    """Bytes by component when the backward starts, in the last micro-step: the activations of all blocks are there."""
    n, half, shards = run.parameters, run.half_bytes, run.shards
    several = run.micro_steps > 1
    result = dict.fromkeys(COMPONENTS, 0.0)
    result['parameters'] = 4 * n / shards
    result['optimizer'] = 8 * n / (run.gpus if run.trainer == 'zero1' else shards)
    result['activations'] = run.tokens * (run.n_layer * saved_per_layer(run) + saved_at_ends(run))
    result['logits'] = logits_bytes(run)
    root = half * run.root_parameters
    if run.sharded:
        # kept whole and in float32 until the last micro-step reduces them; with reshard each micro-step reduces them
        result['gradients'] = several * 4 * n / (shards if run.reshard else 1)
        result['gathered_units'] = root + (root + 2 * half * run.unit_parameters if run.reshard else half * n)
        if run.offload:
            result['parameters'] = result['optimizer'] = result['gradients'] = 0.0
    else:
        result['gradients'] = 4 * n * several + 4 * n * (run.gpus > 1)  # and DDP's buckets
        # rounded weights, kept for the backward; recomputed blocks round anew, but the kernels keep theirs in a graph's memory
        keeps = not run.checkpointing or (run.kernels and run.graphs)
        result['half_copies'] = half * n if keeps and half < 4 else 0.0
        if run.path == 'eager':  # autocast's cache
            result['half_copies'] = half * n if half < 4 else 0.0
    return result


def at_end(run):
    """Bytes by component when the backward ends: the gradients of all parameters are there, and one block's activations."""
    n, half, shards, h = run.parameters, run.half_bytes, run.shards, run.n_embd
    tied = run.vocab_size * h  # the embedding's second gradient, from the output layer
    result = at_loss(run) | {'logits': 0.0, 'activations': run.tokens * 60.0 * h}
    if run.sharded:
        root, unit = run.root_parameters, run.unit_parameters
        in_flight = (half + half + 4) * root + 4 * unit  # weights, gradients and what is being reduced
        result['gathered_units'] = in_flight + (2 * half * unit if run.offload else 0.0)
        result['gradients'] = 0.0 if run.offload else 4 * n / shards
        if not run.reshard:
            result['gathered_units'] += half * n
        return result
    result['half_copies'] = half * n if run.kernels and run.graphs else 0.0
    if run.path == 'compiled' and run.gpus == 1:  # one backward returns all gradients before any is added
        result['gradients'] += 4 * n
        result['activations'] += (4 + half) * tied
    elif run.micro_steps == 1 and run.gpus == 1:
        result['gradients'] = 4 * n
    return result


def at_head(run):
    """Bytes by component when the output layer's backward has made its weight's gradient: a wide layer and few tokens."""
    tied = run.vocab_size * run.n_embd
    result = at_loss(run)
    if run.path != 'eager' or run.sharded:
        return result
    result['logits'] = run.half_bytes * run.tokens * run.vocab_size + 4 * tied
    result['gradients'] += run.half_bytes * tied
    return result


def tensors(run):
    """The bytes of all tensors at the peak, by component: what torch.cuda.max_memory_allocated() says of launched kernels."""
    peak = max((at_loss(run), at_head(run), at_end(run)), key=lambda moment: sum(moment.values()))
    return peak | {'allocator': ALLOCATOR.workspace}


def memory(run, allocator=None):
    """
    Returns {component: bytes, 'total': bytes}: what torch.cuda.max_memory_reserved() says on the GPU with most, with expandable
    segments, as train.py sets them up.
    """
    allocator = allocator or ALLOCATOR
    result, n = tensors(run), run.parameters
    several = run.micro_steps > 1
    result['allocator'] = allocator.workspace + allocator.rounding * sum(result.values())
    if several and ((run.kernels and not run.loss_rows) or run.path == 'eager') and not run.offload:
        per_logit = run.half_bytes if run.kernels else 4
        result['allocator'] += allocator.stale_logits * per_logit * run.tokens * run.vocab_size
    if run.sharded and not run.reshard:  # reduced gradients, which find no hole
        result['gradients'] += 4 * n / run.shards
    if run.graphs and not run.sharded:
        pool = allocator.pool_kernels if run.kernels else allocator.pool_compiled
        # among several ranks the gradients are in DDP's buckets, outside the pool
        result['graph_pools'] = 0.12 * GIB + (pool * 4 * n if run.gpus == 1 else 0.0)
    result['total'] = sum(result.values())
    return result


def needed(run, allocator=None):
    """Bytes without which the run cannot train. torch gives the stale blocks back when memory runs out, at the cost of speed."""
    allocator = allocator or ALLOCATOR
    result = memory(run, replace(allocator, stale_logits=0.0, pool_compiled=0.0, pool_kernels=0.0))
    return result['total']


def outside_torch(run):
    """Bytes that CUDA and NCCL take from the GPU besides what torch reserves."""
    return CONTEXT + NCCL * (run.gpus > 1)


def load(path=FITTED):
    return Allocator(**json.loads(path.read_text())['allocator']) if path.exists() else Allocator()


ALLOCATOR = load()
