"""
Measures the reserved GPU memory of a training step, in one process per GPU and configuration. plan.py is fitted on the
result.

    python benchmarks/bench_memory.py --out=benchmarks/results/memory_h200.json --seconds=225
    python benchmarks/bench_memory.py --set=more --out=benchmarks/results/memory_more_h200.json --seconds=90
    python benchmarks/bench_memory.py --set=timed --out=benchmarks/results/memory_times_h200.json --seconds=118
    python benchmarks/bench_memory.py --set=alone --out=benchmarks/results/memory_alone_h200.json --seconds=90
    python benchmarks/bench_memory.py --set=fp8 --history --out=benchmarks/results/memory_fp8_h200.json --seconds=57
    python benchmarks/bench_memory.py --set=several --ranks=2 --out=benchmarks/results/memory_h200x2.json --seconds=60
    python benchmarks/bench_memory.py --set=peaks --history --out=memory.json --seconds=90
    python benchmarks/bench_memory.py --set=rank_peaks --ranks=2 --history --out=memory.json --seconds=150
    python benchmarks/bench_memory.py --dry-run --out=memory.json  # tiny models on a CPU: only checks the script

The models of one GPU run in nanoGPT/bench.py without a process group, so gradients are not in buckets. FSDP, and DDP
and ZeRO-1 on several GPUs, run in trainer.py. FSDP on one GPU runs in a group of one rank: the shard is the whole
model, and units are gathered as among several ranks. Each process runs some iterations on random tokens, with
expandable segments as in train.py. With CUDA graphs, the first iterations launch kernels and a later one captures. The
result states both peaks: reserved_launched before the first capture, and reserved over the whole process. With several
ranks, each number is the largest of any rank. With --set=alone, one rank of ZeRO-1 runs without the others: it has
DDP's buckets in a group of one, and AdamW's state for its share of the parameters.

As many processes as fit share the GPU, which does not change the memory that each one takes. A configuration for which
no time is left is listed in `not_run`.

With --set=timed, each process also times iterations. Processes compile and warm up at the same time. Once all of them
are ready, each has the GPU to itself in turn; the first half of its iterations warms the GPU up again and does not
count. --set=fp8 does the same for --fp8, next to processes that are not timed.

With --history, the result of a process that is not timed also states why torch reserved memory (growth()). With several
ranks, each records its own history, and the result has that of the rank that reserved most (history_of_rank).
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path

import torch

from common import GIB, ROOT, facts, spread, torchrun, write_json

sys.path[:0] = [str(ROOT), str(ROOT / 'nanoGPT')]
from planner import measured, memory
from planner.gpus import GPUS

SIZES = measured.SHAPES | {'tiny': (2, 2, 64)}  # n_layer, n_head, n_embd
LAUNCHED, GRAPHS = {'cuda_graph': False}, {'cuda_graph': True}
AC, EAGER = {'activation_checkpointing': True}, {'compile': False, 'cuda_graph': False}


def configurations():
    """Returns a list of (trainer, size, batch_size, block_size, options). Those that compile longest come first."""
    return [
        ('ddp', '1.5B', 4, 1024, LAUNCHED),
        ('ddp', '1.5B', 8, 1024, GRAPHS | AC),
        ('ddp', '1.5B', 8, 1024, GRAPHS),
        ('ddp', '774M', 8, 1024, GRAPHS),
        ('ddp', '350M', 12, 1024, LAUNCHED),
        ('ddp', '124M', 12, 1024, LAUNCHED),
        ('ddp', '124M', 32, 1024, LAUNCHED),
        ('ddp', '124M', 1, 1024, LAUNCHED),
        ('triton', '124M', 12, 1024, LAUNCHED),
        ('triton', '124M', 12, 1024, GRAPHS),
        ('triton', '1.5B', 8, 1024, LAUNCHED),
        ('triton', '1.5B', 8, 1024, GRAPHS),
        ('triton', '1.5B', 8, 1024, GRAPHS | AC),
        ('triton', '350M', 12, 1024, GRAPHS),
        ('fsdp', '124M', 12, 1024, GRAPHS),
        ('fsdp', '124M', 12, 1024, LAUNCHED),
        ('fsdp', '1.5B', 4, 1024, GRAPHS),
        ('ddp', '124M', 32, 1024, GRAPHS),
        ('ddp', '124M', 32, 1024, GRAPHS | AC),
        ('ddp', '124M', 12, 256, GRAPHS),
        ('ddp', '124M', 8, 2048, GRAPHS),
        ('ddp', '350M', 16, 512, GRAPHS),
        ('triton', '124M', 1, 1024, GRAPHS),
        ('triton', '124M', 1, 1024, LAUNCHED),
        ('triton', '124M', 32, 1024, LAUNCHED),
        ('triton', '124M', 32, 1024, GRAPHS),
        ('triton', '124M', 12, 256, GRAPHS),
        ('triton', '124M', 8, 2048, GRAPHS),
        ('triton', '774M', 8, 1024, GRAPHS),
        ('ddp', '124M', 12, 1024, GRAPHS),
        ('ddp', '350M', 12, 1024, GRAPHS),
        ('ddp', '1.5B', 4, 1024, GRAPHS),
        ('ddp', '124M', 1, 1024, GRAPHS),
        ('triton', '124M', 32, 1024, GRAPHS | AC),
        ('triton', '124M', 12, 1024, GRAPHS | {'gradient_accumulation_steps': 1}),
        ('ddp', '124M', 12, 1024, GRAPHS | {'gradient_accumulation_steps': 1}),
        ('fsdp', '350M', 8, 1024, GRAPHS),
        ('fsdp', '124M', 32, 1024, GRAPHS),
        ('fsdp', '1.5B', 8, 1024, GRAPHS | AC),
        ('fsdp', '1.5B', 4, 1024, LAUNCHED | {'fsdp_reshard': True}),
        ('triton', '1.5B', 1, 1024, GRAPHS),
        ('triton', '1.5B', 4, 2048, GRAPHS),
        ('triton', '350M', 32, 512, GRAPHS),
        ('triton', '350M', 12, 1024, LAUNCHED),
        ('triton', '350M', 8, 2048, GRAPHS | AC),
        ('triton', '124M', 32, 1024, GRAPHS | {'half_residual': True}),
        ('triton', '124M', 32, 1024, GRAPHS | {'loss_rows': 4096}),
        ('ddp', '124M', 12, 1024, EAGER),
        ('ddp', '350M', 8, 1024, EAGER),
        ('ddp', '1.5B', 2, 1024, EAGER),
        ('ddp', '1.5B', 8, 1024, EAGER | AC),
        ('fsdp', '124M', 12, 256, GRAPHS),
        ('fsdp', '124M', 32, 1024, GRAPHS | AC),
        ('fsdp', '1.5B', 4, 1024, LAUNCHED),
        ('ddp', '1.5B', 1, 1024, GRAPHS),
        ('ddp', '774M', 16, 1024, GRAPHS | AC),
        ('ddp', '350M', 16, 512, GRAPHS | AC),
        ('triton', '774M', 8, 1024, LAUNCHED),
        ('triton', '1.5B', 16, 1024, GRAPHS | AC),
        ('fsdp', '774M', 8, 1024, GRAPHS),
        ('triton', '124M', 4, 1024, GRAPHS),
        ('triton', '350M', 1, 2048, GRAPHS),
    ]


def timed_configurations():
    """Returns configurations to time, in the form of configurations(): checkpointing, and other contexts than 1024."""
    return [
        ('ddp', '350M', 8, 1024, GRAPHS | AC),
        ('ddp', '124M', 12, 1024, GRAPHS | AC),
        ('ddp', '124M', 32, 1024, GRAPHS | AC),
        ('ddp', '124M', 8, 2048, GRAPHS),
        ('ddp', '124M', 16, 512, GRAPHS),
        ('triton', '350M', 8, 2048, GRAPHS),
        ('triton', '350M', 8, 2048, GRAPHS | AC),
        ('triton', '124M', 32, 1024, GRAPHS | AC),
        ('triton', '124M', 8, 2048, GRAPHS),
        ('triton', '124M', 12, 256, GRAPHS),
        ('triton', '1.5B', 8, 1024, GRAPHS | AC),
        ('triton', '1.5B', 4, 2048, GRAPHS),
        ('triton', '774M', 8, 1024, GRAPHS),
        ('ddp', '774M', 8, 1024, EAGER | AC),
    ]


def more_configurations():
    """Returns further configurations, in the form of configurations(), that compile little: a minute in all."""
    one_step = {'gradient_accumulation_steps': 1}
    return [
        ('fsdp', '124M', 32, 1024, GRAPHS),
        ('fsdp', '124M', 32, 1024, GRAPHS | AC),
        ('triton', '350M', 32, 1024, GRAPHS | AC),
        ('triton', '124M', 16, 1024, GRAPHS),
        ('fsdp+triton', '350M', 12, 1024, GRAPHS),
        ('fsdp+triton', '124M', 32, 1024, GRAPHS),
        ('triton', '350M', 16, 1024, LAUNCHED),
        ('triton', '774M', 32, 1024, GRAPHS | AC),
        ('ddp', '124M', 32, 1024, EAGER),
        ('ddp', '350M', 8, 1024, EAGER | AC),
        ('triton', '350M', 12, 1024, GRAPHS | one_step),
        ('triton', '124M', 24, 1024, GRAPHS | AC),
        ('fsdp+triton', '774M', 8, 1024, GRAPHS),
        ('fsdp', '774M', 8, 1024, GRAPHS),
        ('triton', '1.5B', 16, 1024, GRAPHS | AC),
    ]


def fp8_configurations():
    """Returns configurations with FP8, and three others, in the form of configurations()."""
    fp8 = GRAPHS | {'fp8': True, 'half_residual': True}
    return [
        ('fsdp', '124M', 32, 1024, GRAPHS),
        ('fsdp+triton', '124M', 12, 1024, GRAPHS | {'fp8': True}),
        ('triton', '124M', 32, 1024, GRAPHS),
        ('triton', '350M', 12, 1024, fp8),
        ('triton', '774M', 4, 1024, fp8),
        ('triton', '124M', 12, 1024, GRAPHS),
        ('triton', '124M', 12, 1024, fp8),
        ('triton', '124M', 32, 1024, fp8),
    ]


def several_ranks():
    """Returns configurations for several ranks, in the form of configurations()."""
    one_step, five_steps = {'gradient_accumulation_steps': 1}, {'gradient_accumulation_steps': 5}
    return [
        ('zero1', '350M', 12, 1024, GRAPHS),
        ('zero1', '124M', 12, 1024, GRAPHS),
        ('zero1+triton', '1.5B', 8, 1024, GRAPHS),
        ('zero1', '774M', 8, 1024, EAGER),
        ('zero1+triton', '774M', 8, 1024, GRAPHS | five_steps),
        ('zero1+triton', '124M', 12, 1024, GRAPHS),
        ('zero1+triton', '350M', 12, 1024, GRAPHS | one_step),
        ('ddp', '350M', 12, 1024, EAGER),
        ('zero1', '350M', 12, 1024, EAGER),
    ]


def peaks_to_explain():
    """Returns configurations of one GPU, in the form of configurations(), to trace: FSDP with checkpointing."""
    return [
        ('fsdp', '124M', 32, 1024, GRAPHS | AC),
        ('fsdp', '350M', 16, 1024, GRAPHS | AC),
        ('ddp', '124M', 32, 1024, GRAPHS | AC),
        ('fsdp', '124M', 12, 1024, GRAPHS | AC),
    ]


def peaks_of_ranks():
    """
    Returns configurations of several ranks, in the form of configurations(), to trace: identical runs of these reserved
    different amounts.
    """
    half_residual = GRAPHS | {'half_residual': True}
    return [
        ('ddp+triton', '1.5B', 8, 1024, half_residual | {'gradient_accumulation_steps': 5}),
        ('zero1', '1.5B', 8, 1024, GRAPHS | {'gradient_accumulation_steps': 5}),
        ('zero1+triton', '124M', 12, 1024, half_residual | {'gradient_accumulation_steps': 10}),
        ('ddp+triton', '124M', 12, 1024, half_residual | {'gradient_accumulation_steps': 10}),
    ]


def ranks_alone():
    """Returns configurations of ZeRO-1, in the form of configurations(). one_of: one of this number of ranks runs."""
    one_step, five_steps = {'gradient_accumulation_steps': 1}, {'gradient_accumulation_steps': 5}
    return [
        ('ddp', '1.5B', 4, 1024, EAGER | {'one_of': 4} | five_steps),
        ('ddp', '774M', 8, 1024, EAGER | {'one_of': 4}),
        ('ddp+triton', '1.5B', 8, 1024, GRAPHS | {'one_of': 4}),
        ('ddp', '774M', 8, 1024, EAGER | {'one_of': 2}),
        ('ddp+triton', '774M', 8, 1024, GRAPHS | {'one_of': 8} | five_steps),
        ('ddp', '350M', 12, 1024, EAGER | {'one_of': 8}),
        ('ddp', '124M', 12, 1024, GRAPHS | {'one_of': 4}),
        ('ddp', '124M', 12, 1024, GRAPHS | {'one_of': 2}),
        ('ddp', '350M', 12, 1024, GRAPHS | {'one_of': 4}),
        ('ddp', '350M', 12, 1024, GRAPHS | {'one_of': 4} | one_step),
    ]


def tiny():
    cpu = {'cuda_graph': False, 'compile': False}
    return [
        ('ddp', 'tiny', 2, 64, cpu),
        ('triton', 'tiny', 2, 64, cpu | AC),
        ('fsdp', 'tiny', 2, 64, cpu),
        ('zero1', 'tiny', 2, 64, cpu),
        ('ddp+triton', 'tiny', 2, 64, cpu | {'one_of': 4}),
    ]


SETS = {  # for --set
    'first': configurations,
    'more': more_configurations,
    'timed': timed_configurations,
    'fp8': fp8_configurations,
    'alone': ranks_alone,
    'several': several_ranks,
    'peaks': peaks_to_explain,
    'rank_peaks': peaks_of_ranks,
    'tiny': tiny,
}
MAX_EVENTS = 1_000_000  # torch drops older ones; DDP's 11 iterations of warm-up make the most
STEPS = {'124M': 40, '350M': 20, '774M': 12, '1.5B': 8, 'tiny': 4}  # iterations to time, about 2 s


def memory_now():
    """
    Returns this process's memory as torch counts it, in bytes: peaks since the last reset, current values, and the
    number of allocations that succeeded only after cached blocks had been freed.
    """
    if not torch.cuda.is_available():
        return dict.fromkeys(('reserved', 'allocated', 'reserved_at_end', 'allocated_at_end', 'alloc_retries'))
    torch.cuda.synchronize()
    return {
        'reserved': torch.cuda.max_memory_reserved(),
        'allocated': torch.cuda.max_memory_allocated(),
        'reserved_at_end': torch.cuda.memory_reserved(),
        'allocated_at_end': torch.cuda.memory_allocated(),
        'alloc_retries': torch.cuda.memory_stats()['num_alloc_retries'],
    }


def watch_capture(graph_class, seen):
    """Makes graph_class store the peaks in the dict `seen` before its first capture, and reset them."""
    record = graph_class._capture

    def watched(self, *args):
        if not seen:
            seen.update(memory_now())
            torch.cuda.reset_peak_memory_stats()
        return record(self, *args)

    graph_class._capture = watched


def wait_for_turn(hardware, ready):
    """Makes the first call of hardware.now(), before the timed iterations, create the file `ready` and wait."""
    now = hardware.now

    def waits_once(device):
        hardware.now = now
        now(device)
        Path(ready).touch()
        input()
        return now(device)

    hardware.now = waits_once


def record_history():
    """Makes torch's allocator record what it does from now on. Only CUDA has this allocator."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))  # else CUDA's context would be made on GPU 0
        torch.cuda.memory._record_memory_history(context='alloc', stacks='python', max_entries=MAX_EVENTS)


def history():
    """
    Returns what torch's allocator did on this process's GPU: (action, address, bytes, stream, stack) each time. Empty
    on a CPU.
    """
    if not torch.cuda.is_available():
        return []
    facts = ('action', 'addr', 'size', 'stream', 'frames')
    trace = torch.cuda.memory._snapshot()['device_traces'][torch.cuda.current_device()]
    return [[entry.get(fact) for fact in facts] for entry in trace]


def growth(events):
    """
    Returns why torch reserved memory: the bytes per stream at the end, and each step of at least 256 MiB with the bytes
    reserved and live before it, and the functions that asked. events: of history(). history_complete: whether these are
    all events.
    """
    live, reserved, steps = {}, defaultdict(int), []
    for i, (action, address, size, stream, _) in enumerate(events):
        if action == 'alloc':
            live[address] = size
        elif action == 'free_completed':
            live.pop(address, None)
        elif action == 'segment_unmap':
            reserved[stream] -= size
        elif action == 'segment_map':
            if size >= 2**28:
                stack = next((stack for kind, *_, stack in events[i:] if kind == 'alloc'), None) or []
                functions = [f'{Path(f["filename"]).stem}:{f["line"]} {f["name"]}' for f in stack[:4]]
                before = {'reserved': sum(reserved.values()), 'live': sum(live.values())}
                steps.append({'bytes': size} | before | {'functions': functions})
            reserved[stream] += size
    complete = len(events) < MAX_EVENTS
    return {'reserved_by_stream': [*reserved.values()], 'growth': steps, 'history_complete': complete}


def measure(trainer, size, batch_size, block_size, options, ranks, dry_run, ready='', traced=False):
    """
    Runs one configuration in this process, which may be one of several ranks. Returns its memory in bytes and, if
    `ready` names a file to create before the timed iterations, their tokens/s. traced: adds growth().
    """
    if traced:
        record_history()
    options = {'gradient_accumulation_steps': 2} | options
    launched, times = {}, []
    if ranks > 1 or 'fsdp' in trainer or 'one_of' in options:
        # the result keeps the model alive until the memory has been read
        kept = run_trainer(trainer, size, batch_size, block_size, options, ranks, dry_run, launched)
    else:
        n_layer, n_head, n_embd = SIZES[size]
        flags = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, batch_size=batch_size, block_size=block_size)
        flags |= options | dict(real_data=False, warmup=3, steps=STEPS[size] if ready else 1)
        flags |= {'device': 'cpu'} if dry_run else {}
        flags |= {'model_dir': str(ROOT / 'phase2_triton')} if trainer == 'triton' else {}
        folder = ROOT / 'nanoGPT'
        sys.path[:0] = [flags.get('model_dir', str(folder)), str(folder)]
        import cuda_graph
        import hardware
        import model

        if ready:
            wait_for_turn(hardware, ready)
        build = model.GPT.__init__

        def build_on_gpu(self, config):  # drawing billions of weights takes a CPU a minute
            with torch.device('cpu' if dry_run else 'cuda'):
                build(self, config)

        model.GPT.__init__ = build_on_gpu
        watch_capture(cuda_graph.MicroStep, launched)
        sys.argv = [str(folder / 'bench.py'), *(f'--{key}={value}' for key, value in flags.items())]
        # bound to a name, which keeps the model alive until its memory has been read
        kept = runpy.run_path(sys.argv[0])
        times = kept['times'][len(kept['times']) // 2 :]
    after = memory_now()
    result = growth(history()) if traced else {}
    result |= {f'{key}_launched': launched[key] for key in ('reserved', 'allocated') if launched}
    result |= {f'{key}_captured': after[key] for key in ('reserved', 'allocated') if launched}
    if launched:
        after |= {key: max(after[key], launched[key]) for key in ('reserved', 'allocated')}
    if ready:
        tokens = batch_size * block_size * options['gradient_accumulation_steps']
        result['tokens_per_sec'] = spread([tokens / seconds for seconds in times])
    return after | result


def run_trainer(name, size, batch_size, block_size, options, ranks, dry_run, launched):
    """Runs some iterations in a process group of `ranks` ranks. Returns the trainer."""
    import torch.distributed as dist

    import trainer as shared  # adds the modules of FSDP and ZeRO-1 to the path
    from cuda_graph import WARMUP, WARMUP_DDP, MicroStep

    if ranks > 1:
        device, *_ = shared.start_ranks(dry_run)
    else:
        device, *_ = shared.hardware.resolve_auto('cpu' if dry_run else 'cuda', 'auto', 'auto', 'auto')
        os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
        store = dist.HashStore()
        dist.init_process_group('gloo' if dry_run else 'cpu:gloo,cuda:nccl', store=store, rank=0, world_size=1)
    options, kind = dict(options), name.split('+')[0]
    micro_steps, flags = options.pop('gradient_accumulation_steps'), {'compile': True, 'cuda_graph': False}
    flags |= {key: options.pop(key) for key in ('compile', 'cuda_graph') if key in options}
    fsdp = {key: options.pop(key) for key in list(options) if key.startswith('fsdp_')}
    one_of = options.pop('one_of', 0)
    shape = dict(zip(('n_layer', 'n_head', 'n_embd'), SIZES[size]))
    flags |= dict(batch_size=batch_size, block_size=block_size, fsdp=fsdp, init='fill')
    flags |= {'model': 'phase2_triton'} if 'triton' in name else {}
    watch_capture(MicroStep, launched)
    trainer = shared.Trainer(kind, shape | dict(vocab_size=50304), device, **flags, **options)
    if one_of:
        trainer.optimizer = OneOfRanks(trainer.optimizer, one_of)
    trainer.feed(shared.random_batch)
    for _ in range((WARMUP if kind == 'fsdp' or not flags['cuda_graph'] else WARMUP_DDP) + 2):
        trainer.step(micro_steps).item()
    return trainer


class OneOfRanks(torch.optim.Optimizer):
    """Steps AdamW on the share of one rank out of `ranks`: the first of the even pieces that ZeRO-1 cuts."""

    def __init__(self, optimizer, ranks):
        from zero1 import split

        super().__init__(optimizer.param_groups, optimizer.defaults)
        parameters = [p for group in self.param_groups for p in group['params']]
        self.pieces = [split(p, i, ranks)[0] for i, p in enumerate(parameters)]
        fused = {'fused': True} if optimizer.defaults.get('fused') else {}
        self.own = type(optimizer)([piece.shard for piece in self.pieces], lr=optimizer.defaults['lr'], **fused)

    @torch.no_grad()
    def step(self):
        for piece in self.pieces:
            piece.shard.grad = piece.param.grad.view(-1)[piece.start : piece.stop]
        self.own.found_inf = getattr(self, 'found_inf', None)
        self.own.step()
        self.own.zero_grad(set_to_none=True)


def results_of_ranks(result):
    """Returns every rank's result, on every rank. Collective."""
    import torch.distributed as dist

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, result)
    return everyone


def most_of_ranks(everyone):
    """
    Returns one result for those of all ranks: the largest number for each key, and growth() of the rank that reserved
    most, whose number is history_of_rank.
    """
    rank = max(range(len(everyone)), key=lambda rank: everyone[rank]['reserved'] or 0)
    most = dict(everyone[rank])
    for key, value in most.items():
        if isinstance(value, int) and key != 'history_complete':
            most[key] = max(result[key] for result in everyone)
    return most | ({'history_of_rank': rank} if 'growth' in most else {})


def estimate(row):
    """Returns a little more than the bytes that plan.py predicts, to decide how many processes share the GPU."""
    if row['size'] == 'tiny':
        return GIB
    return 1.05 * memory.memory(measured.memory_run(row, GPUS['h200']))['total'] + memory.CONTEXT


def context_bytes():
    """
    Returns the bytes of GPU memory that CUDA's context and libraries use outside torch's allocator, after a matmul and
    attention.
    """
    x = torch.randn(1024, 1024, device='cuda', dtype=torch.bfloat16)
    q = x.view(1, 8, 128, 1024)[..., :64].contiguous().requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    (x @ x).sum().item()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def child(arguments):
    spec = json.loads(arguments)
    os.chdir(tempfile.gettempdir())
    if spec == 'context':
        result = dict(context_bytes=context_bytes(), total_bytes=torch.cuda.get_device_properties(0).total_memory)
    else:
        result = measure(**spec)
        if spec['ranks'] > 1:
            result = most_of_ranks(results_of_ranks(result))
    if os.environ.get('RANK', '0') == '0':
        print('\nRESULT ' + json.dumps(result), flush=True)
    os._exit(0)  # destroying NCCL's graphs and the interpreter would take seconds


def timed(name, spec):
    """Returns whether the set of this name times the configuration. Only nanoGPT/bench.py can wait for its turn."""
    if name == 'fp8':
        return 'half_residual' in spec['options'] or (spec['trainer'], spec['batch_size']) == ('triton', 12)
    return name == 'timed' and spec['trainer'] in ('ddp', 'triton')


class Children:
    """Processes that run this file, several at a time."""

    def __init__(self, folder):
        self.folder, self.running = Path(folder), {}
        self.env = os.environ | {
            'TORCHINDUCTOR_CACHE_DIR': f'{folder}/inductor',
            'TRITON_CACHE_DIR': f'{folder}/triton',
            'TORCHINDUCTOR_COMPILE_THREADS': '4',
            'OMP_NUM_THREADS': '1',
            'PYTHONUNBUFFERED': '1',
            'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True',  # as hardware.resolve_auto() sets it
        }

    def start(self, key, spec):
        out = open(self.folder / f'{key}.out', 'w+')
        child, ranks = f'--child={json.dumps(spec)}', 1 if spec == 'context' else spec['ranks']
        process = subprocess.Popen(
            [sys.executable, __file__, child] if ranks == 1 else torchrun(ranks, __file__, child),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=self.env,
        )
        self.running[key] = (process, out, time.time())

    def finished(self):
        """Yields (key, result, seconds) for each process that has ended; result is {'error': lines} if it failed."""
        for key, (process, out, started) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[key]
            out.seek(0)
            text = out.read()
            result = [line[7:] for line in text.splitlines() if line.startswith('RESULT ')]
            lines = text.strip().splitlines()[-4:]
            yield key, json.loads(result[0]) if result else {'error': lines}, time.time() - started

    def take_turns(self):
        """Yields like finished(), after each process has had the GPU to itself, once all of them are ready for that."""
        if not all((self.folder / f'{key}.ready').exists() for key in self.running):
            return
        for key in list(self.running):
            if key in self.running:  # it may have failed meanwhile
                self.running[key][0].communicate(b'go\n')
            yield from self.finished()

    def end(self):
        for process, *_ in self.running.values():
            process.kill()
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=False, default='', help='JSON file')
    parser.add_argument('--seconds', type=float, default=225, help='kill processes that still run after this time')
    parser.add_argument('--at_a_time', type=int, default=8, help='processes that share the GPU')
    parser.add_argument('--gib', type=float, default=0, help='memory for all processes, on a GPU that others use too')
    parser.add_argument('--ranks', type=int, default=1, help='GPUs per configuration')
    parser.add_argument('--set', default='first', choices=[*SETS], help='configurations (default: first)')
    parser.add_argument('--history', action='store_true', help='state why torch reserved memory')
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--child', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit('bench_memory.py: needs a CUDA GPU; --dry-run tries it without')
    if (args.set in ('several', 'rank_peaks')) != (args.ranks > 1) and not args.dry_run:
        parser.error('--set=several and --set=rank_peaks need --ranks=2 or more, and the other sets run on one GPU')
    started = time.time()
    chosen = SETS['tiny' if args.dry_run else args.set]()
    wanted = [
        dict(trainer=t, size=s, batch_size=b, block_size=n, options=o, ranks=args.ranks) for t, s, b, n, o in chosen
    ]
    report = facts(cpu=args.dry_run) | {'rows': [], 'failed': [], 'not_run': []}
    with tempfile.TemporaryDirectory() as folder:
        children = Children(folder)
        if not args.dry_run and not args.gib:  # CUDA's context can be told on a GPU without other processes
            children.start('context', 'context')
            while 'context_bytes' not in report:
                for _, result, _ in children.finished():
                    report |= result
                time.sleep(0.2)
        capacity = args.gib * GIB or 0.93 * report.get('total_bytes', 1e12)
        pending, used = dict(enumerate(wanted)), {}
        while (pending or children.running) and time.time() - started < args.seconds:
            for key, spec in list(pending.items()):
                needs = estimate(spec)
                if len(children.running) < args.at_a_time and sum(used.values()) + needs <= capacity:
                    more = {'dry_run': args.dry_run}
                    if timed(args.set, spec):
                        more['ready'] = f'{folder}/{key}.ready'
                    elif args.history:
                        more['traced'] = True
                    children.start(key, spec | more)
                    used[key] = needs
                    del pending[key]
            for key, result, seconds in chain(
                children.finished(), children.take_turns() if args.set in ('timed', 'fp8') else ()
            ):
                del used[key]
                row = wanted[key] | result | {'seconds': round(seconds, 1)}
                report['failed' if 'error' in result else 'rows'].append(row)
                if args.out:
                    write_json(args.out, report)
                say(row, time.time() - started)
            time.sleep(0.1)
        report['not_run'] = [wanted[key] for key in (*children.running, *pending)]
        children.end()
    if args.out:
        write_json(args.out, report)
    print(f'{len(report["rows"])} measured, {len(report["failed"])} failed, {len(report["not_run"])} not run')
    return bool(args.dry_run and report['failed'])


def say(row, seconds):
    name = f'{row["ranks"]} × {row["trainer"]} {row["size"]} {row["batch_size"]}x{row["block_size"]} {row["options"]}'
    if 'error' in row:
        told = ' | '.join(row['error'])[-300:]
    elif row['reserved']:
        told = ' '.join(f'{key} {row[key] / GIB:.2f}' for key in ('reserved', 'allocated'))
        told += ''.join(
            f' {key} {row[key] / GIB:.2f}' for key in ('reserved_launched', 'reserved_captured') if key in row
        )
    else:
        told = 'ran'
    if 'tokens_per_sec' in row:
        told += ' tokens/s {median:,.0f} ({min:,.0f} to {max:,.0f}, {n})'.format(**row['tokens_per_sec'])
    print(f'[{seconds:.0f} s] {name}: {told}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
