"""
Measures the reserved GPU memory of a training step on one GPU, in one process per configuration. plan.py is fitted on
the result.

    python benchmarks/bench_memory.py --out=benchmarks/results/memory_h200.json --seconds=225
    python benchmarks/bench_memory.py --dry-run --out=memory.json  # tiny models on a CPU: only checks the script

DDP's model and the Triton model run in nanoGPT/bench.py without a process group, so gradients are not in buckets. FSDP
runs in a group of one rank (trainer.py): the shard is the whole model, and units are gathered as among several ranks.
Each process runs four iterations on random tokens, with expandable segments as in train.py. With CUDA graphs, the first
two iterations launch kernels and the third captures. The result states both peaks: reserved_launched before the first
capture, and reserved over the whole process.

As many processes as fit share the GPU: their memory does not depend on that, and speed is not measured. A configuration
for which no time is left is listed in `not_run`.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import GIB, ROOT, facts, write_json

SIZES = {  # n_layer, n_head, n_embd
    '124M': (12, 12, 768),
    '350M': (24, 16, 1024),
    '774M': (36, 20, 1280),
    '1.5B': (48, 25, 1600),
    'tiny': (2, 2, 64),
}
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


def tiny():
    cpu = {'cuda_graph': False, 'compile': False}
    return [('ddp', 'tiny', 2, 64, cpu), ('triton', 'tiny', 2, 64, cpu | AC), ('fsdp', 'tiny', 2, 64, cpu)]


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


def measure(trainer, size, batch_size, block_size, options, dry_run):
    """Runs one configuration in this process. Returns its memory in bytes."""
    options = {'gradient_accumulation_steps': 2} | options
    launched = {}
    if trainer == 'fsdp':
        measure_fsdp(size, batch_size, block_size, options, dry_run, launched)
    else:
        n_layer, n_head, n_embd = SIZES[size]
        flags = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, batch_size=batch_size, block_size=block_size)
        flags |= options | dict(real_data=False, warmup=3, steps=1)
        flags |= {'device': 'cpu'} if dry_run else {}
        flags |= {'model_dir': str(ROOT / 'phase2_triton')} if trainer == 'triton' else {}
        folder = ROOT / 'nanoGPT'
        sys.path[:0] = [flags.get('model_dir', str(folder)), str(folder)]
        import cuda_graph
        import model

        build = model.GPT.__init__

        def build_on_gpu(self, config):  # drawing billions of weights takes a CPU a minute
            with torch.device('cpu' if dry_run else 'cuda'):
                build(self, config)

        model.GPT.__init__ = build_on_gpu
        watch_capture(cuda_graph.MicroStep, launched)
        sys.argv = [str(folder / 'bench.py'), *(f'--{key}={value}' for key, value in flags.items())]
        # bound to a name, which keeps the model alive until its memory has been read
        kept = runpy.run_path(sys.argv[0])  # noqa: F841
    after = memory_now()
    result = {f'{key}_launched': launched[key] for key in ('reserved', 'allocated') if launched}
    result |= {f'{key}_captured': after[key] for key in ('reserved', 'allocated') if launched}
    if launched:
        after |= {key: max(after[key], launched[key]) for key in ('reserved', 'allocated')}
    return after | result


def measure_fsdp(size, batch_size, block_size, options, dry_run, launched):
    import torch.distributed as dist

    import trainer as shared  # adds FSDP's modules to the path
    from sharded_cuda_graph import ShardedMicroStep

    device, *_ = shared.hardware.resolve_auto('cpu' if dry_run else 'cuda', 'auto', 'auto', 'auto')
    os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    store = dist.HashStore()
    dist.init_process_group('gloo' if dry_run else 'cpu:gloo,cuda:nccl', store=store, rank=0, world_size=1)
    options = dict(options)
    micro_steps, flags = options.pop('gradient_accumulation_steps'), {'compile': True}
    flags |= {key: options.pop(key) for key in ('compile', 'cuda_graph') if key in options}
    fsdp = {key: options.pop(key) for key in list(options) if key.startswith('fsdp_')}
    shape = dict(zip(('n_layer', 'n_head', 'n_embd'), SIZES[size]))
    flags |= dict(batch_size=batch_size, block_size=block_size, fsdp=fsdp, init='fill')
    watch_capture(ShardedMicroStep, launched)
    trainer = shared.Trainer('fsdp', shape | dict(vocab_size=50304), device, **flags, **options)
    trainer.feed(shared.random_batch)
    for _ in range(4):
        trainer.step(micro_steps).item()


def estimate(trainer, size, batch_size, block_size, options):
    """Returns a rough upper bound in bytes, which decides how many processes share the GPU."""
    n_layer, _, n_embd = SIZES[size]
    parameters = 12 * n_layer * n_embd**2 + 50304 * n_embd
    kept = 10 if options.get('activation_checkpointing') else 60 if options.get('compile') is False else 46
    return 22 * parameters + 1.25 * batch_size * block_size * (kept * n_layer * n_embd + 10 * 50304) + GIB


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
    print('\nRESULT ' + json.dumps(result), flush=True)
    os._exit(0)  # destroying NCCL's graphs and the interpreter would take seconds


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
        process = subprocess.Popen(
            [sys.executable, __file__, f'--child={json.dumps(spec)}'],
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

    def end(self):
        for process, *_ in self.running.values():
            process.kill()
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=False, default='', help='JSON file')
    parser.add_argument('--seconds', type=float, default=225, help='kill processes that still run after this time')
    parser.add_argument('--at_a_time', type=int, default=8, help='processes that share the GPU')
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--child', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit('bench_memory.py: needs a CUDA GPU; --dry-run tries it without')
    started = time.time()
    wanted = [
        dict(trainer=t, size=s, batch_size=b, block_size=n, options=o)
        for t, s, b, n, o in (tiny() if args.dry_run else configurations())
    ]
    report = facts(cpu=args.dry_run) | {'rows': [], 'failed': [], 'not_run': []}
    with tempfile.TemporaryDirectory() as folder:
        children = Children(folder)
        if not args.dry_run:
            children.start('context', 'context')
            while 'context_bytes' not in report:
                for _, result, _ in children.finished():
                    report |= result
                time.sleep(0.2)
        capacity = 0.93 * report.get('total_bytes', 1e12)
        pending, used = dict(enumerate(wanted)), {}
        while (pending or children.running) and time.time() - started < args.seconds:
            for key, spec in list(pending.items()):
                needs = estimate(**spec)
                if len(children.running) < args.at_a_time and sum(used.values()) + needs <= capacity:
                    children.start(key, spec | {'dry_run': args.dry_run})
                    used[key] = needs
                    del pending[key]
            for key, result, seconds in children.finished():
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
    name = f'{row["trainer"]} {row["size"]} {row["batch_size"]}x{row["block_size"]} {row["options"]}'
    if 'error' in row:
        told = ' | '.join(row['error'])[-300:]
    elif row['reserved']:
        told = ' '.join(f'{key} {row[key] / GIB:.2f}' for key in ('reserved', 'allocated'))
        told += ''.join(
            f' {key} {row[key] / GIB:.2f}' for key in ('reserved_launched', 'reserved_captured') if key in row
        )
    else:
        told = 'ran'
    print(f'[{seconds:.0f} s] {name}: {told}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
