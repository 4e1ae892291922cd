"""
What is special to phase 3 (FSDP), on all GPUs of one machine. Its speed and memory beside the other phases: bench_trainers.py.

    python benchmarks/bench_fsdp.py variants --out=benchmarks/results/fsdp_variants.json       # what each choice is worth at 124M: 3 minutes
    python benchmarks/bench_fsdp.py checkpoint --out=benchmarks/results/fsdp_checkpoint.json   # saves at 1.5B, both formats: 3 minutes
    python benchmarks/bench_fsdp.py curves --out=benchmarks/results/fsdp_curves.json           # 200 steps on real text: 2 minutes
    python benchmarks/bench_fsdp.py largest --only=ddp,zero1,fsdp,fsdp+ac --out=...            # largest model, by trying: 6 to 7 minutes
    python benchmarks/bench_fsdp.py largest --only=fsdp+ac+offload --out=...                   # 8 to 10 minutes
    python benchmarks/bench_fsdp.py MODE --dry-run                                             # tiny, 2 processes, on a CPU

On a single GPU it works too, in a group of one rank: FSDP without the sending.

It starts its own processes (torchrun), or runs in those that torchrun has started. The code under test is that of the phases:
sharding.py, sharded_checkpoint.py and zero1.py; a step is that of their train.py, which reads the loss after each, on a GPU with CUDA
graphs in `variants` and `checkpoint` and without elsewhere. Memory is that of rank 0, as torch allocates it: at rest after a step, and the
peak. `x of 16N/k`: what rests, against 16 bytes for each of N parameters over k ranks, of which 4 are for gradients: DDP's buckets and CUDA
graphs keep them, FSDP without graphs frees them.
"""

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from common import GIB, ROOT, facts, memory, reset_peak, torchrun, write_json

sys.path[:0] = [str(ROOT / 'phase3_fsdp'), str(ROOT / 'phase1_zero1')]  # what both have is the same in both
import hardware
import sharding
from cuda_graph import use_side_stream
from distributed import join_ranks
from errors import out_of_memory
from model import GPT, GPTConfig
from sharded_checkpoint import ShardedSaver, gather_full
from sharded_cuda_graph import ShardedMicroStep
from step_guard import StepGuard

FLAGS = dict(fsdp_min_num_params=1_000_000, fsdp_shard_size=0, fsdp_reshard='auto', fsdp_cpu_offload=False)
# n_layer, n_head, n_embd, batch_size, block_size
SIZES = {'124M': (12, 12, 768, 12, 1024), '1.5B': (48, 25, 1600, 8, 1024), 'tiny': (3, 2, 64, 2, 32)}
VARIANTS = {  # each changes one thing of the default
    'default': {},
    'without CUDA graphs': dict(cuda_graph=False),
    'reshard after forward': dict(fsdp_reshard=True),
    'units of 2 blocks': dict(fsdp_min_num_params=14_000_000),
    'units of 6 blocks': dict(fsdp_min_num_params=42_000_000),
    'one unit, compiled as one': dict(fsdp_min_num_params=1_000_000_000),
    'head and loss not compiled': dict(eager_head=True),
    'AdamW over DTensors': dict(dtensor_adamw=True),
    'default again': {},
}
LARGEST = {  # trainer, flags, activation checkpointing, width, seconds for a try
    'ddp': ('ddp', {}, False, 6144, 150),
    'zero1': ('zero1', {}, False, 6144, 150),
    'fsdp': ('fsdp', dict(fsdp_reshard=True), False, 6144, 150),
    'fsdp+ac': ('fsdp', dict(fsdp_reshard=True), True, 6144, 150),
    # torch rounds pinned tensors up to powers of two, which at 6144 would take 1.6 times their size; and pinning takes long
    'fsdp+ac+offload': ('fsdp', dict(fsdp_reshard=True, fsdp_cpu_offload=True), True, 8192, 300),
}


class Trainer:
    """A model with its optimizer, sharded or not, and the training step of train.py."""

    def __init__(
        self, kind, size, device, compile, flags=None, seed=1337, exact_init=True, vocab_size=50304, **options
    ):
        n_layer, n_head, n_embd, self.batch_size, self.block_size = size
        self.kind, self.device, self.flags = kind, device, {**FLAGS, **(flags or {})}
        device_type = device.split(':')[0]
        cuda_graph = self.flags.pop('cuda_graph', False) and device_type == 'cuda'
        if cuda_graph:
            use_side_stream(device)
        eager_head, dtensor_adamw = self.flags.pop('eager_head', False), self.flags.pop('dtensor_adamw', False)
        rank = dist.get_rank()
        dtype = 'bfloat16' if device_type == 'cuda' else 'float32'
        self.context = hardware.autocast(device, dtype)
        self.base = memory(device)
        reset_peak(device)
        torch.manual_seed(seed + rank)
        config = GPTConfig(
            vocab_size=vocab_size,
            block_size=self.block_size,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            bias=False,
            **options,
        )
        started = time.perf_counter()
        with redirect_stdout(None):
            if kind == 'fsdp':
                self.context = nullcontext()
                with sharding.OnMeta() as recipe:
                    model = GPT(config)
                if eager_head and compile:
                    for block in model.transformer.h:
                        block.forward = torch.compile(block.forward)
                sharding.shard(
                    model,
                    dict(device=device, dtype=dtype, compile=compile and not eager_head, **self.flags),
                    recipe if exact_init else None,
                )
                if not exact_init:
                    for p in model.parameters():
                        draw(p.to_local())
                optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device_type)
                optimizer = optimizer if dtensor_adamw else sharding.ShardedAdamW(optimizer)
                self.raw_model = self.model = model
            else:
                with nullcontext() if exact_init else torch.device('meta'):
                    model = GPT(config)
                if not exact_init:
                    model.to_empty(device=device)
                    model.transformer.wte.weight = model.lm_head.weight  # to_empty() parts them
                    for p in model.parameters():
                        draw(p)
                self.raw_model = model.to(device)
                optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device_type)
                if kind == 'zero1':
                    from zero1 import Zero1Optimizer

                    optimizer = Zero1Optimizer(optimizer)
                model = torch.compile(model) if compile else model
                self.model = DDP(
                    model, device_ids=[device] if device_type == 'cuda' else None, gradient_as_bucket_view=True
                )
        self.optimizer, self.step_guard = optimizer, StepGuard(device, torch.amp.GradScaler(device_type, enabled=False))
        self.sharded = isinstance(optimizer, sharding.ShardedAdamW)
        self.graph = ShardedMicroStep(self.forward_backward, model, capture=True) if cuda_graph else None
        self.micro_steps = None
        self.num_params = sum(p.numel() for p in model.parameters())
        self.init_seconds = time.perf_counter() - started

    def forward_backward(self, X, Y):
        with self.context:
            loss = self.model(X, Y)[1] / self.micro_steps
        loss.backward()
        return loss.detach()

    def step(self, get_batch, micro_steps):
        """One training step. Returns its mean loss on this rank, a float: the CPU waits for the GPU, as where train.py logs."""
        if self.graph and micro_steps != self.micro_steps:
            self.graph.release()  # the factor of the loss is recorded
        self.micro_steps = micro_steps
        loss_sum = torch.zeros((), device=self.device)
        for micro_step in range(micro_steps):
            last = micro_step == micro_steps - 1
            if self.kind == 'fsdp':
                sharding.set_last_micro_step(self.model, last)
            else:
                self.model.require_backward_grad_sync = last
            loss_sum += (self.graph or self.forward_backward)(*get_batch(self))
        if self.sharded:
            self.optimizer.collect_gradients()
            grad_norm = self.optimizer.clip_grad_norm_(1.0)
        else:
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            grad_norm = grad_norm.full_tensor() if self.kind == 'fsdp' else grad_norm
        self.step_guard.step(self.optimizer, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(loss_sum)
        return loss_sum.item() / dist.get_world_size()

    def tokens_per_sec(self, micro_steps, steps):
        """Of each of a number of steps."""
        result = []
        for _ in range(steps):
            started = time.perf_counter()
            self.step(random_batch, micro_steps)
            result.append(
                self.batch_size
                * self.block_size
                * micro_steps
                * dist.get_world_size()
                / (time.perf_counter() - started)
            )
        return result


@torch.no_grad()
def draw(p):
    """Random weights, the same million again and again: a CPU would take a minute for billions of them."""
    some = torch.randn(2**20, device=p.device) * 0.02
    for part in p.view(-1).split(2**20):
        part.copy_(some[: len(part)])


def free(*trainers):
    for trainer in trainers:
        trainer.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if device.startswith('cuda') else x


def random_batch(trainer):
    rows = torch.randint(50257, (trainer.batch_size, trainer.block_size + 1))
    return to_device(rows[:, :-1].contiguous(), trainer.device), to_device(rows[:, 1:].contiguous(), trainer.device)


def warm_up(trainer, micro_steps, steps=4):
    """Compiles, and measures memory. Returns seconds of the first step, and bytes at rest and at the peak, without what was there before."""
    started = time.perf_counter()
    trainer.step(random_batch, 1)
    first = time.perf_counter() - started
    reset_peak(trainer.device)
    for _ in range(steps):
        trainer.step(random_batch, micro_steps)
    if trainer.device == 'cpu':
        return first, None, None
    torch.cuda.synchronize()
    return first, memory(trainer.device) - trainer.base, memory(trainer.device, peak=True) - trainer.base


def percentiles(values):
    values = sorted(values)
    return dict(
        median=statistics.median(values),
        p10=values[len(values) // 10],
        p90=values[-1 - len(values) // 10],
        n=len(values),
    )


def record(name, trainer, micro_steps, speeds, first, rest, peak):
    ideal = 16 * trainer.num_params / dist.get_world_size()
    return dict(
        name=name,
        kind=trainer.kind,
        flags=trainer.flags if trainer.kind == 'fsdp' else {},
        parameters=trainer.num_params,
        micro_steps=micro_steps,
        batch_size=trainer.batch_size,
        block_size=trainer.block_size,
        tokens_per_sec=percentiles(speeds),
        first_step_seconds=first,
        init_seconds=trainer.init_seconds,
        rest_bytes=rest,
        peak_bytes=peak,
        rest_of_ideal=rest and rest / ideal,
    )


def variants(args, device, results):
    """What each choice is worth, at 124M."""
    for name in args.only.split(',') if args.only else VARIANTS:
        torch._dynamo.reset()
        trainer = Trainer(
            'fsdp',
            SIZES['tiny' if args.dry_run else '124M'],
            device,
            not args.dry_run,
            dict(cuda_graph=True) | VARIANTS[name],
        )
        for micro_steps, n in {1: 30, 10: 8}.items() if not args.dry_run else {1: 2, 3: 1}.items():
            warm = warm_up(trainer, micro_steps)
            results.append(record(name, trainer, micro_steps, trainer.tokens_per_sec(micro_steps, n), *warm))
        keep(args, results)
        say(f'{name}: {results[-1]["tokens_per_sec"]["median"]:,.0f} tokens/s')
        free(trainer)


def checkpoint(args, device, results):
    """How long a save at 1.5B holds up the training, and takes."""
    trainer = Trainer(
        'fsdp',
        SIZES['tiny' if args.dry_run else '1.5B'],
        device,
        not args.dry_run,
        dict(cuda_graph=True),
        exact_init=False,
    )

    def timed_step(micro_steps):
        started = time.perf_counter()
        trainer.step(random_batch, micro_steps)
        return time.perf_counter() - started

    folder = [tempfile.mkdtemp(dir=args.tmp) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    model, optimizer = trainer.raw_model, trainer.optimizer
    started = time.perf_counter()
    saver, saved = ShardedSaver(folder[0], model, optimizer), []
    result = dict(
        name='sharded', parameters=trainer.num_params, prepare_seconds=time.perf_counter() - started, steps=[]
    )
    for micro_steps in (1, 10):
        [timed_step(micro_steps) for _ in range(4)]  # compiles and records
        before = [timed_step(micro_steps) for _ in range(5)]
        state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iter_num': micro_steps}
        saver.save(state, model, best=False, required=False, on_saved=lambda iter_num, **facts: saved.append(facts))
        during = []  # the steps of all ranks, as long as rank 0 saves
        going_on = torch.ones(1, device=device)
        while going_on.item():
            during.append(timed_step(micro_steps))
            going_on.fill_(dist.get_rank() == 0 and not saver.running[0].done())
            dist.all_reduce(going_on)
        result['steps'].append(
            dict(micro_steps=micro_steps, seconds=statistics.median(before), seconds_while_saving=during)
        )
        saver.wait()
    result['saves'] = [{k: v for k, v in facts.items() if k != 'path'} for facts in saved]
    results.append(result)
    keep(args, results)
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iter_num': 2}
    started = time.perf_counter()
    full = gather_full(state, model)
    gathered = time.perf_counter() - started
    if dist.get_rank() == 0:
        torch.save(full, f'{folder[0]}/ckpt.pt')
        size = os.path.getsize(f'{folder[0]}/ckpt.pt')
        shutil.rmtree(folder[0])
        results.append(dict(name='full', gather_seconds=gathered, seconds=time.perf_counter() - started, bytes=size))
    del model, optimizer, state, saver
    free(trainer)  # NCCL would wait for its graphs


def curves(args, device, results):
    """The loss curves of FSDP and DDP from the same seed on the same batches, and of DDP from other seeds, on the sources of Python."""
    text = b''.join(p.read_bytes() for p in sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py')))
    data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    size, steps = ((6, 6, 384, 8, 256), 200) if not args.dry_run else (SIZES['tiny'], 6)

    def batch(trainer):
        at = torch.randint(len(data) - size[4] - 1, (size[3],))
        rows = torch.stack([data[i : i + size[4] + 1] for i in at])
        return to_device(rows[:, :-1].contiguous(), device), to_device(rows[:, 1:].contiguous(), device)

    for kind, seed in (('ddp', 1337), ('fsdp', 1337), ('ddp', 1), ('ddp', 2), ('fsdp', 1)):
        torch._dynamo.reset()
        trainer = Trainer(kind, size, device, not args.dry_run, seed=seed, vocab_size=256)
        for group in trainer.optimizer.param_groups:
            group['lr'] = 1e-3
        results.append(dict(name=f'{kind}, seed {seed}', losses=[trainer.step(batch, 1) for _ in range(steps)]))
        free(trainer)
        keep(args, results)
        say(f'{results[-1]["name"]}: {results[-1]["losses"][-1]:.4f}')
    second = {r['name']: statistics.mean(r['losses'][steps // 2 :]) for r in results}  # the mean over the second half
    seeds = [second[f'ddp, seed {s}'] for s in (1337, 1, 2)]
    differences = [second[f'fsdp, seed {s}'] - second[f'ddp, seed {s}'] for s in (1337, 1)]
    results.append(
        dict(
            name='summary',
            mean_of_second_half=second,
            seed_to_seed_std=statistics.stdev(seeds),
            fsdp_minus_ddp=differences,
        )
    )


def attempt(args, device, results):
    """One try of `largest`: four steps, of which two are timed, of a model of args.layers layers. If it does not fit, it says so in args.out."""
    name, layers = args.attempt.rsplit(':', 1)
    kind, flags, checkpointing, width, _ = LARGEST[name]
    width = 64 if args.dry_run else width
    size = (int(layers), width // 128 or 2, width, 1, 1024 if not args.dry_run else 32)
    try:
        trainer = Trainer(kind, size, device, False, flags, exact_init=False, activation_checkpointing=checkpointing)
        warm = warm_up(trainer, 1, steps=1)
        results.append(
            record(name, trainer, 1, trainer.tokens_per_sec(1, 2), *warm) | dict(n_layer=int(layers), n_embd=width)
        )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        Path(args.out).write_text(json.dumps({'error': 'out of memory'}))  # by any rank: the others wait for it
        os._exit(3)


def largest(args, processes):
    """
    For each trainer the largest model that trains, one sequence of 1024 tokens a GPU: models of width 6144 with more and more
    layers (453M parameters each; with offload 8192 and 805M), every try in processes of its own, first where two small ones say
    that the memory ends.
    """
    attempts = {}  # {trainer: {number of layers: what was measured}}
    for name in args.only.split(',') if args.only else LARGEST:
        tried = attempts[name] = {}

        def fits(layers):
            if layers not in tried:
                started = time.time()
                tried[layers] = run_attempt(args, processes, name, layers)
                write(args, best_of(attempts), processes, tried=attempts)
                print(
                    f'{name}, {layers} layers: {tried[layers].get("error", "trains")}, {time.time() - started:.0f} s',
                    flush=True,
                )
            error = tried[layers].get('error')
            if error not in (None, 'out of memory'):  # this says nothing about memory, and ends the search
                raise ChildProcessError
            return None if error else tried[layers]

        with suppress(ChildProcessError):
            search(args, name, fits, tried)
    return best_of(attempts)


def best_of(attempts):
    """The largest of each trainer that trains, with the number of layers that is too many; None where nothing larger was tried."""
    results = []
    for tried in attempts.values():
        best = max((n for n, r in tried.items() if 'error' not in r), default=None)
        failed = [n for n, r in tried.items() if r.get('error') == 'out of memory' and n > (best or 0)]
        if best:
            results.append(tried[best] | dict(smallest_that_does_not_fit=min(failed, default=None)))
    return results


def run_attempt(args, processes, name, layers):
    """What was measured, or {'error': 'out of memory'}, or another error, of which the last lines of stderr are shown."""
    with tempfile.TemporaryDirectory() as folder:
        out, stderr = Path(folder, 'out.json'), Path(folder, 'stderr')
        with stderr.open('w') as file:
            run = launch(
                processes,
                ['largest', f'--attempt={name}:{layers}', f'--out={out}', *['--dry-run'] * args.dry_run],
                LARGEST[name][-1],
                file,
            )
        if out.exists():
            result = json.loads(out.read_text())
            return result if 'error' in result else result['results'][0]
        lines = stderr.read_text(errors='replace').splitlines()
        if run != 'timeout' and any(
            'Signal 9 (SIGKILL) received' in line for line in lines
        ):  # so Linux ends a process where CPU memory is full
            return {'error': 'out of memory'}
        print('\n'.join(lines[-30:]), file=sys.stderr, flush=True)
        return {'error': f'ended with {run}'}


def search(args, name, fits, tried):
    """Calls fits(layers) for the numbers of layers worth trying."""
    first, second = fits(4), fits(8)
    if args.dry_run:
        return
    guess = 9
    if first and second:
        total = torch.cuda.get_device_properties(0).total_memory * 0.96  # the rest is CUDA's and NCCL's
        slope = (second['peak_bytes'] - first['peak_bytes']) / 4
        guess = 4 + int((total - first['peak_bytes']) / slope)
        if 'offload' in name:  # bounded by the CPU's memory: parameters and gradients, pinned, and AdamW's two
            guess = int(0.9 * cpu_memory() / (17 * (second['parameters'] - first['parameters']) / 4))
    step = max(1, guess // (16 if 'offload' in name else 25))  # tries with offload take minutes
    tries = 0
    while not fits(guess) and guess > 8 and tries < 3:
        guess, tries = guess - step, tries + 1
    while fits(guess) and guess + step not in tried and tries < 2:
        guess, tries = guess + step, tries + 1
        fits(guess)


def cpu_memory():
    """Bytes of the machine, or of the container if that has fewer."""
    limit = Path('/sys/fs/cgroup/memory.max')
    limit = limit.read_text().strip() if limit.exists() else 'max'
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return min(total, int(limit)) if limit.isdigit() else total


def launch(processes, arguments, timeout, stderr=None):
    """Runs this file under torchrun with the arguments. Returns the exit status, or 'timeout'."""
    env = {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
    run = subprocess.Popen(torchrun(processes, __file__, *arguments), env=env, stderr=stderr)
    try:
        return run.wait(timeout)
    except subprocess.TimeoutExpired:
        return 'timeout'
    finally:
        run.terminate()  # if it has not ended: torchrun then ends the ranks, which are in sessions of their own and would keep GPU memory
        run.wait()


def say(text):
    if dist.get_rank() == 0:
        print(f'[{time.perf_counter() - STARTED:.0f} s] {text}', flush=True)


def write(args, results, processes, **more):
    """The results so far, to the file args.out."""
    if args.out:
        write_json(
            args.out, facts(cpu=args.dry_run) | dict(mode=args.mode, processes=processes, results=results, **more)
        )


def keep(args, results):
    """What is measured is written at once: a call that is cut short leaves it."""
    if dist.get_rank() == 0:
        write(args, results, dist.get_world_size())


def table(args, results, processes):
    print(f'\n{args.mode}: {processes} x {facts(cpu=args.dry_run)["device"]}, torch {torch.__version__}')
    if args.mode in ('checkpoint', 'curves'):
        for r in results:
            print({k: v for k, v in r.items() if k != 'losses'})
        return
    base = {r['micro_steps']: r['tokens_per_sec']['median'] for r in reversed(results)}  # the first one's
    columns = [
        ('', 28),
        ('parameters', 15),
        ('micro-steps', 11),
        ('tokens/s', 10),
        ('p10', 10),
        ('p90', 10),
        ('% of first', 10),
        ('rest GiB', 9),
        ('of 16N/k', 9),
        ('peak GiB', 9),
    ]
    print(' '.join(f'{name:>{width}}' for name, width in columns))
    for r in results:
        s, rest, peak = r['tokens_per_sec'], r['rest_bytes'], r['peak_bytes']
        of_ideal = f'{r["rest_of_ideal"]:.3f}' if rest else '-'
        cells = [
            r['name'],
            f'{r["parameters"]:,}',
            r['micro_steps'],
            f'{s["median"]:,.0f}',
            f'{s["p10"]:,.0f}',
            f'{s["p90"]:,.0f}',
            f'{100 * s["median"] / base[r["micro_steps"]]:.1f}',
            f'{rest / GIB:.3f}' if rest else '-',
            of_ideal,
            f'{peak / GIB:.2f}' if peak else '-',
        ]
        print(' '.join(f'{cell:>{width}}' for cell, (_, width) in zip(cells, columns)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', choices=['variants', 'checkpoint', 'curves', 'largest'])
    parser.add_argument('--out', default='', help='JSON file')
    parser.add_argument('--only', default='', help='variants, or trainers of largest, with commas between')
    parser.add_argument('--tmp', default=None, help='folder for the checkpoints of mode checkpoint')
    parser.add_argument('--attempt', default='', help=argparse.SUPPRESS)
    parser.add_argument('--dry-run', action='store_true')
    args = parser.parse_args()
    known = dict(variants=VARIANTS, largest=LARGEST).get(args.mode, {})
    if unknown := set(filter(None, args.only.split(','))) - set(known):
        parser.error(f'--only: {", ".join(unknown)}; known are {", ".join(known)}')
    processes = int(os.environ.get('WORLD_SIZE', 0)) or (2 if args.dry_run else torch.cuda.device_count())
    if not processes:
        sys.exit('bench_fsdp.py: needs a CUDA GPU; --dry-run tries it without')
    if 'RANK' not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started ends, too
    if args.mode == 'largest' and not args.attempt:
        table(args, largest(args, processes), processes)
        return
    if 'RANK' not in os.environ:
        sys.exit(launch(processes, sys.argv[1:], 560))
    device, *_, backend = hardware.resolve_auto('cpu' if args.dry_run else 'cuda', 'auto', 'auto', 'auto')
    rank, world_size = join_ranks(backend, 600)
    if world_size == 1:
        dist.init_process_group('gloo' if args.dry_run else 'cpu:gloo,cuda:nccl')
    results, measure = [], dict(variants=variants, checkpoint=checkpoint, curves=curves).get(args.mode)
    (attempt if args.attempt else measure)(args, device, results)
    keep(args, results)
    if rank == 0 and not args.attempt:
        table(args, results, world_size)
    dist.barrier()  # gloo may abort where a peer is gone
    dist.destroy_process_group()


STARTED = time.perf_counter()
if __name__ == '__main__':
    main()
