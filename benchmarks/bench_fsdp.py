"""
Measures FSDP on all GPUs of one machine. bench_trainers.py compares its speed and memory with the other trainers'.

    python benchmarks/bench_fsdp.py variants --out=...                               # single choices at 124M: 3 minutes
    python benchmarks/bench_fsdp.py checkpoint --out=...                             # saves at 1.5B: 3 minutes
    python benchmarks/bench_fsdp.py curves --out=...                                 # 200 steps on text: 2 minutes
    python benchmarks/bench_fsdp.py largest --only=ddp,zero1,fsdp,fsdp+ac --out=...  # largest model: 6 to 7 minutes
    python benchmarks/bench_fsdp.py largest --only=fsdp+ac+offload --out=...         # 8 to 10 minutes
    python benchmarks/bench_fsdp.py MODE --dry-run                                   # tiny, 2 processes, on a CPU

On a single GPU, it runs in a group of one rank: FSDP without communication.

The script starts its own processes with torchrun, or runs in those that torchrun has started. A step is train.py's (see
trainer.py), and its loss is read each time; `variants` and `checkpoint` use CUDA graphs on a GPU. Memory is what torch
allocates on rank 0: at rest after a step, and at the peak. rest_of_ideal is the memory at rest divided by 16 bytes for
each of N / k parameters, for k ranks. 4 of these bytes are for gradients: DDP's buckets and CUDA graphs keep them, FSDP
without graphs frees them.
"""

import argparse
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
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import facts, torchrun, write_json
from tables import cite, commit_of, gib, load, machine_of, markdown, number, percent, printed, table, with_spread
from trainer import SIZES, Trainer, batches_of, random_batch, start_ranks

BATCHES = {'124M': (12, 1024), '1.5B': (8, 1024), 'tiny': (2, 32)}  # batch_size, block_size
VARIANTS = {  # each differs from the default in one option
    'default': {},
    'without CUDA graphs': dict(cuda_graph=False),
    'reshard after forward': dict(fsdp=dict(fsdp_reshard=True)),
    'units of 2 blocks': dict(fsdp=dict(fsdp_min_num_params=14_000_000)),
    'units of 6 blocks': dict(fsdp=dict(fsdp_min_num_params=42_000_000)),
    'one unit, compiled as one': dict(fsdp=dict(fsdp_min_num_params=1_000_000_000)),
    'head and loss not compiled': dict(compile='blocks'),
    'AdamW over DTensors': dict(dtensor_adamw=True),
    'default again': {},
}
LARGEST = {  # name: (trainer, flags, activation checkpointing, width, seconds that a try may take)
    'ddp': ('ddp', {}, False, 6144, 150),
    'zero1': ('zero1', {}, False, 6144, 150),
    'fsdp': ('fsdp', dict(fsdp_reshard=True), False, 6144, 150),
    'fsdp+ac': ('fsdp', dict(fsdp_reshard=True), True, 6144, 150),
    # torch rounds pinned tensors up to powers of two, at width 6144 to 1.6 times their size; pinning takes long
    'fsdp+ac+offload': ('fsdp', dict(fsdp_reshard=True, fsdp_cpu_offload=True), True, 8192, 300),
}


def percentiles(values):
    values = sorted(values)
    return dict(
        median=statistics.median(values),
        p10=values[len(values) // 10],
        p90=values[-1 - len(values) // 10],
        n=len(values),
    )


def record(name, trainer, micro_steps, seconds, first, rest, peak):
    ideal = 16 * trainer.parameters / dist.get_world_size()
    return dict(
        name=name,
        kind=trainer.kind,
        flags=trainer.fsdp,
        parameters=trainer.parameters,
        micro_steps=micro_steps,
        batch_size=trainer.batch_size,
        block_size=trainer.block_size,
        tokens_per_sec=percentiles([trainer.tokens(micro_steps) / s for s in seconds]),
        first_step_seconds=first,
        init_seconds=trainer.init_seconds,
        rest_bytes=rest,
        peak_bytes=peak,
        rest_of_ideal=rest and rest / ideal,
    )


def make(size, device, dry_run, **options):
    """Returns an FSDP Trainer of this size (dry_run: tiny), fed with random tokens."""
    size = 'tiny' if dry_run else size
    batch_size, block_size = BATCHES[size]
    options = dict(compile=not dry_run, cuda_graph=not dry_run) | options
    if dry_run:
        options |= dict(compile=False, cuda_graph=False)
    trainer = Trainer('fsdp', SIZES[size], device, batch_size=batch_size, block_size=block_size, **options)
    trainer.feed(random_batch)
    return trainer


def variants(args, device, results):
    """Measures speed and memory of each variant at 124M."""
    for name in args.only.split(',') if args.only else VARIANTS:
        options = dict(VARIANTS[name])
        dtensor_adamw = options.pop('dtensor_adamw', False)
        trainer = make('124M', device, args.dry_run, **options)
        if dtensor_adamw:
            trainer.set_optimizer('adamw')
        for micro_steps, n in {1: 30, 10: 8}.items() if not args.dry_run else {1: 2, 3: 1}.items():
            warm = trainer.warm_up(micro_steps)
            results.append(record(name, trainer, micro_steps, trainer.timed_steps(micro_steps, n), *warm))
        keep(args, results)
        say(f'{name}: {results[-1]["tokens_per_sec"]["median"]:,.0f} tokens/s')
        trainer.free()


def checkpoint(args, device, results):
    """Measures how long a save at 1.5B takes, and for how long it delays training."""
    from sharded_saver import ShardedSaver, gather_full

    trainer = make('1.5B', device, args.dry_run, init='fill')
    folder = [tempfile.mkdtemp(dir=args.tmp) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    model, optimizer = trainer.raw_model, trainer.optimizer
    started, saved = time.perf_counter(), []
    saver = ShardedSaver(folder[0], model, optimizer, lambda iter_num, **written: saved.append(written))
    prepared = time.perf_counter() - started
    result = dict(name='sharded', parameters=trainer.parameters, prepare_seconds=prepared, steps=[])
    for micro_steps in (1, 10):
        trainer.timed_steps(micro_steps, 4)  # compiles and captures
        before = trainer.timed_steps(micro_steps, 5)
        state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iter_num': micro_steps}
        saver.save(state, model, best=False, required=False)
        during = []  # seconds of the steps during the save; every rank steps as long as rank 0 saves
        saving = torch.ones(1, device=device)
        while saving.item():
            during += trainer.timed_steps(micro_steps, 1)
            saving.fill_(dist.get_rank() == 0 and not saver.running[0].done())
            dist.all_reduce(saving)
        usual = statistics.median(before)
        result['steps'].append(dict(micro_steps=micro_steps, seconds=usual, seconds_while_saving=during))
        saver.wait()
    result['saves'] = [{k: v for k, v in written.items() if k != 'path'} for written in saved]
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
    trainer.free()  # otherwise destroying the process group would wait for its CUDA graphs


def curves(args, device, results):
    """
    Records loss curves on Python's sources: FSDP and DDP with the same seed on the same batches, and DDP with other
    seeds.
    """
    text = b''.join(p.read_bytes() for p in sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py')))
    next_batch = batches_of(np.frombuffer(text, dtype=np.uint8))
    shape, batch_size, block_size, steps = dict(n_layer=6, n_head=6, n_embd=384), 8, 256, 200
    if args.dry_run:
        shape, (batch_size, block_size), steps = SIZES['tiny'], BATCHES['tiny'], 6
    for kind, seed in (('ddp', 1337), ('fsdp', 1337), ('ddp', 1), ('ddp', 2), ('fsdp', 1)):
        options = dict(batch_size=batch_size, block_size=block_size, compile=not args.dry_run, seed=seed)
        trainer = Trainer(kind, shape | dict(vocab_size=256), device, **options)
        trainer.feed(next_batch)
        for group in trainer.optimizer.param_groups:
            group['lr'] = 1e-3
        results.append(dict(name=f'{kind}, seed {seed}', losses=[trainer.step().item() for _ in range(steps)]))
        trainer.free()
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
    """
    Tries one model for `largest`: runs four steps and times two of them. If the model does not fit, writes an error to
    args.out.
    """
    from errors import out_of_memory

    name, layers = args.attempt.rsplit(':', 1)
    kind, flags, checkpointing, width, _ = LARGEST[name]
    width = 64 if args.dry_run else width
    shape = dict(n_layer=int(layers), n_head=width // 128 or 2, n_embd=width, activation_checkpointing=checkpointing)
    options = dict(batch_size=1, block_size=32 if args.dry_run else 1024, compile=False, init='fill', fsdp=flags)
    try:
        trainer = Trainer(kind, shape, device, **options)
        trainer.feed(random_batch)
        warm = trainer.warm_up(1, steps=1)
        row = record(name, trainer, 1, trainer.timed_steps(1, 2), *warm)
        results.append(row | dict(n_layer=int(layers), n_embd=width))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        Path(args.out).write_text(json.dumps({'error': 'out of memory'}))  # any rank may write it: the others hang
        os._exit(3)


def largest(args, processes):
    """
    Finds, for each trainer, the largest model that trains with one sequence of 1024 tokens per GPU. Models have width
    6144 and 453M parameters per layer; with offload, width 8192 and 805M. Every try has processes of its own. The first
    large one has the size that fills the memory according to two small models.
    """
    attempts = {}  # {trainer: {number of layers: result of the try}}
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
            if error not in (None, 'out of memory'):  # says nothing about memory, so the search ends
                raise ChildProcessError
            return None if error else tried[layers]

        with suppress(ChildProcessError):
            search(args, name, fits, tried)
    return best_of(attempts)


def best_of(attempts):
    """
    Returns, for each trainer, the largest model that trained. smallest_that_does_not_fit: layers of the smallest larger
    model that ran out of memory, or None if none was tried.
    """
    results = []
    for tried in attempts.values():
        best = max((n for n, r in tried.items() if 'error' not in r), default=None)
        failed = [n for n, r in tried.items() if r.get('error') == 'out of memory' and n > (best or 0)]
        if best:
            results.append(tried[best] | dict(smallest_that_does_not_fit=min(failed, default=None)))
    return results


def run_attempt(args, processes, name, layers):
    """
    Runs one try in processes of its own. Returns its result, or {'error': text}; for an error other than 'out of
    memory', prints the last lines of its stderr.
    """
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
        # Linux kills a process when CPU memory is full
        if run != 'timeout' and any('Signal 9 (SIGKILL) received' in line for line in lines):
            return {'error': 'out of memory'}
        print('\n'.join(lines[-30:]), file=sys.stderr, flush=True)
        return {'error': f'ended with {run}'}


def search(args, name, fits, tried):
    """Calls fits(layers) for two small models and then near the number of layers that they predict to fit."""
    first, second = fits(4), fits(8)
    if args.dry_run:
        return
    guess = 9
    if first and second:
        total = torch.cuda.get_device_properties(0).total_memory * 0.96  # the rest is CUDA's and NCCL's
        slope = (second['peak_bytes'] - first['peak_bytes']) / 4
        guess = 4 + int((total - first['peak_bytes']) / slope)
        if 'offload' in name:  # bounded by CPU memory: pinned parameters and gradients, and AdamW's moments
            guess = int(0.9 * cpu_memory() / (17 * (second['parameters'] - first['parameters']) / 4))
    step = max(1, guess // (16 if 'offload' in name else 25))  # tries with offload take minutes
    tries = 0
    while not fits(guess) and guess > 8 and tries < 3:
        guess, tries = guess - step, tries + 1
    while fits(guess) and guess + step not in tried and tries < 2:
        guess, tries = guess + step, tries + 1
        fits(guess)


def cpu_memory():
    """Returns the bytes of memory of the machine, or of the container if its limit is lower."""
    limit = Path('/sys/fs/cgroup/memory.max')
    limit = limit.read_text().strip() if limit.exists() else 'max'
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return min(total, int(limit)) if limit.isdigit() else total


def launch(processes, arguments, timeout, stderr=None):
    """Runs this file under torchrun with these arguments. Returns the exit status, or 'timeout' (in seconds)."""
    env = {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // processes))} | os.environ
    run = subprocess.Popen(torchrun(processes, __file__, *arguments), env=env, stderr=stderr)
    try:
        return run.wait(timeout)
    except subprocess.TimeoutExpired:
        return 'timeout'
    finally:
        # after a timeout, lets torchrun end the ranks, which would otherwise keep GPU memory
        run.terminate()
        run.wait()


def say(text):
    if dist.get_rank() == 0:
        print(f'[{time.perf_counter() - STARTED:.0f} s] {text}', flush=True)


def report_of(args, results, processes, **more):
    return facts(cpu=args.dry_run) | dict(mode=args.mode, processes=processes, results=results, **more)


def write(args, results, processes, **more):
    """Writes the results so far to args.out, if given."""
    if args.out:
        write_json(args.out, report_of(args, results, processes, **more))


def keep(args, results):
    """Writes the results so far on rank 0, so that they survive if the benchmark is killed."""
    if dist.get_rank() == 0:
        write(args, results, dist.get_world_size())


def show(args, report):
    tables = dict(
        variants=fsdp_variants, checkpoint=fsdp_checkpoint, largest=lambda r: fsdp_largest({Path(args.out).stem: r})
    )
    print(f'\n{machine_of(report)}, torch {torch.__version__}\n')
    print(printed(tables[args.mode](report)) if args.mode in tables else report['results'][-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('mode', choices=['variants', 'checkpoint', 'curves', 'largest'])
    parser.add_argument('--out', default='', help='JSON file')
    parser.add_argument('--only', default='', help='comma-separated variants, or trainers for largest')
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
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exits through `finally`, which ends torchrun
    if args.mode == 'largest' and not args.attempt:
        show(args, report_of(args, largest(args, processes), processes))
        return
    if 'RANK' not in os.environ:
        sys.exit(launch(processes, sys.argv[1:], 560))
    device, rank, world_size = start_ranks(args.dry_run)
    results, measure = [], dict(variants=variants, checkpoint=checkpoint, curves=curves).get(args.mode)
    (attempt if args.attempt else measure)(args, device, results)
    keep(args, results)
    if rank == 0 and not args.attempt:
        show(args, report_of(args, results, world_size))
    dist.barrier()  # gloo may abort if a peer has already left
    dist.destroy_process_group()


@table('fsdp_variants_*')
def fsdp_variants(report):
    found = {}
    for row in report['results']:
        found.setdefault(row['name'], {})[row['micro_steps']] = row
    counts = sorted({row['micro_steps'] for row in report['results']})
    first = next(iter(found.values()))
    cells = []
    for name, its in found.items():
        speeds = [its[n]['tokens_per_sec'] for n in counts]
        ratios = [percent(its[n]['tokens_per_sec'], first[n]['tokens_per_sec']) for n in counts]
        memory = [gib(its[counts[-1]][key] or 0) for key in ('rest_bytes', 'peak_bytes')]
        cells.append((name, *map(with_spread, speeds), *ratios, *memory))
    header = ['', *(f'{n} micro-step{"s" * (n > 1)}: tokens/s (10th to 90th percentile)' for n in counts)]
    return markdown([*header, *(f'{n}: share of the default' for n in counts), 'at rest, GiB', 'peak, GiB'], cells)


@table('fsdp_checkpoint_*')
def fsdp_checkpoint(report):
    """Returns the seconds of two saves at 1.5B."""
    rows, (sharded, full) = [], report['results']
    for its, save in zip(sharded['steps'], sharded['saves']):
        usual, during = its['seconds'], its['seconds_while_saving']
        lost = save['stall_seconds'] + sum(during) - len(during) * usual
        seconds = [usual, save['stall_seconds'], during[0], statistics.median(during[1:] or during)]
        rows.append((its['micro_steps'], *(f'{s:.2f}' for s in seconds), f'{save["seconds"]:.0f}', f'**{lost:.2f}**'))
    header = [
        'micro-steps',
        'usual step, s',
        'copy of the state, s',
        'next step, s',
        'later steps during the save, s each',
    ]
    text = f'rank 0 collects {gib(full["bytes"])} GiB in {full["gather_seconds"]:.1f} s, and the whole save takes '
    text = f'With `--ckpt_format=full`, {text}{full["seconds"]:.1f} s, without fsync.'
    return f'{markdown([*header, "whole save, s", "training time lost, s"], rows)}\n\n{text}'


@table('fsdp_largest_*', together=True)
def fsdp_largest(reports):
    """Returns the largest model that trains with each trainer, by machine."""
    names = {
        'ddp': 'DDP',
        'zero1': 'ZeRO-1',
        'fsdp': 'FSDP, `--fsdp_reshard=True`',
        'fsdp+ac': '+ `--activation_checkpointing`',
        'fsdp+ac+offload': '+ `--fsdp_cpu_offload`',
    }
    machines = {}
    for file, report in reports.items():
        for row in report['results']:
            machines.setdefault(machine_of(report), {})[row['name']] = row, file, report
    blocks = []
    for machine, found in sorted(machines.items(), reverse=True):
        rows = []
        for row, file, report in (found[key] for key in names if key in found):
            size = f'**{row["parameters"] / 1e9:.1f} billion**', f'{row["n_layer"]} × {row["n_embd"]:,}'
            memory = [gib(row[key] or 0, 1) for key in ('rest_bytes', 'peak_bytes')]
            speed = f'{row["tokens_per_sec"]["median"]:,.0f}'
            too_many = row['smallest_that_does_not_fit'] or 'not found'
            rows.append((names[row['name']], *size, too_many, speed, *memory, f'{cite(file)}, {commit_of(report)}'))
        header = ['', 'parameters', 'layers × width', 'layers that do not fit', 'tokens/s', 'at rest, GiB', 'peak, GiB']
        blocks.append(f'{machine}:\n\n{markdown([*header, "result file"], rows)}')
    return '\n\n'.join(blocks)


@number
def largest_model(machine, trainer):
    """
    Returns billions of parameters of the largest model that trains; machine: as in the file's name, such as h200x4.
    """
    return f'{load(f"fsdp_largest_{trainer}_{machine}")["results"][0]["parameters"] / 1e9:.1f}'


@number
def fsdp_curve(what):
    """
    Returns the mean loss over the second half of the curves. what: ddp or fsdp (each curve's), difference (of the two
    trainers at the same seed), or seeds (the largest difference between DDP's seeds).
    """
    summary = load('fsdp_curves_h100x4')['results'][-1]
    means = {
        kind: [mean for name, mean in summary['mean_of_second_half'].items() if name.startswith(kind)]
        for kind in ('ddp', 'fsdp')
    }
    if what == 'difference':
        return ' and '.join(f'{d:+.3f}' for d in summary['fsdp_minus_ddp'])
    if what == 'seeds':
        return f'{max(means["ddp"]) - min(means["ddp"]):.3f}'
    return ', '.join(f'{mean:.3f}' for mean in means[what])


STARTED = time.perf_counter()
if __name__ == '__main__':
    main()
