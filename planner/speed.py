"""
Computes the tokens per second of a run: a roofline for each kind of work, with efficiencies fitted on measured runs.
docs/planner.md explains it.

The time of an iteration is micro_steps times a micro-step (matmuls, attention, and kernels bound by memory bandwidth,
in sequence), plus communication that no computation hides, plus clipping and AdamW.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from planner import memory
from planner.run import Run

FITTED = Path(__file__).with_name('efficiencies.json')


@dataclass(frozen=True)
class Efficiencies:
    """Fractions of data sheet figures, and CPU times. benchmarks/bench_planner.py writes them to efficiencies.json."""

    matmul: float = 0.70  # of the peak FLOP/s, for an infinitely wide model
    narrow: float = 50.0  # model width at which half of that is lost
    narrow_fp8: float = 270.0  # the same in FP8, which has twice the peak
    attention: float = 0.24  # of the peak FLOP/s, forward and backward of cuDNN's causal attention
    compiled: float = 0.75  # of the memory bandwidth, in kernels by torch.compile
    kernels: float = 0.75  # of the memory bandwidth, in the Triton kernels
    eager: float = 0.75  # of the memory bandwidth, in PyTorch's own kernels
    fsdp: float = 0.75  # of the memory bandwidth, in blocks compiled one by one, residual stream in 16 bits
    fixed: float = 40e-6  # seconds per block and micro-step that its kernels take to start and to drain
    optimizer: float = 0.85  # of the memory bandwidth, in clipping and AdamW
    slowest_rank: float = 0.97  # speed of one of several ranks, which wait for each other in each iteration
    link: float = 0.78  # of NVLink's bandwidth, in NCCL's collectives
    exposed: float = 0.8  # part of a gradient reduction that backward does not hide
    launch: float = 0.6e-3  # CPU seconds per block and micro-step without CUDA graphs, compiled or eager
    launch_kernels: float = 3.3e-3  # the same with the Triton kernels, whose autograd functions run in Python
    launch_fsdp: float = 2.8e-3  # the same under FSDP, whose hooks run in Python
    launch_reduce: float = 2.5e-3  # and once per iteration for each FSDP unit
    cpu_bandwidth: float = 45e9  # bytes/s of CPU memory for each rank's share of an offloaded AdamW
    mapping: float = 220e9  # bytes/s at which torch gives memory back to CUDA and allocates it again

    def on_cpu(self, factor):
        """Returns these Efficiencies with `factor` times the CPU's time for launching kernels."""
        names = ('launch', 'launch_kernels', 'launch_fsdp', 'launch_reduce')
        return replace(self, **{name: factor * getattr(self, name) for name in names})


def element_bytes(run):
    """Returns the bytes per token that the kernels of one block read and write between matmuls: (forward, backward)."""
    h, half = run.n_embd, run.half_bytes
    r = half if run.sharded or run.half_residual else 4
    norm = r + half + r + half  # reads the residual stream and a branch, writes their sum and its norm
    norm_backward = half + r + r + r + half  # reads two gradients and the input, writes the gradient, also rounded
    gelu, gelu_backward = 8 * half, 12 * half
    pack = 6 * half  # the gradients of query, key and value, into one tensor
    forward, backward = 2 * norm + gelu, 2 * norm_backward + gelu_backward + pack
    if run.fp8:  # the same kernels also write 8-bit operands of the four matmuls; wide models need two more kernels
        forward, backward = forward + 1 + 1 + 4, backward + 1 + 1 + 4
        if run.fp8_everywhere:  # for the output of attention, and for the packed gradients
            forward, backward = forward + half + 1, backward + 3 * half + 3
    if run.path == 'eager':  # LayerNorm writes float32, which is rounded, and each addition is a kernel
        forward, backward = forward + 2 * (4 + 4 + half + r), backward + 2 * (4 + half + r)
    return h * forward, h * backward


def logit_bytes(run):
    """Returns the bytes read and written per logit outside the matmuls."""
    half = run.half_bytes
    if run.exponentials:  # the matmul writes them in the time of a plain one
        return 0
    if run.kernels:
        return 3 * half + run.fp8_head  # two reads, and the gradient in place
    if run.path == 'compiled':
        return 4 * half if run.sharded else 7 * half  # without FSDP also a gradient of zeros to fill and add
    return 5 * half + 4 * 6


def weight_bytes(run):
    """Returns the bytes per parameter and micro-step for rounding weights and adding gradients."""
    half = run.half_bytes
    add = 12  # a gradient in float32 and the sum so far, read and written
    if run.sharded:  # FP8 reads the gathered weights twice, and writes an 8-bit copy and reads it to transpose it
        return (half + add if run.micro_steps > 1 else half + 4) + run.fp8 * (2 * half + 3)
    if run.kernels:  # the matmul adds; weights are rounded once an iteration
        return 8 + (4 + 4 + 3 if run.fp8 else 4 + half) / run.micro_steps
    return 4 + half + add + half


def flops_in_fp8(run):
    """Returns the FLOPs per token of matmuls in 8 bits: forward and input gradients, but no weight gradients."""
    if not run.fp8:
        return 0.0
    h, forwards = run.n_embd, 1 + run.checkpointing
    weights = 12 * (forwards + 1) if run.fp8_everywhere else 11 * forwards + 9  # in units of h * h
    return 2 * (weights * h * h * run.n_layer + 2 * run.fp8_head * run.vocab_size * h)


def micro_step_parts(run, e):
    """Returns the seconds of one micro-step on one GPU, by kind of work."""
    h, tokens, gpu = run.n_embd, run.tokens, run.gpu
    # The forward is a third of forward and backward. No backward needs the output of a block's last matmul, so its
    # recomputation leaves that out, unless the block is one function: with the kernels, or compiled by itself
    again = 12 if run.kernels or (run.sharded and run.compiled) else 8
    blocks = 6 * (12 + run.checkpointing * again / 3) * h * h * run.n_layer
    head = 6 * run.vocab_size * h
    matmul = e.matmul * h / (h + e.narrow) * gpu.peak_flops * 2 / run.half_bytes
    in_fp8 = flops_in_fp8(run)
    matmul_fp8 = e.matmul * h / (h + e.narrow_fp8) * 2 * gpu.peak_flops
    forward, backward = element_bytes(run)
    moved = tokens * run.n_layer * (forward * (1 + run.checkpointing) + backward)
    moved += tokens * run.vocab_size * logit_bytes(run) + tokens * h * 24
    moved += weight_bytes(run) * run.parameters
    fraction = e.kernels if run.kernels else e.eager if run.path == 'eager' else e.fsdp if run.sharded else e.compiled
    # causal attention: 2 T h FLOPs per token in forward, 5 T h in backward, which recomputes the scores
    attention = run.n_layer * run.block_size * h * (2 * (1 + run.checkpointing) + 5)
    return {
        'matmuls': tokens * ((blocks + head - in_fp8) / matmul + in_fp8 / matmul_fp8),
        'attention': tokens * attention / (e.attention * gpu.peak_flops * 2 / run.half_bytes),
        'elementwise': moved / (fraction * gpu.bandwidth),
        'fixed': e.fixed * run.n_layer * (1 + run.checkpointing / 3),
    }


def launch_seconds(run, e):
    """
    Returns the CPU seconds per iteration without CUDA graphs. The GPU waits for the CPU if its own time is shorter.
    """
    recompute = 1 + run.checkpointing / 3
    units = run.n_layer if run.unit_parameters < run.n_layer * run.block_parameters else 1
    each = max(
        e.launch * run.n_layer, run.kernels * e.launch_kernels * run.n_layer, run.sharded * e.launch_fsdp * units
    )
    return run.micro_steps * each * recompute + run.sharded * e.launch_reduce * units


def collective_bytes_per_s(run, e, ranks, network):
    """
    Returns the bytes/s of a ring of `ranks` ranks: NVLink in a machine, each GPU's share of the network between
    machines.
    """
    inside = e.link * run.gpu.link
    return inside if ranks <= run.gpu.per_machine else min(inside, network)


def exposed_seconds(run, e, network):
    """Returns the seconds per iteration in which the ranks only communicate."""
    n, half = run.parameters, run.half_bytes
    if run.gpus == 1:
        return 0.0
    if run.sharded:
        ranks = run.shards
        speed = collective_bytes_per_s(run, e, ranks, network)
        share = (ranks - 1) / ranks
        gathers = 2 * run.micro_steps if run.reshard else 1
        reductions = run.micro_steps if run.reshard else 1
        volume = share * n * (half * gathers + 4 * reductions)
        seconds = volume / speed
        groups = run.gpus // ranks
        if groups > 1:  # each rank reduces its shard with its peers in the other groups
            across = collective_bytes_per_s(run, e, run.gpus, network)
            seconds += 2 * (groups - 1) / groups * 4 * n / ranks / across
        return e.exposed * seconds
    speed = collective_bytes_per_s(run, e, run.gpus, network)
    share = (run.gpus - 1) / run.gpus
    seconds = e.exposed * 2 * share * 4 * n / speed
    if run.trainer == 'zero1':  # the updated parameters, which nothing hides
        seconds += share * 4 * n / speed
    return seconds


def optimizer_seconds(run, e):
    """
    Returns the seconds of clipping, which reads and scales gradients, and AdamW: 4 numbers read per parameter, 3
    written.
    """
    n = run.parameters / run.shards
    clip = 12 * n
    update = 28 * n / (run.gpus if run.trainer == 'zero1' else 1)
    if run.offload:
        local = min(run.gpus, run.gpu.per_machine)
        return (clip + update + 8 * n) / min(e.cpu_bandwidth, 2.7 * e.cpu_bandwidth / local)
    return (clip + update) / (e.optimizer * run.gpu.bandwidth)


def remapped_bytes(run):
    """
    Returns the bytes per iteration that torch gives back to CUDA and allocates again on a full GPU: under FSDP each
    unit's weights and gradients in 16 bits, and the gradients in float32 for their reduction; otherwise logits. Replays
    of CUDA graphs allocate nothing.
    """
    if run.graphs:
        return 0.0
    return 8 * run.parameters if run.sharded else run.half_bytes * run.tokens * run.vocab_size


def iteration_seconds(
    run: Run, e: Efficiencies | None = None, network: float = 50e9, full: bool | None = None
) -> float:
    """
    Returns the seconds per iteration of train.py. network: bytes/s per GPU between machines. full: whether torch lacks
    memory; None: as memory.tight() says.
    """
    e = e or EFFICIENCIES
    parts = micro_step_parts(run, e)
    compute = sum(parts.values())
    if run.gpus > 1:
        compute /= e.slowest_rank
    micro_steps = run.micro_steps * compute
    if not run.graphs:
        micro_steps = max(micro_steps, launch_seconds(run, e))
    full = memory.tight(run) if full is None else full
    remapping = full * remapped_bytes(run) / e.mapping
    return micro_steps + exposed_seconds(run, e, network) + optimizer_seconds(run, e) + remapping


def tokens_per_sec(run: Run, e: Efficiencies | None = None, network: float = 50e9, full: bool | None = None) -> float:
    return run.tokens_per_iter / iteration_seconds(run, e, network, full)


def load(path=FITTED):
    return Efficiencies(**json.loads(path.read_text())['efficiencies']) if path.exists() else Efficiencies()


EFFICIENCIES = load()
