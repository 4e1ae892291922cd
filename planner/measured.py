"""
Reads the measured rows in benchmarks/results/ as (Run, measurements).

A row's allocated peak counts only if kernels were launched: replays of CUDA graphs allocate nothing, so the peaks
recorded next to them depend on how the measurement was started, not on the run. Its reserved peak counts only with
expandable segments, which train.py has enabled since commit 8498212.
"""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from planner import memory
from planner.gpus import GIB, gpu_of_device
from planner.options import takes_exponentials
from planner.run import Run

RESULTS = Path(__file__).resolve().parent.parent / 'benchmarks' / 'results'
SHAPES = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600)}
EXPONENTIALS_SINCE = '2026-11-30 15:00'  # from then on, the Triton model uses kernels/exp_cross_entropy.py
FIXED_SEGMENTS = ('14f333c', '3e7e90f', 'b3fe36f', '0a87a78', '8e88e86', '2e4179d')  # commits before 8498212


@dataclass(frozen=True)
class Row:
    """One measured configuration. None stands for numbers that are missing or that the module's docstring excludes."""

    run: Run
    source: str  # file name
    kind: str  # trainers, memory, ladder, batches or largest: which benchmark measured it
    tokens_per_sec: float | None = None  # all GPUs together, median
    low: float | None = None
    high: float | None = None
    allocated: float | None = None
    reserved: float | None = None
    flagged: float | None = None  # an allocated peak next to CUDA graphs, or a reserved peak with fixed segments
    date: str = ''  # of the measurement


def shape_of(size):
    return dict(zip(('n_layer', 'n_head', 'n_embd'), SHAPES[size]))


def as_of(date, run):
    """Returns the Run with exponentials if the Triton model had them on this date and would use them."""
    return run.change(exponentials=date >= EXPONENTIALS_SINCE and takes_exponentials(run))


def trainer_of(name, gpus):
    """Returns the fields of Run for a trainer's name in bench_trainers.py."""
    parts = name.split('+')
    fields = dict(graphs='launched' not in parts, kernels='triton' in parts, fp8='fp8' in parts)
    fields['trainer'] = next((t for t in ('zero1', 'fsdp', 'hybrid') if t in parts), 'ddp')
    if fields['trainer'] == 'hybrid':
        fields.update(trainer='fsdp', shard_size=gpus // 2)
    fields['half_residual'] = 'half_residual' in parts or (fields['fp8'] and fields['trainer'] != 'fsdp')
    if 'one_unit' in parts:
        fields['min_num_params'] = 10**12
    return fields


def read(name, results=RESULTS):
    return json.loads((Path(results) / name).read_text())


def trainers_rows(results=RESULTS):
    for path in sorted(Path(results).glob('trainers_h*.json')):
        report = read(path.name, results)
        for row in report['rows']:
            gpus = row['processes']
            runs = [
                r
                for r in report['runs']
                if (r['trainer'], r['size'], r['processes']) == (row['trainer'], row['size'], gpus)
            ]
            grown = [r for r in runs if report['sessions'][r['session']]['commit'][:7] not in FIXED_SEGMENTS]
            # The first iterations launch kernels. Several ranks need more memory then, and later numbers of micro-steps
            # only replay. On one GPU, a peak counts after a larger number, unless it is still that of the larger number
            blocks = [(b, r['blocks'][:i]) for r in grown for i, b in enumerate(r['blocks'])]
            reserved = [
                b['peak_reserved']
                for b, before in blocks
                if b['micro_steps'] == row['micro_steps'] <= [b, *before[:1]][-1]['micro_steps']
                and not (gpus > 1 and before)
                and b['peak_reserved'] not in [x['peak_reserved'] for x in before]
            ]
            run = Run(
                gpu_of_device(report['sessions'][0]['device']),
                gpus,
                **shape_of(row['size']),
                batch_size=row['batch_size'],
                block_size=row['block_size'],
                micro_steps=row['micro_steps'],
                **trainer_of(row['trainer'], gpus),
            )
            run = as_of(report['sessions'][0]['date'], run)
            speed, peak = row['tokens_per_sec'], row['memory_bytes'].get('peak')
            yield Row(
                run,
                path.name,
                'trainers',
                speed['median'],
                speed['min'],
                speed['max'],
                allocated=None if run.graphs else peak,
                reserved=max(reserved, default=None),
                flagged=peak if run.graphs else None,
                date=report['sessions'][0]['date'],
            )


def memory_run(row, gpu):
    """Returns the Run of a row of bench_memory.py, which may not be measured yet."""
    options, parts = dict(row['options']), row['trainer'].split('+')
    one_of = options.get('one_of', 0)  # ranks of ZeRO-1, of which one ran
    return Run(
        gpu,
        one_of or row.get('ranks', 1),
        **shape_of(row['size']),
        batch_size=row['batch_size'],
        block_size=row['block_size'],
        micro_steps=options.get('gradient_accumulation_steps', 2),
        trainer='zero1' if one_of else 'ddp' if parts[0] == 'triton' else parts[0],
        kernels='triton' in parts,
        half_residual=options.get('half_residual', False),
        loss_rows=options.get('loss_rows', 0),
        fp8=options.get('fp8', False),
        compiled=options.get('compile', True),
        graphs=options['cuda_graph'],
        checkpointing=options.get('activation_checkpointing', False),
        reshard=options.get('fsdp_reshard', False),
    )


def memory_rows(results=RESULTS):
    """Yields the rows of bench_memory.py."""
    for path in sorted(Path(results).glob('memory_*h*.json')):
        report = read(path.name, results)
        for row in report['rows']:
            run = as_of(report['date'], memory_run(row, gpu_of_device(report['device'])))
            speed = row.get('tokens_per_sec') or {}
            yield Row(
                run,
                path.name,
                'memory',
                *(speed.get(key) for key in ('median', 'min', 'max')),
                allocated=row['allocated'],
                # one rank alone reduces at once, so it does not keep memory.first_bucket()
                reserved=None if 'one_of' in row['options'] and memory.first_bucket(run) else row['reserved'],
                date=report['date'],
            )


VARIANTS = {  # names in bench_phase2.py
    'reference, eager': dict(compiled=False, graphs=False),
    'reference, compiled': dict(graphs=False),
    'reference, compiled, cuda_graph': dict(),
    '+ half_residual': dict(kernels=True, half_residual=True),
    'loss_rows=4096': dict(kernels=True, half_residual=True, loss_rows=4096),
    'fp8': dict(kernels=True, half_residual=True, fp8=True),
}


LAST_CHANGES = (  # of the ladders in bench_phase2.py: the last one in a file is the Triton model of its time
    '+ weights rounded once an iteration',
    '+ cuBLASLt where it is faster',
    '+ exponentials written by the last matmul',
)


def kernel_rows(results=RESULTS):
    """Yields the rows of bench_phase2.py: its ladders of kernels, and the largest batches."""
    for path in sorted([*Path(results).glob('phase2_l*_h*.json'), *Path(results).glob('fp8_l*_h*.json')]):
        report = read(path.name, results)
        ladder, gpu = 'ladder' in path.name, gpu_of_device(report['device'])
        if report.get('gib'):  # a limit for torch alone
            gpu = replace(gpu, memory_bytes=report['gib'] * GIB + memory.CONTEXT)
        names = {*(row['name'] for row in report['rows']), report.get('base')}
        model = [name for name in LAST_CHANGES if name in names][-1:]
        variants = VARIANTS | {name: dict(kernels=True) for name in model}
        rows = [row for row in report['rows'] if row['name'] in variants]
        base = report.get('base')
        if rows and base in variants and base not in [row['name'] for row in rows]:  # timed in the same turns
            rows.append({'name': base, 'ms': rows[0]['ms_reference'], 'peak_memory_bytes': None})
        for row in rows:
            batch_size = report.get('batch_size') or 12
            run = Run(
                gpu,
                1,
                **shape_of(report.get('size', '124M')),
                batch_size=batch_size if ladder else row['batch_size'],
                block_size=1024,
                micro_steps=(report.get('micro_steps') or 8) if ladder else 1,
                **variants[row['name']],
            )
            run = as_of(report['date'], run)
            times = [run.tokens_per_iter / ms * 1e3 for ms in row.get('ms', [])]
            yield Row(
                run,
                path.name,
                'ladder' if ladder else 'batches',
                row.get('tokens_per_s') or statistics.median(times),
                min(times, default=None),
                max(times, default=None),
                allocated=None if run.graphs and ladder else row['peak_memory_bytes'],
                flagged=row['peak_memory_bytes'] if run.graphs and ladder else None,
                date=report['date'],
            )


def largest_rows(results=RESULTS):
    """Yields the attempts of bench_fsdp.py's largest: eager, one sequence, two timed steps."""
    for path in sorted(Path(results).glob('fsdp_largest_*.json')):
        report = read(path.name, results)
        for name, tried in report['tried'].items():
            for row in tried.values():
                if 'error' in row:
                    continue
                flags = row['flags']
                run = Run(
                    gpu_of_device(report['device']),
                    report['processes'],
                    n_layer=row['n_layer'],
                    n_head=row['n_embd'] // 128,
                    n_embd=row['n_embd'],
                    batch_size=row['batch_size'],
                    block_size=row['block_size'],
                    micro_steps=1,
                    trainer=row['kind'],
                    compiled=False,
                    graphs=False,
                    checkpointing='ac' in name.split('+'),
                    reshard=flags.get('fsdp_reshard', False),
                    offload=flags.get('fsdp_cpu_offload', False),
                )
                speed = row['tokens_per_sec']
                bounds = speed['median'], speed['p10'], speed['p90']
                yield Row(run, path.name, 'largest', *bounds, row['peak_bytes'], date=report['date'])


def all_rows(results: Path = RESULTS) -> list[Row]:
    """Returns every measured row, or [] if there are no result files."""
    if not Path(results).is_dir():
        return []
    return [*trainers_rows(results), *memory_rows(results), *kernel_rows(results), *largest_rows(results)]
