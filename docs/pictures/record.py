"""
Records the data of step_memory.py, overlap.py and timeline.py with torch.profiler: one training step of DDP, ZeRO-1 or
FSDP. The first two run on two CPU processes (gloo) and measure no speed.

    python docs/pictures/record.py memory         # writes docs/pictures/step_memory.json
    python docs/pictures/record.py overlap        # writes docs/pictures/overlap.json
    python docs/pictures/record.py timeline       # on two or more GPUs; writes docs/pictures/timeline.json
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
sys.path[:0] = [str(ROOT / name) for name in ('phase1_zero1', 'phase3_fsdp', 'benchmarks')]
from model import GPT, GPTConfig
from sharding import ShardedAdamW, set_last_micro_step, shard
from zero1 import Zero1Optimizer

WORLD_SIZE, STEPS = 2, 3
MODEL = dict(n_layer=8, n_head=4, block_size=256, vocab_size=8192, bias=False)
# n_embd, batch_size; few tokens and a wide model make communication long
SIZES = {'memory': (256, 4), 'overlap': (512, 1)}
FSDP_FLAGS = dict(
    device='cpu', dtype='float32', compile=False, fsdp_cpu_offload=False, fsdp_shard_size=0, fsdp_min_num_params=1
)


def build(kind, trainer, bucket_mb=25):
    """Returns (model, wrapped model, optimizer, tokens). bucket_mb: size of DDP's buckets; PyTorch's default is 25."""
    torch.manual_seed(1)
    n_embd, batch_size = SIZES[kind]
    tokens = torch.randint(MODEL['vocab_size'], (batch_size, MODEL['block_size'] + 1))
    model = GPT(GPTConfig(**MODEL, n_embd=n_embd))
    if trainer == 'fsdp':
        shard(model, FSDP_FLAGS | dict(fsdp_reshard=True))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    if trainer == 'zero1':
        optimizer = Zero1Optimizer(optimizer)
    if trainer == 'fsdp':
        return model, model, ShardedAdamW(optimizer), tokens
    return model, DDP(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb), optimizer, tokens


def step(model, optimizer, tokens):
    """Runs one iteration with one micro-step."""
    with record_function('forward'):
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]
    with record_function('backward'):
        loss.backward()
    with record_function('step'):
        if isinstance(optimizer, ShardedAdamW):
            optimizer.collect_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def events_of(prof):
    """Returns the events of a trace in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        prof.export_chrome_trace(f'{folder}/trace.json')
        with open(f'{folder}/trace.json') as f:
            return sorted((e for e in json.load(f)['traceEvents'] if 'ts' in e), key=lambda e: e['ts'])


def memory(rank, trainer):
    """
    Returns the CPU memory that torch has allocated during the last step: phases {name: [start, end]} in ms, and a curve
    of [ms, bytes].
    """
    # profile from the first allocation on: the profiler does not count earlier ones
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        model, wrapped, optimizer, tokens = build('memory', trainer)
        if trainer == 'fsdp':
            set_last_micro_step(model, True)
        for _ in range(STEPS):
            step(wrapped, optimizer, tokens)
    events = events_of(prof)
    phases = {name: [e for e in events if e['name'] == name][-1] for name in ('forward', 'backward', 'step')}
    start, end = phases['forward']['ts'], phases['step']['ts'] + phases['step']['dur']
    counts = [(e['ts'], e['args']['Total Allocated']) for e in events if e['name'] == '[memory]']
    inside = [(t, n) for t, n in counts if start <= t <= end]
    before = [n for t, n in counts if t < start][-1]
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        phases={k: [(e['ts'] - start) / 1000, (e['ts'] + e['dur'] - start) / 1000] for k, e in phases.items()},
        at_rest=before,
        peak=max(n for _, n in inside),
        curve=thin([(0.0, before), *((round((t - start) / 1000, 2), n) for t, n in inside)]),
    )


def thin(curve, parts=240):
    """Returns the largest and the smallest value of each part of the curve's time, in order of time."""
    width = curve[-1][0] / parts
    kept = []
    for part in range(parts + 1):
        those = [point for point in curve if int(point[0] / width) == part]
        if those:
            kept += sorted({max(those, key=lambda p: p[1]), min(those, key=lambda p: p[1])})
    return kept


def overlap(rank, trainer):
    """Returns the last step's computation and communication as events [name, start, end] in ms."""
    # smaller buckets than usual, of which this model would fill only two
    model, wrapped, optimizer, tokens = build('overlap', trainer, bucket_mb=16)
    if trainer == 'fsdp':
        set_last_micro_step(model, True)
        # on GPUs, gathers are asynchronous in a stream of their own, and start early because the CPU runs ahead; on a
        # CPU, both must be requested
        blocks = list(model.transformer.h)
        for unit, following in zip([model, *blocks], [*blocks, None]):
            unit._set_unshard_async_op(True)
            if following is not None:
                unit.set_modules_to_forward_prefetch([following])
    for i, block in enumerate(model.transformer.h):
        block.forward = partial(recorded, block.forward, f'compute block {i}')
    for _ in range(STEPS):
        step(wrapped, optimizer, tokens)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        step(wrapped, optimizer, tokens)
    events = [e for e in events_of(prof) if 'dur' in e]
    start = next(e['ts'] for e in events if e['name'] == 'forward')
    kept = [
        [e['name'], round((e['ts'] - start) / 1000, 2), round((e['ts'] + e['dur'] - start) / 1000, 2)]
        for e in events
        if e['name'] in ('forward', 'backward', 'step')
        or e['name'].startswith(('gloo:', 'compute', 'FSDP::all_gather ('))
    ]
    return dict(events=kept)


def recorded(function, name, *args):
    with record_function(name):
        return function(*args)


def rank_main(rank, kind, trainer, store, out):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=WORLD_SIZE)
    with redirect_stdout(open(os.devnull, 'w')):
        result = {'memory': memory, 'overlap': overlap}[kind](rank, trainer)
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


TIMELINE = dict(n_layer=48, n_head=25, n_embd=1600)  # GPT-2 1.5B; with kernels, so that nothing has to be compiled
TIMELINE_BATCH = 8  # sequences of 1024 tokens for each GPU


def trace(step):
    """Profiles step() once. Returns the GPU's kernels as (name, start, end) in order of time, in microseconds."""
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        step().item()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        prof.export_chrome_trace(f'{folder}/trace.json')
        with open(f'{folder}/trace.json') as f:
            written = json.load(f)
    zero = written.get('baseTimeNanoseconds', 0) / 1000  # the same clock on all ranks of a machine
    kernels = [e for e in written['traceEvents'] if e.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset')]
    return sorted(((e['name'], zero + e['ts'], zero + e['ts'] + e['dur']) for e in kernels), key=lambda k: k[1])


def sorted_out(kernels, start):
    """
    Returns the kernels of one iteration on one GPU by kind: computation as {phase: [[start, end]]}, communication as
    [[collective, start, end]], and when the forward of each block computed its attention; in ms after start.
    """

    def ms(time):
        return round((time - start) / 1000, 3)

    nccl = [(re.search('AllReduce|AllGather|ReduceScatter|Broadcast', k[0]), *k[1:]) for k in kernels if 'nccl' in k[0]]
    own = [k for k in kernels if 'nccl' not in k[0]]
    loss = next(a for name, a, _ in own if re.search('cross_entropy|losses_kernel', name))
    clip = next(a for name, a, _ in own if 'LpNorm' in name and a > loss)
    phases = {'forward': [], 'backward': [], 'optimizer': []}
    for _, a, b in own:
        intervals = phases['forward' if a < loss else 'backward' if a < clip else 'optimizer']
        if intervals and ms(a) - intervals[-1][1] < 0.01:  # gaps below 10 us cannot be seen
            intervals[-1][1] = max(intervals[-1][1], ms(b))
        else:
            intervals.append([ms(a), ms(b)])
    attention = [[ms(a), ms(b)] for name, a, b in own if 'sdpa' in name and 'fprop' in name]
    sent = [[found.group() if found else 'other', ms(a), ms(b)] for found, a, b in nccl]
    return phases | dict(communication=sent, attention=attention)


def write(result, path):
    Path(path).write_text(json.dumps(result).replace('], [', '],\n[') + '\n')


def timeline(out):
    """Writes the kernels of one iteration of one micro-step with DDP and with FSDP, on each GPU of a torchrun group."""
    from common import facts
    from trainer import Trainer, random_batch, start_ranks

    device, rank, world_size = start_ranks(cpu=False)
    result = facts() | dict(
        command='python docs/pictures/record.py timeline', model=TIMELINE, tokens=TIMELINE_BATCH * 1024, gpus=world_size
    )
    for kind, options in (('ddp', dict(half_residual=True)), ('fsdp', {})):
        options |= dict(batch_size=TIMELINE_BATCH, model='phase2_triton', cuda_graph=True, init='fill')
        trainer = Trainer(kind, TIMELINE | dict(vocab_size=50304), device, **options)
        trainer.feed(random_batch)
        for _ in range(20):  # DDP captures in the 12th iteration
            trainer.step().item()
        trace(trainer.step)  # starts the profiler
        everyone = [None] * world_size
        dist.all_gather_object(everyone, trace(trainer.step))
        first = min(kernels[0][1] for kernels in everyone)
        result[kind] = [sorted_out(kernels, first) for kernels in everyone]
        if rank == 0:
            write(result, out)
            print(kind, {phase: its[-1][-1] for phase, its in result[kind][0].items() if its}, flush=True)
        trainer.free()
    os._exit(0)  # NCCL waits for its graphs


def main(kind, out=FOLDER / 'timeline.json'):
    if kind == 'timeline':
        if 'RANK' in os.environ:
            return timeline(out)
        from common import torchrun

        return sys.exit(subprocess.call(torchrun(torch.cuda.device_count(), __file__, kind, out)))
    trainers = {'memory': ('ddp', 'zero1', 'fsdp'), 'overlap': ('ddp', 'fsdp')}[kind]
    result = dict(
        torch=torch.__version__,
        machine=f'{WORLD_SIZE} processes, 1 thread each, {os.cpu_count()} cores ({platform.machine()})',
        model=MODEL,
        n_embd=SIZES[kind][0],
        tokens=SIZES[kind][1] * MODEL['block_size'],
    )
    for trainer in trainers:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (kind, trainer, f'{folder}/store', f'{folder}/out'), nprocs=WORLD_SIZE)
            result[trainer] = json.loads(Path(f'{folder}/out').read_text())
    write(result, FOLDER / {'memory': 'step_memory.json', 'overlap': 'overlap.json'}[kind])


if __name__ == '__main__':
    if sys.argv[1:2] not in (['memory'], ['overlap'], ['timeline']):
        sys.exit(__doc__)
    main(*sys.argv[1:])
