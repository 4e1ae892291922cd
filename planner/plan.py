"""
Makes a plan: for each trainer its memory, whether it fits, its speed with a range, and the basis of the numbers.

The basis of a number is `measured` (exactly this configuration was run), `interpolated` (between measured
configurations) or `extrapolated` (beyond them). benchmarks/bench_planner.py found the ranges by leaving each
configuration out of the fit.
"""

from dataclasses import dataclass

from planner import memory, options, speed
from planner.gpus import GPU
from planner.run import Run

# Relative half-widths of the range of tokens/s. The first is about the largest error with a configuration left out of
# the fit; the others are judgement: more GPUs of a measured machine, other shapes, and other GPUs or several machines.
RANGES = {'interpolated': 0.07, 'more_gpus': 0.10, 'extrapolated': 0.15, 'other': 0.35}
CPU_TIMES = 0.65, 1.5  # without CUDA graphs: the fastest and the slowest CPU of the measured runs, relative to the fit
MEMORY_RANGES = {'interpolated': 0.05, 'extrapolated': 0.10}


@dataclass(frozen=True)
class Estimate:
    """The estimate for one trainer. Bytes are those of the GPU with the most."""

    name: str
    run: Run
    memory_bytes: dict  # by component, and the total that torch reserves
    context_bytes: float  # outside torch
    memory_low: float  # the least with which the run can train
    memory_high: float
    memory_basis: str
    tokens_per_sec: float
    low: float
    high: float
    basis: str

    @property
    def fits(self):
        """True if the run can train on this GPU, even if torch must free stale blocks first."""
        return self.memory_low + self.context_bytes <= self.run.gpu.memory_bytes

    @property
    def tight(self):
        """True if it fits only because torch frees stale blocks, which costs speed."""
        return self.fits and self.memory_bytes['total'] + self.context_bytes > self.run.gpu.memory_bytes

    @property
    def mfu(self):
        return self.tokens_per_sec / self.run.gpus * self.run.flops_per_token / self.run.gpu.peak_flops

    def hours(self, tokens):
        return tokens / self.tokens_per_sec / 3600


def speed_basis(run):
    """Returns ('interpolated' or 'extrapolated', key of RANGES)."""
    width = 768 <= run.n_embd <= 1600 and 12 <= run.n_layer <= 48
    batch = 3072 <= run.tokens <= 128 * 1024 and 256 <= run.block_size <= 2048
    inside = width and batch and run.vocab_size == 50304 and run.half_bytes == 2
    inside = inside and not (run.checkpointing and run.gpus > 1) and not run.offload and not run.dropout
    inside = inside and not (run.fp8 and not (run.half_residual or run.sharded))
    if not run.gpu.measured or run.gpus > run.gpu.per_machine:
        return 'extrapolated', 'other'
    basis = 'interpolated' if inside and run.gpus <= 4 else 'extrapolated'
    return basis, 'more_gpus' if inside and run.gpus > 4 else basis


def memory_basis(run):
    """Returns 'interpolated' if architecture, batch, context and number of GPUs are within the measured ones."""
    shape = 768 <= run.n_embd <= 8192 and 4 <= run.n_layer <= 76 and 256 <= run.block_size <= 2048
    inside = shape and run.gpu.measured and run.gpus <= 4 and 1024 <= run.tokens <= 260 * 1024
    return 'interpolated' if inside and run.half_bytes == 2 and run.vocab_size == 50304 else 'extrapolated'


def estimate(name: str, run: Run, network: float, rows=()) -> Estimate:
    """Returns the Estimate of a run. rows: measured rows, whose numbers replace the model's if the run is the same."""
    parts = memory.memory(run)
    same = [row for row in rows if row.run == run]
    reserved = [row.reserved for row in same if row.reserved]
    basis, width = memory_basis(run), MEMORY_RANGES[memory_basis(run)]
    if reserved:  # attribute the difference from the model to the allocator
        parts['allocator'] += max(reserved) - parts['total']
        parts['total'], basis, width = max(reserved), 'measured', 0.01
    low, high = min(memory.needed(run), parts['total']), parts['total'] * (1 + width)
    tokens_per_sec = speed.tokens_per_sec(run, network=network)
    speed_is, key = speed_basis(run)
    may_lack = memory.tight(run) or high + memory.outside_torch(run) > run.gpu.memory_bytes
    quick, slow = (speed.EFFICIENCIES.on_cpu(factor) for factor in CPU_TIMES)
    least = speed.tokens_per_sec(run, slow, network, full=may_lack)
    most = speed.tokens_per_sec(run, quick, network, full=False)
    bounds = least * (1 - RANGES[key]), most * (1 + RANGES[key])
    timed = [row for row in same if row.tokens_per_sec and row.low]
    if timed:
        best = max(timed, key=lambda row: row.date)
        tokens_per_sec, bounds, speed_is = best.tokens_per_sec, (best.low, best.high), 'measured'
    high += memory.by_chance(run) if basis != 'measured' else 0.0
    return Estimate(name, run, parts, memory.outside_torch(run), low, high, basis, tokens_per_sec, *bounds, speed_is)


def make_plan(config: dict, gpu: GPU, gpus: int, network: float, rows=()) -> dict[str, Estimate]:
    """Returns {name: Estimate} for every trainer on these GPUs. Raises UserError for impossible flags."""
    return {name: estimate(name, run, network, rows) for name, run in options.make_runs(config, gpu, gpus).items()}


# trainers in order of simplicity, to choose among equally fast ones
SIMPLEST = (
    'ddp',
    'triton',
    'zero1',
    'zero1+triton',
    'fsdp',
    'fsdp+triton',
    'hybrid',
    'fsdp+checkpointing',
    'fsdp+offload',
)


def recommend(plan: dict[str, Estimate], flags=()) -> Estimate | None:
    """
    Returns the fastest Estimate that fits, or the simplest within 2% of it; None if none fits. flags: names of flags
    that the trainer's train.py must know.
    """
    names = [name for name in SIMPLEST if name in plan and options.known_to(name).issuperset(flags)]
    fitting = [plan[name] for name in names if plan[name].fits]
    if not fitting:
        return None
    roomy = [e for e in fitting if not e.tight] or fitting
    fastest = max(e.tokens_per_sec for e in roomy)
    return next(e for e in roomy if e.tokens_per_sec >= 0.98 * fastest)


def change_that_fits(config: dict, gpu: GPU, gpus: int, network: float, flags=()) -> tuple[dict, int, Estimate] | None:
    """
    Returns the smallest change that makes a trainer fit: ({flag: value}, number of GPUs, Estimate), or None. Tries, in
    this order: recomputing activations, smaller but more micro-steps, both, CPU offload, more GPUs. flags: as in
    recommend().
    """

    def best_with(change, count, offload=False):
        new = config | change
        steps = new['gradient_accumulation_steps']
        new['gradient_accumulation_steps'] = -(-steps // count) * count
        if new['fsdp_shard_size'] and count % new['fsdp_shard_size']:
            new['fsdp_shard_size'] = 0
        plan = {k: e for k, e in make_plan(new, gpu, count, network).items() if ('offload' in k) == offload}
        return recommend(plan, flags), {k: new[k] for k in new if new[k] != config[k]}

    sizes = [config['batch_size'] >> i for i in range(1, config['batch_size'].bit_length())]
    smaller = [
        dict(
            batch_size=size,
            gradient_accumulation_steps=config['gradient_accumulation_steps'] * config['batch_size'] // size,
        )
        for size in sizes
    ]
    recompute = {'activation_checkpointing': True}
    counts = [gpus] + [count for count in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count > gpus]
    for count in counts:
        for change in ({}, recompute, *smaller, *(recompute | change for change in smaller)):
            found, changed = best_with(change, count)
            if found:
                return changed, count, found
        found, _ = best_with({}, count, offload=True)
        if found:
            return {}, count, found
    return None


def largest(what: str, name: str, config: dict, gpu: GPU, gpus: int, network: float) -> tuple[int, Estimate | None]:
    """
    Returns the most layers (what='model') or sequences per micro-step (what='batch') with which this trainer fits:
    (number, Estimate), or (0, None) if not even one fits.
    """
    key = {'model': 'n_layer', 'batch': 'batch_size'}[what]

    def fits(number):
        run = options.make_runs(config | {key: number}, gpu, gpus)[name]
        found = estimate(name, run, network)
        return found if found.fits else None

    few, many = 0, 1
    while fits(many) and many < 2**20:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    return few, fits(few) if few else None
