"""
Measures speed and memory of the trainers: runs the train.py of every folder on this machine, on one and on all GPUs.

    python benchmarks/bench_trainers.py --out=FILE                       # everything this machine can run; make bench
    python benchmarks/bench_trainers.py --nproc=4 --sizes=1.5B --trainers=ddp,fsdp,zero1 --minutes=9 --out=FILE
    python benchmarks/bench_trainers.py --onto=FILE --out=FILE ...       # adds to the runs of an equal machine in FILE
    python benchmarks/bench_trainers.py --plan                           # prints what would run, and about how long
    python benchmarks/bench_trainers.py --device=cpu                     # a tiny model, 1 and 2 processes: 3 minutes
    python benchmarks/bench_trainers.py --dry-run                        # one such run, of FSDP: 20 seconds

For each number of processes, the script starts one torchrun group in which the trainers run one after the other in the
same processes, so that PyTorch is imported and the GPU set up only once. A run executes train.py itself on random
tokens; its speeds come from its JSON log. The class Probe adds three things. Between iterations it sets
gradient_accumulation_steps, so that one run measures every number of micro-steps. After an optimizer step it counts the
bytes of parameters, gradients and optimizer state, and reads the allocator's total. And it draws the initial weights on
the GPU; with --init=cpu they are drawn as in train.py, which takes a minute at 1.5B.

The runs of a size come in rounds (A B C, A B C), so that no trainer has the warmer GPU. A result is the median over the
intervals of all rounds, with the smallest and the largest. Compiled code is cached in a folder that is empty at first;
the number of graphs found there explains a run's time to the first step. Results are written after every run, so an
interrupted benchmark loses only its last run.
"""

import argparse
import gc
import io
import json
import os
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from contextlib import nullcontext, redirect_stdout
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from common import ROOT, facts, first_line, spread, torchrun, write_json
from tables import NAMES, SHAPES, gib, load, markdown, number, percent, table, times, with_spread

TRITON, LAUNCHED = '--model_dir=../phase2_triton', '--cuda_graph=False'
HALF = '--half_residual=True'  # computes in FSDP's precision
FP8 = '--fp8=True'
TRAINERS = {  # name: (folder of train.py, flags)
    'ddp': ('nanoGPT', []),
    'zero1': ('phase1_zero1', []),
    'triton': ('phase2_triton', []),
    'fsdp': ('phase3_fsdp', []),
    'zero1+triton': ('phase1_zero1', [TRITON]),
    'fsdp+triton': ('phase3_fsdp', [TRITON]),
    'triton+half_residual': ('phase2_triton', [HALF]),
    'zero1+triton+half_residual': ('phase1_zero1', [TRITON, HALF]),
    'triton+fp8': ('phase2_triton', [HALF, FP8]),
    'zero1+triton+fp8': ('phase1_zero1', [TRITON, HALF, FP8]),
    'fsdp+triton+fp8': ('phase3_fsdp', [TRITON, FP8]),
    'hybrid': ('phase3_fsdp', ['--fsdp_shard_size={half}']),
    'fsdp+one_unit': ('phase3_fsdp', ['--fsdp_min_num_params=1000000000000']),
    # without CUDA graphs, which train.py uses by default
    'fsdp+launched': ('phase3_fsdp', [LAUNCHED]),
    'ddp+launched': ('nanoGPT', [LAUNCHED]),
    'zero1+launched': ('phase1_zero1', [LAUNCHED]),
    'triton+launched': ('phase2_triton', [LAUNCHED]),
}
# in a single process, ZeRO-1 and FSDP shard nothing and run the reference
DEFAULT = {
    'one': ['ddp', 'triton', 'ddp+launched', 'triton+launched'],
    'several': ['ddp', 'zero1', 'fsdp', 'triton', 'zero1+triton', 'fsdp+triton', 'ddp+launched'],
}
# size: (shape, iterations per interval of the log, intervals that count, seconds of a run: (compiled as a whole, the
# first and later ones; compiled in parts under FSDP; with kernels))
SIZES = {
    '124M': (dict(n_layer=12, n_head=12, n_embd=768, batch_size=12, block_size=1024), 4, 3, (45, 20, 20, 12)),
    '350M': (dict(n_layer=24, n_head=16, n_embd=1024, batch_size=12, block_size=1024), 4, 3, (75, 35, 30, 18)),
    '1.5B': (dict(n_layer=48, n_head=25, n_embd=1600, batch_size=8, block_size=1024), 3, 2, (130, 120, 38, 22)),
    'tiny': (dict(n_layer=4, n_head=2, n_embd=96, batch_size=8, block_size=64), 4, 4, (10, 10, 10, 10)),
}


class Enough(Exception):
    """Ends a run of train.py that has been measured."""


class Probe:
    """
    Measures one run of train.py on every rank. It replaces classes that all trainers call: RunReport, which is created
    when everything is built and called after each logged iteration, and StepGuard, which makes each optimizer step.
    train: the namespace in which train.py runs.
    """

    def __init__(self, run, train):
        self.run, self.train, self.cuda = run, train, run['device'] == 'cuda'
        # the first intervals of each number of micro-steps are warm-up
        self.interval, self.warmups, self.intervals = run['interval'], run['warmups'], run['intervals']
        self.starts = [0, *accumulate(self.interval * (warmup + self.intervals) for warmup in self.warmups)]
        self.steps, self.blocks = 0, []
        self.results = {'blocks': self.blocks}
        self.started = time.perf_counter()

    def place_of(self, iteration):
        """Returns the iteration's block, in which the number of micro-steps is constant, and its place in it."""
        block = bisect(self.starts, iteration) - 1
        return block, iteration - self.starts[block]

    def since_start(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - self.started

    def install(self):
        """Replaces classes in the modules that train.py is about to import."""
        import distributed
        import run_report
        import step_guard

        if TRITON in self.run['flags']:  # the model comes from there, everything else from the trainer's folder
            sys.path.insert(0, str(ROOT / 'phase2_triton'))
            import model

            del sys.path[0]
        else:
            import model

        probe = self

        class Guard(step_guard.StepGuard):
            def step(self, optimizer, grad_norm):
                super().step(optimizer, grad_norm)
                probe.after_step(optimizer)

        class Report(run_report.RunReport):
            def __init__(self, *args):
                probe.results['ready_seconds'] = probe.since_start()
                super().__init__(*args)

            def iteration(self, iter_num, **record):
                super().iteration(iter_num, **record)
                probe.after_logging(self, iter_num)

            def close(self, status):
                super().close(status)
                probe.results['log'] = self.log.path
                probe.closed = time.perf_counter()

        step_guard.StepGuard, run_report.RunReport = Guard, Report
        distributed.leave_ranks = lambda micro_step: None  # it would end the process
        if self.run['init'] == 'gpu' and self.cuda:
            build = model.GPT.__init__

            def build_on_gpu(self, config):
                meta = torch.get_default_device().type == 'meta'  # FSDP builds the model without memory
                with nullcontext() if meta else torch.device('cuda', torch.cuda.current_device()):
                    build(self, config)

            model.GPT.__init__ = build_on_gpu
            if self.run['folder'] == 'phase3_fsdp':
                import sharding

                initialize = sharding.initialize

                def initialize_on_gpu(*args):
                    with torch.device('cuda', torch.cuda.current_device()):
                        initialize(*args)

                sharding.initialize = initialize_on_gpu

    def after_step(self, optimizer):
        """Counts bytes in the last iteration of a warm-up, when gradients and AdamW's state exist."""
        block, place = self.place_of(self.steps)
        if block < len(self.warmups) and place == self.interval * self.warmups[block]:
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            gradients = [p.grad for p in parameters if p.grad is not None]
            inner = getattr(getattr(optimizer, 'zero', optimizer), 'optim', optimizer)  # ZeRO-1's share
            state = [v for its in inner.state.values() for v in its.values() if isinstance(v, torch.Tensor)]
            memory = {
                'parameters': own_bytes(parameters, self.run['device']),
                'gradients': own_bytes(gradients, self.run['device']),
                'optimizer': own_bytes(state, self.run['device']),
            }
            # the allocator's total
            memory['rest'] = torch.cuda.memory_allocated() - self.run['base_bytes'] if self.cuda else None
            self.memory = memory
        self.steps += 1

    def after_logging(self, report, iter_num):
        train = self.train
        if iter_num == 0 or self.run['resume']:
            self.results['first_step_seconds'] = self.since_start()
            self.results['parameters'] = sum(p.numel() for p in train['raw_model'].parameters())
        if self.run['resume']:
            report.close('stopped')
            raise Enough
        block, place = self.place_of(iter_num)
        if iter_num and place == 0:
            self.end_block(block, report)
            if block == len(self.run['micro_steps']):
                return
        # The peak is counted after the warm-up. With CUDA graphs it must include the capture, which happens at the
        # start or, under DDP, late in the first warm-up, when DDP has its final buckets.
        captured, ddp = train['cuda_graph'], isinstance(train['model'], DDP)
        begins = 0 if captured and (block or not ddp) else self.interval * (self.warmups[block] - captured)
        if self.cuda and place in (0, begins):
            torch.cuda.reset_peak_memory_stats()
        if place == 0:
            if block:
                train['micro_step'].release()  # the divisor of the loss is captured
            micro_steps = self.run['micro_steps'][block]
            tokens = train['batch_size'] * train['block_size'] * train['world_size']
            train.update(gradient_accumulation_steps=micro_steps, tokens_per_iter=micro_steps * tokens)

    def end_block(self, block, report):
        """
        Stores the results of one number of micro-steps. After the last one, ends the run unless it saves a checkpoint.
        """
        results = {
            'micro_steps': self.run['micro_steps'][block - 1],
            **self.memory,
            'peak': None,
            'peak_reserved': None,
        }
        if self.cuda:
            results['peak'] = torch.cuda.max_memory_allocated() - self.run['base_bytes']
            results['peak_reserved'] = torch.cuda.max_memory_reserved()
        self.blocks.append(results)
        if block == len(self.run['micro_steps']):
            self.collect(report.log)
            self.ended = time.perf_counter()
            if not self.run['save']:
                report.close('stopped')
                raise Enough

    def collect(self, log):
        """Replaces all bytes by the largest of any rank and, on rank 0, adds the speeds from the log."""
        everyone = [self.blocks]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.blocks)
        for i, block in enumerate(self.blocks):
            for key in block:
                block[key] = max(blocks[i][key] for blocks in everyone) if block[key] is not None else None
        if int(os.environ['RANK']) == 0:
            log.wait()
            iterations = {record['iter']: record for record in json.loads(Path(log.path).read_text())['iterations']}
            for start, warmup, block in zip(self.starts, self.warmups, self.blocks):
                counted = [iterations[start + (warmup + n + 1) * self.interval] for n in range(self.intervals)]
                block.update({key: [record[key] for record in counted] for key in ('tokens_per_sec', 'time_ms', 'mfu')})
            if self.run['save']:  # the save may fail
                write_json(Path(self.run['out_dir'], 'measured.json'), self.results)


def own_bytes(tensors, device_type):
    """Returns the bytes of the tensors that are on the device. A weight that two layers share counts once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.device.type == device_type and t.numel()}.values())


def clean_up(path):
    """Undoes the changes that a run of train.py made to this process."""
    sys.stdout, sys.stderr, sys.excepthook, sys.path[:] = sys.__stdout__, sys.__stderr__, sys.__excepthook__, path
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_DFL)
    for name, module in list(sys.modules.items()):
        file = getattr(module, '__file__', None) or ''
        # keep kernels/ and its compiled kernels: it imports nothing of the trainers
        if (
            file.startswith(str(ROOT))
            and '/benchmarks/' not in file
            and '/kernels/' not in file
            and '/.venv/' not in file
            and name != '__main__'
        ):
            del sys.modules[name]
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_stream(torch.cuda.default_stream())
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def run_trainer(run):
    """Runs train.py once, on every rank. Returns the results, which are complete on rank 0."""
    path, argv = list(sys.path), sys.argv
    folder = ROOT / run['folder']
    sys.path[0] = str(folder)
    sys.argv = [str(folder / 'train.py'), *run['flags']]
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=run['cache'], TRITON_CACHE_DIR=f'{run["cache"]}/triton')
    torch._dynamo.utils.counters.clear()
    run['base_bytes'] = 0
    if run['device'] == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        run['base_bytes'] = torch.cuda.memory_allocated()
    train = {'__name__': '__main__', '__file__': sys.argv[0]}  # the variables of train.py
    probe, printed = Probe(run, train), io.StringIO()
    try:
        with redirect_stdout(printed):
            probe.install()
            exec(compile(Path(sys.argv[0]).read_text(), sys.argv[0], 'exec'), train)
    except Enough as enough:
        enough.__traceback__ = None  # it keeps train.py's variables alive
    train.clear()
    results = probe.results
    if run['save']:
        results['save_seconds'] = probe.closed - probe.ended  # from the last iteration to the end of the run
    results['base_bytes'] = run['base_bytes']
    gc.collect()  # frees DDP before its process group
    if dist.is_initialized():
        dist.barrier()  # a rank may still be saving
        dist.destroy_process_group()
    counters = torch._dynamo.utils.counters
    results['graphs'] = counters['stats']['unique_graphs']
    results['graphs_from_cache'] = counters['inductor']['fxgraph_cache_hit']
    words = ('using', 'wrapping', 'units', 'each rank', 'compil')
    results['said'] = [line for line in printed.getvalue().splitlines() if any(word in line.lower() for word in words)]
    log = results.pop('log')
    if run['save'] and int(os.environ['RANK']) == 0:
        results['checkpoint'] = {
            key: json.loads(Path(log).read_text())['checkpoints'][-1][key] for key in ('bytes', 'seconds')
        }
    sys.argv = argv
    del probe
    clean_up(path)
    return results


def work(spec_file):
    """Runs a list of runs, one after the other, on every rank of the torchrun group."""
    spec = json.loads(Path(spec_file).read_text())
    rank = int(os.environ['RANK'])
    sys.path.insert(0, str(ROOT / 'nanoGPT'))  # run_trainer() replaces it by the trainer's folder
    if spec['device'] == 'cpu':
        torch.set_num_threads(1)
    else:
        import hardware

        # selects this rank's GPU and sets up its allocator as train.py does, before the first allocation
        hardware.resolve_auto('cuda', 'auto', 'auto', 'auto')
        clean_up(list(sys.path))
    store = dist.PrefixStore(
        'bench', dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False)
    )
    took = {}
    for i, run in enumerate(spec['runs']):
        if rank == 0:
            expected = took.get((run['trainer'], run['size']), run['expected_seconds'])
            go = time.time() + expected < spec['deadline']
            if not go:
                print(f'no time left for {run["name"]} ({expected:.0f} s)', flush=True)
            Path(spec['folder'], 'running').write_text(str(i))
            store.set(f'go {i}', str(int(go)))
        if store.get(f'go {i}') == b'0':
            if rank == 0:
                shutil.rmtree(run['out_dir'], ignore_errors=True)
            continue
        started = time.perf_counter()
        try:
            results = run_trainer(run)
        except BaseException as error:
            # the other ranks wait for this one, so all end; new processes run the rest of the list
            Path(spec['folder'], f'error_{rank}').write_text(f'{type(error).__name__}: {first_line(error)}')
            if not isinstance(error, torch.OutOfMemoryError):
                sys.stdout = sys.__stdout__
                sys.__excepthook__(*sys.exc_info())
            os._exit(1)
        seconds = time.perf_counter() - started
        took[run['trainer'], run['size']] = seconds
        if rank == 0:
            add(spec, run, {**results, 'seconds': seconds})
            if not run['save']:  # otherwise the next run resumes from there
                shutil.rmtree(run['out_dir'], ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # for the reason given in distributed.leave_ranks()


def add(spec, run, results):
    """Adds a run to the file of results, and prints its line."""
    report = json.loads(Path(spec['out']).read_text())
    kept = ('trainer', 'size', 'processes', 'round', 'batch_size', 'block_size', 'init', 'resume')
    report['runs'].append({'session': len(report['sessions']) - 1, **{key: run[key] for key in kept}, **results})
    report['rows'] = rows_of(report['runs'])
    write_json(spec['out'], report)
    if 'error' in results:
        line = results['error']
    else:
        line = f'first step after {results["first_step_seconds"]:5.1f} s'
        for block in results['blocks']:
            line += f', {block["micro_steps"]} x: {statistics.median(block["tokens_per_sec"]):11,.0f} tokens/s'
            if block['rest'] is not None:
                parts = sum(block[key] for key in ('parameters', 'gradients', 'optimizer'))
                line += f' {gib(block["rest"])} GiB at rest (tensors {gib(parts)}), peak {gib(block["peak"])}'
        if 'save_seconds' in results:
            line += f', saved in {results["save_seconds"]:.1f} s'
        if 'save_error' in results:
            line += f', not saved: {results["save_error"]}'
    print(f'{run["name"]:<44} {results.get("seconds", 0):4.0f} s  {line}', flush=True)


def cell_of(run):
    return run['trainer'], run['size'], run['processes']


def rows_of(runs):
    """Returns one row for each trainer, size, number of processes and number of micro-steps, over all of its runs."""
    rows, loads = {}, {}
    for run in runs:
        cell = cell_of(run)
        if run['resume'] and 'error' not in run:
            loads.setdefault(cell, []).append(run)
            continue
        for block in run.get('blocks', [{'micro_steps': None, 'error': run.get('error')}]):
            rows.setdefault((*cell, block['micro_steps']), []).append((run, block))
    result, measured = [], {key[:3] for key in rows if key[3]}
    for (trainer, size, processes, micro_steps), its in rows.items():
        run, block = its[-1]
        row = dict(trainer=trainer, size=size, processes=processes, micro_steps=micro_steps)
        row.update({key: run[key] for key in ('batch_size', 'block_size')})
        if 'error' in block:
            if (trainer, size, processes) not in measured:
                result.append(row | {'error': block['error']})
            continue
        row.update(parameters=run['parameters'], rounds=len(its))
        for key in ('tokens_per_sec', 'time_ms'):
            row[key] = spread([value for _, b in its for value in b[key]])
        row['tokens_per_sec_per_process'] = row['tokens_per_sec']['median'] / processes
        mfu = [value for _, b in its for value in b['mfu'] if value is not None]
        row['mfu'] = statistics.median(mfu) if mfu else None
        memory = {
            key: max(b[key] for _, b in its) for key in block if isinstance(block[key], int) and key != 'micro_steps'
        }
        if micro_steps > run['blocks'][0]['micro_steps']:  # the first iterations, which launch kernels, had fewer
            memory = {key: memory[key] for key in memory if not key.startswith('peak')}
        if 'rest' in memory:
            memory['not_accounted_for'] = memory['rest'] - sum(
                memory[key] for key in ('parameters', 'gradients', 'optimizer')
            )
        if 'peak' in memory:
            memory['activations'] = memory['peak'] - memory['rest']
        row['memory_bytes'] = memory
        for key in ('first_step_seconds', 'ready_seconds', 'graphs', 'graphs_from_cache'):
            row[key] = [r.get(key) for r, _ in its]  # by round
        saves = [r for r, _ in its if 'checkpoint' in r]
        if saves:
            load = loads.get((trainer, size, processes), [])
            row['checkpoint'] = {
                'bytes': saves[-1]['checkpoint']['bytes'],
                'save_seconds': [r['save_seconds'] for r in saves],
                'write_seconds': [r['checkpoint']['seconds'] for r in saves],
                'ready_seconds_resumed': [r['ready_seconds'] for r in load],
                'first_step_seconds_resumed': [r['first_step_seconds'] for r in load],
            }
        result.append(row)
    return result


# the tables, whose rows come from rows_of()


def in_order(rows):
    def place(row):
        size = list(SHAPES).index(row['size']) if row['size'] in SHAPES else -1
        return row['processes'], size, row['micro_steps'] or 0, list(NAMES).index(row['trainer'])

    return sorted(rows, key=place)


def one_of_each(rows):
    """Returns the row with the most micro-steps of each trainer, size and number of processes; leaves out failures."""
    return {
        (row['processes'], row['size'], row['trainer']): row for row in in_order(rows) if 'error' not in row
    }.values()


def base_of(row, rows):
    """
    Returns DDP's row for the same work, preferably with CUDA graphs if the trainer uses them and without if not; None
    if DDP was not measured.
    """
    same = ('size', 'processes', 'micro_steps')
    found = {r['trainer']: r for r in rows if 'error' not in r and all(r[key] == row[key] for key in same)}
    names = ('ddp+launched', 'ddp') if row['trainer'].endswith('+launched') else ('ddp', 'ddp+launched')
    return next((found[name] for name in names if name in found), None)


def against_ddp(row, rows):
    """Returns the row's speed in percent of DDP's; '' for DDP itself, and if DDP was not measured."""
    base = base_of(row, rows)
    if base is None or base is row:
        return ''
    return of_row(row, base)


def of_row(row, base):
    """Returns the row's speed in percent of that of another row."""
    return percent(row['tokens_per_sec'], base['tokens_per_sec'], min(row.get('rounds', 1), base.get('rounds', 1)))


def on_gpus(report):
    return report['sessions'][0]['device_type'] == 'cuda'


def speeds(report):
    cells, rows = [], report['rows']
    for row in in_order(rows):
        work = f'{row["size"]} × {row["micro_steps"]}' if row['micro_steps'] else row['size']
        line = [row['processes'], work, NAMES[row['trainer']]]
        if 'error' in row:
            cells.append([*line, row['error'].split(':')[0], *[''] * 6])
            continue
        speed = row['tokens_per_sec']
        line += [
            row['rounds'],
            with_spread(speed),
            f'{speed["median"] / row["processes"]:,.0f}',
            against_ddp(row, rows),
        ]
        line += [
            f'{row["time_ms"]["median"]:,.1f}',
            f'{row["mfu"]:.{int(row["rounds"] > 1)}%}' if row['mfu'] else 'n/a',
        ]
        cells.append([*line, ' / '.join(f'{s:.0f}' for s in row['first_step_seconds'])])
    header = [
        'processes',
        'model × micro-steps',
        'trainer',
        'runs',
        'tokens/s',
        'per process',
        'of DDP',
        'step, ms',
        'MFU',
    ]
    return markdown([*header, 'first step after, s'], cells)


def memory_parts(report):
    parts = ('parameters', 'gradients', 'optimizer', 'not_accounted_for', 'rest', 'activations', 'peak')
    cells = [
        (
            row['processes'],
            f'{row["size"]} × {row["micro_steps"]}',
            NAMES[row['trainer']],
            *(gib(row['memory_bytes'][key]) if key in row['memory_bytes'] else 'n/a' for key in parts),
        )
        for row in one_of_each(report['rows'])
    ]
    header = ['processes', 'model × micro-steps', 'trainer', 'parameters', 'gradients', 'AdamW', 'else', 'at rest']
    return markdown([*header, 'more at the peak', 'peak, GiB'], cells)


def checkpoints(report):
    cells = []
    for row in one_of_each(report['rows']):
        if c := row.get('checkpoint'):
            loads = c['ready_seconds_resumed']
            saving, loading = statistics.median(c['save_seconds']), f'{statistics.median(loads):.1f}' if loads else ''
            cells.append(
                (row['processes'], row['size'], NAMES[row['trainer']], gib(c['bytes']), f'{saving:.1f}', loading)
            )
    header = ['processes', 'model', 'trainer', 'ckpt.pt, GiB', 'save: training waits, s', 'resume: start to loaded, s']
    return markdown(header, cells) if cells else ''


@table('trainers_*')
def trainers_speed(report):
    return on_gpus(report) and speeds(report)


@table('trainers_*')
def trainers_memory(report):
    return on_gpus(report) and memory_parts(report)


@table('trainers_*')
def trainers_checkpoint(report):
    return on_gpus(report) and checkpoints(report)


PEAKS = 'trainers_h200x4_peaks'  # the memory of four GPUs, of runs that had more micro-steps first


def in_short(report, memory_report):
    """
    Returns a table: DDP's tokens/s by model and micro-steps, the others in percent of DDP, and memory in GiB from
    memory_report.
    """
    variants = ('launched', 'one_unit', 'half_residual', 'fp8')
    rows = [row for row in in_order(report['rows']) if 'error' not in row and not row['trainer'].endswith(variants)]
    works = list(dict.fromkeys((row['size'], row['micro_steps']) for row in rows))
    sizes = list(dict.fromkeys(size for size, _ in works))
    found = {(row['trainer'], row['size'], row['micro_steps']): row for row in rows}
    memory = {(row['trainer'], row['size']): row['memory_bytes'] for row in one_of_each(memory_report['rows'])}
    cells = []
    for trainer in (key for key in NAMES if key in {row['trainer'] for row in rows}):
        line = [NAMES[trainer]]
        for row in (found.get((trainer, *work)) for work in works):
            line.append((row and (against_ddp(row, rows) or f'{row["tokens_per_sec"]["median"]:,.0f}')) or '')
        its = [memory.get((trainer, size)) for size in sizes]
        cells.append([*line, *(f'{gib(m["rest"], 1)}, {gib(m["peak"], 1)}' if m else '' for m in its)])
    header = ['', *(f'{size} × {n}' for size, n in works), *(f'{size}: at rest, peak' for size in sizes)]
    return markdown(header, cells)


@table('trainers_h200x4')
def trainers_on_4(report):
    return in_short(report, load(PEAKS) or report)


@table('trainers_h200x1', 'trainers_h100x1')
def trainers_on_1(report):
    return in_short(report, report)


@table('trainers_h200x4')
def trainers_alike(report):
    """Returns a table of trainers that compute in the same formats: DDP's tokens/s, the others in percent of DDP's."""
    rows = {(row['trainer'], row['size'], row['micro_steps']): row for row in report['rows'] if 'error' not in row}
    works = [(size, n) for size, n in (('124M', 10), ('124M', 1), ('1.5B', 5), ('1.5B', 1)) if ('ddp', size, n) in rows]
    cells = []
    for base, *others in (
        ('triton+half_residual', 'zero1+triton+half_residual', 'fsdp+triton'),
        ('triton+fp8', 'zero1+triton+fp8', 'fsdp+triton+fp8'),
    ):
        cells.append([NAMES[base], *(f'{rows[(base, *work)]["tokens_per_sec"]["median"]:,.0f}' for work in works)])
        for name in others:
            pairs = [(rows[(name, *work)], rows[(base, *work)]) for work in works]
            speeds = [
                percent(a['tokens_per_sec'], b['tokens_per_sec'], min(a['rounds'], b['rounds'])) for a, b in pairs
            ]
            cells.append([NAMES[name], *speeds])
    return markdown(['', *(f'{size} × {n}' for size, n in works)], cells)


@table('trainers_h200x4')
def triton_of_ddp(report):
    found = {(row['trainer'], row['size'], row['micro_steps']): row for row in report['rows'] if 'error' not in row}
    works = sorted({(size, n) for _, size, n in found}, key=lambda work: (list(SHAPES).index(work[0]), -work[1]))
    cells = [
        (NAMES[name], *(against_ddp(found[(name, *work)], report['rows']) for work in works))
        for name in ('triton', 'zero1+triton', 'fsdp+triton')
    ]
    return markdown(['speed in % of DDP', *(f'{size} × {n}' for size, n in works)], cells)


@table('trainers_cpu')
def trainers_cpu(report):
    """Bytes per parameter. Speeds are ratios, because a CPU's tokens per second say nothing."""
    rows, cells = in_order(report['rows']), []
    for row in rows:
        n, k = row['parameters'], row['processes']
        if row['micro_steps'] != 1 or k == 1:
            continue
        parts = [row['memory_bytes'][key] / n for key in ('parameters', 'gradients', 'optimizer')]
        expected = {'zero1': 8 + 8 / k, 'fsdp': 16 / k, 'hybrid': 16 / (k // 2)}.get(row['trainer'].split('+')[0], 16)
        base = base_of(row, rows) if k == 2 else None  # no speed with more processes than cores
        speed = times(row['tokens_per_sec'], base['tokens_per_sec']) if base else ''
        numbers = [f'{part:.2f}' for part in (*parts, sum(parts))]
        cells.append((k, NAMES[row['trainer']], *numbers, f'{expected:g}', speed))
    header = ['processes', 'bytes per parameter', 'parameters', 'gradients', 'AdamW', 'sum', 'by arithmetic']
    return markdown([*header, "speed ÷ DDP's"], cells)


def row_of(file, trainer, size, micro_steps=None):
    """Returns a trainer's row in a result file; without micro_steps, the row with the most micro-steps."""
    rows = [
        r for r in in_order(load(file)['rows']) if 'error' not in r and (r['trainer'], r['size']) == (trainer, size)
    ]
    return next(row for row in reversed(rows) if micro_steps in (None, str(row['micro_steps'])))


@number
def of_ddp(file, trainer, size, micro_steps):
    """Returns the speed of a trainer in percent of DDP's."""
    return against_ddp(row_of(file, trainer, size, micro_steps), load(file)['rows'])


@number
def of_trainer(file, trainer, base, size, micro_steps):
    """Returns the speed of a trainer in percent of that of another one, base."""
    return of_row(row_of(file, trainer, size, micro_steps), row_of(file, base, size, micro_steps))


@number
def trainer_memory(file, trainer, size, key, digits=1):
    """Returns the memory of a trainer in GiB. key: a key of its memory_bytes, such as rest or peak."""
    return gib(row_of(file, trainer, size)['memory_bytes'][key], int(digits))


@number
def trainer_bytes(file, trainer, size):
    """Returns the bytes per parameter of parameters, gradients and AdamW's state, on the rank that has most."""
    row = row_of(file, trainer, size)
    return (
        f'{sum(row["memory_bytes"][key] for key in ("parameters", "gradients", "optimizer")) / row["parameters"]:.2f}'
    )


def make_data(folder, vocab_size):
    """
    Makes a data set of random tokens below vocab_size. None: GPT-2's 50257, without a meta.pkl, so that the model gets
    the default vocabulary.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (('train', 2_000_000), ('val', 100_000)):
        rng.integers(0, vocab_size or 50257, n, dtype=np.uint16).tofile(folder / f'{split}.bin')
    if vocab_size:
        (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': vocab_size}))


def plan(args, processes, folder):
    """Returns the runs on this number of processes, the most important first."""
    runs = []
    names = args.trainers or DEFAULT['one' if processes == 1 else 'several']
    for position, size in enumerate(args.sizes):
        shape, interval, intervals, (first, later, in_parts, with_kernels) = SIZES[size]
        micro_steps = args.micro_steps or [[5, 1] if size != 'tiny' else [3, 1]]
        micro_steps = micro_steps[min(position, len(micro_steps) - 1)]
        for i in range(args.rounds):
            for name in names:
                script, flags = TRAINERS[name]
                # under DDP, CUDA graphs are captured in the 12th iteration, and again after a change of micro-steps
                warmups = [
                    -(-12 // interval) if args.device == 'cuda' and processes > 1 else 1,
                    *[1] * len(micro_steps),
                ]
                warmups = warmups[: len(micro_steps)]
                last = interval * sum(intervals + warmup for warmup in warmups)
                alone = processes == 1 and script in ('phase1_zero1', 'phase3_fsdp')
                if alone or (args.device == 'cpu' and LAUNCHED in flags) or (name == 'hybrid' and processes < 4):
                    continue
                flags = [flag.format(half=processes // 2) for flag in flags]
                out = folder / f'{name}-{size}-{processes}'
                flags += [f'--{key}={value}' for key, value in shape.items()]
                flags += [
                    f'--dataset={folder / ("gpt2" if size != "tiny" else "tiny")}',
                    f'--out_dir={out}',
                    f'--device={args.device}',
                ]
                flags += ['--eval_interval=1000000000', '--eval_iters=1', '--warmup_iters=1000', *args.flag]
                save = args.save and i == 0
                run = dict(
                    trainer=name,
                    size=size,
                    processes=processes,
                    round=i,
                    folder=script,
                    device=args.device,
                    init=args.init,
                )
                run.update(batch_size=shape['batch_size'], block_size=shape['block_size'], interval=interval)
                run.update(warmups=warmups, intervals=intervals)
                cache = str(folder / (f'cache-{name}-{size}' if args.cold and i == 0 else 'cache'))
                run.update(micro_steps=micro_steps, save=save, resume=False, cache=cache, out_dir=str(out))
                run.update(
                    name=f'{name}, {size}, {processes} process{"es" * (processes > 1)}, round {i + 1}',
                    expected_seconds=with_kernels
                    if 'triton' in name
                    else in_parts
                    if script == 'phase3_fsdp'
                    else (later if i else first),
                )
                own = [
                    f'--gradient_accumulation_steps={micro_steps[0] * processes}',
                    f'--log_interval={interval}',
                    f'--max_iters={last}',
                ]
                runs.append(run | {'flags': flags + own})
                if save:  # also resume from it
                    own = [
                        f'--gradient_accumulation_steps={processes}',
                        '--log_interval=1',
                        f'--max_iters={last + 9}',
                        '--init_from=resume',
                    ]
                    resumed = dict(
                        flags=flags + own,
                        save=False,
                        resume=True,
                        name=run['name'] + ', resumed',
                        expected_seconds=later,
                    )
                    runs.append(run | resumed)
    return runs


def words(text):
    return [word for word in text.split(',') if word]


def integers(text):
    return [int(word) for word in words(text)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='', help='JSON file of results')
    parser.add_argument('--onto', default='', help='a JSON file of results to add to')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=['cuda', 'cpu'])
    parser.add_argument(
        '--nproc',
        type=integers,
        default=[],
        help='numbers of processes, such as 1,4 (default: all GPUs, then 1; on a CPU 2 and 1)',
    )
    parser.add_argument(
        '--sizes', type=words, default=[], help=f'any of {",".join(SIZES)} (default: 124M,1.5B,350M; on a CPU tiny)'
    )
    parser.add_argument('--trainers', type=words, default=[], help=f'any of {",".join(TRAINERS)}')
    parser.add_argument(
        '--micro_steps',
        type=lambda text: [integers(numbers) for numbers in text.split('/')],
        default=[],
        help='micro-steps per process (default: 5,1); 10,1/5,1 has other numbers for the second size',
    )
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument(
        '--save', action='store_true', help='in the first round, also save a checkpoint and resume from it'
    )
    parser.add_argument(
        '--cold', action='store_true', help='in the first round, each trainer starts with an empty compile cache'
    )
    parser.add_argument('--init', default='gpu', choices=['gpu', 'cpu'], help='where the initial weights are drawn')
    parser.add_argument(
        '--flag',
        action='append',
        default=[],
        metavar='--KEY=VALUE',
        help='a further flag of train.py (write --flag=--key=value)',
    )
    parser.add_argument('--minutes', type=float, default=0, help='start no run that would end after this many minutes')
    parser.add_argument('--plan', action='store_true', help='print what would run, and about how long')
    parser.add_argument('--dry-run', action='store_true', help='a single run of FSDP, tiny, on a CPU')
    parser.add_argument('--worker', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run:
        args.device, args.nproc, args.sizes, args.rounds = 'cpu', [2], ['tiny'], 1
        args.trainers, args.micro_steps = args.trainers or ['fsdp'], args.micro_steps or [[2, 1]]
    if args.worker:
        work(args.worker)
    if any(numbers != sorted(numbers, reverse=True) for numbers in args.micro_steps):
        # the first iterations launch kernels, and more micro-steps take more memory then
        parser.error('--micro_steps: name larger numbers first: otherwise, their peaks are not measured')
    gpus = torch.cuda.device_count() if args.device == 'cuda' else 0
    args.sizes = args.sizes or (['124M', '1.5B', '350M'] if gpus else ['tiny'])
    numbers = args.nproc or sorted({gpus or 2, 1}, reverse=True)
    for given, known in ((args.sizes, SIZES), (args.trainers, TRAINERS)):
        if set(given) - set(known):
            parser.error(f'{", ".join(set(given) - set(known))}: known are {", ".join(known)}')
    report = json.loads(Path(args.onto).read_text()) if args.onto else {'sessions': [], 'runs': [], 'rows': []}
    session = facts(cpu=args.device == 'cpu') | {'init': args.init, 'flag': args.flag}
    if report['sessions']:
        last = {'init': 'gpu', 'flag': []} | report['sessions'][-1]
        for key in ('device', 'versions', 'init', 'flag'):  # a row must not mix runs that differ in these
            if last[key] != session[key]:
                sys.exit(
                    f'bench_trainers.py: --onto={args.onto} has runs with {key} {last[key]}, here it is '
                    f'{session[key]}: run without --onto'
                )
    report['sessions'].append(session)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exits through `with`, which removes the folder
    with tempfile.TemporaryDirectory(prefix='bench-', ignore_cleanup_errors=True) as folder:
        measure(args, numbers, report, Path(folder))


def measure(args, numbers, report, folder):
    """Runs everything in torchrun groups, which exchange files with this process in the folder."""
    runs = {n: plan(args, n, folder) for n in numbers}
    took = {cell_of(run): run['seconds'] for run in report['runs'] if 'blocks' in run}
    for run in (run for its in runs.values() for run in its):
        run['expected_seconds'] = took.get(cell_of(run), run['expected_seconds'])
    expected = sum(run['expected_seconds'] for its in runs.values() for run in its)
    limit = f', limited to {args.minutes:g} minutes' * bool(args.minutes)
    count = sum(map(len, runs.values()))
    print(f'{count} run{"s" * (count != 1)}, about {expected / 60:.1f} minutes{limit}', flush=True)
    if args.plan:
        print('\n'.join(f'{run["name"]:<44} {run["expected_seconds"]:4.0f} s' for its in runs.values() for run in its))
        return
    make_data(folder / 'gpt2', None)
    make_data(folder / 'tiny', 512)
    out = args.out or str(folder / 'results.json')
    write_json(out, report)
    deadline = time.time() + (args.minutes or 10**6) * 60
    for processes, todo in runs.items():
        env = dict(
            os.environ, OMP_NUM_THREADS='1' if args.device == 'cpu' else str(max(1, (os.cpu_count() or 1) // processes))
        )
        while todo:
            spec = dict(
                runs=todo, out=str(Path(out).resolve()), folder=str(folder), deadline=deadline, device=args.device
            )
            (folder / 'spec.json').write_text(json.dumps(spec))
            for file in folder.glob('error_*'):
                file.unlink()
            (folder / 'running').write_text('0')
            group = subprocess.Popen(torchrun(processes, __file__, f'--worker={folder / "spec.json"}'), env=env)
            try:
                if group.wait() == 0:
                    break
            finally:
                group.terminate()  # if it still runs, torchrun ends its ranks
                group.wait()
            failed = todo[int((folder / 'running').read_text())]
            # the first error is the cause of the others
            files = sorted(folder.glob('error_*'), key=lambda file: file.stat().st_mtime_ns)
            errors = sorted((file.read_text() for file in files), key=lambda text: 'OutOfMemory' not in text)
            error, measured = errors[0] if errors else 'a process ended', Path(failed['out_dir'], 'measured.json')
            saving = failed['save'] and measured.exists()  # the measurements are complete, only the save failed
            add(spec, failed, json.loads(measured.read_text()) | {'save_error': error} if saving else {'error': error})
            shutil.rmtree(failed['out_dir'], ignore_errors=True)
            rest, same = todo[todo.index(failed) + 1 :], (failed['trainer'], failed['size'])
            # leave out runs that would fail again
            todo = [run for run in rest if (run['trainer'], run['size']) != same or (saving and not run['resume'])]
    report = json.loads(Path(out).read_text())
    print('\n' + '\n\n'.join(text for text in (speeds(report), memory_parts(report), checkpoints(report)) if text))


if __name__ == '__main__':
    main()
