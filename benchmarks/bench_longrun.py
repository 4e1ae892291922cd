"""
Trains GPT-2 124M on 0.3 billion tokens of a real corpus, with the reference and with Triton, and overlays the loss
curves.

    python nanoGPT/data/packages/prepare.py      # after the download that it names: 106 million tokens
    python benchmarks/bench_longrun.py --work=out-longrun --out=longrun.json  # 10 minutes per run, H200
    python benchmarks/bench_longrun.py --work=out-longrun --only=Triton --seconds=560 --out=...  # repeat until done
    python benchmarks/bench_longrun.py --work=out-longrun --processes=4 --out=...                # four GPUs per run
    python benchmarks/bench_longrun.py --draw --out=benchmarks/results/longrun.json              # only the picture

Each run is train.py as a user starts it, with the same flags, seed and batches. After --seconds it gets SIGTERM and
saves; the same command then continues exactly where it stopped. The result file has the logs in --work, with the
records of a resumed run and of its predecessors joined, and visualize_training.py draws it.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, facts, torchrun, write_json
from tables import gib, load, markdown, number, table

sys.path.insert(0, str(ROOT / 'nanoGPT'))
from run_logs import LogError, Run, find_logs, load_runs
from visualize_training import draw

RUNS = {  # name: (trainer's folder, more flags)
    'reference': ('nanoGPT', []),
    'Triton': ('phase2_triton', []),
    'Triton, half_residual': ('phase2_triton', ['--half_residual']),
    'Triton, fp8': ('phase2_triton', ['--half_residual', '--fp8']),
}
FLAGS = [  # 3061 iterations of 4 x 24 x 1024 tokens: 0.301 billion
    '--batch_size=24',
    '--gradient_accumulation_steps=4',
    '--max_iters=3060',
    '--lr_decay_iters=3060',
    '--warmup_iters=200',
    '--eval_interval=306',
    '--eval_iters=20',
    '--val_tokens=2097152',
    '--log_interval=10',
]
DRY = [
    *('--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=32', '--batch_size=2', '--max_iters=60'),
    *('--lr_decay_iters=60', '--warmup_iters=5', '--eval_interval=20', '--val_tokens=320', '--eval_iters=2'),
    *('--log_interval=1', '--device=cpu', '--dtype=float32', '--compile=False'),
]
RUN_FACTS = ('status', 'phase', 'model', 'world_size', 'tokens_per_iter', 'versions', 'start_time', 'end_time')
RUN_FACTS += ('device',)
FIELDS = {'iterations': ('iter', 'loss', 'time_ms', 'tokens_per_sec', 'peak_memory_bytes')}
FIELDS['iterations'] += ('skipped_steps', 'fp8_clamped')
FIELDS |= {'evaluations': ('iter', 'train_loss', 'val_loss'), 'checkpoints': ('iter',)}


def folder_of(work, name):
    return work / name.replace(', ', '-')


def log_of(work, name):
    """Returns the Run of the newest log, with its predecessors, or None."""
    try:
        return Run(find_logs([str(folder_of(work, name))])[0])
    except LogError:
        return None


def train(name, args):
    """Starts or continues a run. Stops it with a save after args.seconds, or when this process gets SIGTERM."""
    run = log_of(args.work, name)
    if run and run.status == 'completed':
        print(f'{name} is complete: remove {folder_of(args.work, name)} to train it again')
        return
    folder, flags = RUNS[name]
    script, flags = ROOT / folder / 'train.py', [*FLAGS, *(DRY if args.dry_run else []), *flags]
    flags += [f'--dataset={args.data}', f'--out_dir={folder_of(args.work, name)}', '--init_from=auto']
    flags += ['--cuda_graph=False'] if args.no_graph else []
    command = [sys.executable, str(script), *flags]
    if args.processes > 1:
        command = torchrun(args.processes, script, *flags)
    process = subprocess.Popen(command, cwd=ROOT / folder)
    # the run saves before it ends, so wait for it
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        code = process.wait(args.seconds or None)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    stopped = args.processes > 1 and getattr(log_of(args.work, name), 'status', None) == 'stopped'  # torchrun returns 1
    if code and not stopped:
        sys.exit(f'bench_longrun.py: {name} failed with exit status {code}')


def collected(work):
    """Returns a row for each run with a log in work: its name and its log, shortened to what the picture needs."""
    rows = []
    for name in RUNS:
        run = log_of(work, name)
        if not run:
            continue
        log = {kind: [] for kind in FIELDS}
        for segment, (start, _), (end, _) in zip(run.segments, run.parts, [*run.parts[1:], (float('inf'), None)]):
            part = json.loads(Path(segment).read_text())
            for kind, fields in FIELDS.items():
                last = end + (kind == 'checkpoints')  # the next part resumed from the checkpoint of this iteration
                records = [record for record in part[kind] if start <= record['iter'] < last]
                log[kind] += [{field: record.get(field) for field in fields} for record in records]
        log['run'] = {key: run.run.get(key) for key in RUN_FACTS}
        log['config'] = {flag.split('=')[0].lstrip('-'): run.config[flag.split('=')[0].lstrip('-')] for flag in FLAGS}
        rows.append(dict(name=name, parts=len(run.parts), summary=without_paths(run.summary()), log=log))
    return rows


def without_paths(summary):
    return {key: value for key, value in summary.items() if key not in ('path', 'label', 'phase')}


def draw_rows(rows, path):
    """Overlays the loss curves, by tokens, with visualize_training.py. Draws a single run with its speed and memory."""
    with tempfile.TemporaryDirectory() as folder:
        for i, row in enumerate(rows):
            Path(folder, f'run_{i}.json').write_text(json.dumps(row['log']))
        runs = load_runs([str(Path(folder, f'run_{i}.json')) for i in range(len(rows))])
        for run, row in zip(runs, rows):
            run.label = row['name']
        one = ['loss', 'time_ms', 'tokens_per_sec', 'peak_memory_bytes'] if len(runs) == 1 else None
        title = f'GPT-2 124M, {runs[0].label if one else "the same batches"}'
        draw(runs, 'tokens', metrics=one, title=title).savefig(path, dpi=100)


def losses_of(row):
    """Returns {iteration: validation loss}."""
    return {record['iter']: record['val_loss'] for record in row['log']['evaluations']}


@number
def long_run_apart(file, *words):
    """Returns the validation loss of A minus that of B, like +0.0012, at the last evaluation that both have."""
    rows = {row['name']: losses_of(row) for row in load(file)['rows']}
    a, b = (rows[name] for name in ' '.join(words).split(' minus '))
    last = max(a.keys() & b.keys())
    return f'{a[last] - b[last]:+.4f}'.replace('-', '−')


@table('longrun_*')
def longrun(report):
    """Returns the validation losses of the runs on the way and at their ends."""
    rows, cells = report['rows'], []
    base = losses_of(rows[0])
    marks = sorted(set().union(*map(losses_of, rows)))[2::2]
    for row in rows:
        its = losses_of(row)
        losses = [f'{its[mark]:.4f}' if mark in its else '' for mark in marks]
        if row is not rows[0]:
            apart = [f' ({its[mark] - base[mark]:+.4f})' if mark in its and mark in base else '' for mark in marks]
            losses = [loss + difference for loss, difference in zip(losses, apart)]
        summary = row['summary']
        speed = f'{summary["tokens_per_sec_median"]:,.0f}'
        gaps = [abs(loss - base[mark]) for mark, loss in its.items() if mark and mark in base and row is not rows[0]]
        gap = f'{max(gaps):.4f}' if gaps else ''
        cells.append((row['name'], *losses, gap, speed, gib(summary['peak_memory_bytes'] or 0, 1), row['parts']))
    per_iter = rows[0]['log']['run']['tokens_per_iter']
    header = [f'{mark * per_iter / 1e6:.0f} million' for mark in marks]
    header = ['validation loss (− first row) after', *header, 'largest gap', 'tokens/s', 'peak, GiB', 'parts']
    return markdown(header, cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='path of the JSON file; the picture has its name')
    parser.add_argument('--work', type=Path, default=Path('out-longrun'), help='folder of checkpoints and logs')
    parser.add_argument(
        '--data', type=Path, default=ROOT / 'nanoGPT/data/packages', help='folder of train.bin, val.bin'
    )
    parser.add_argument('--only', default='reference;Triton', help=f'semicolon-separated names: {"; ".join(RUNS)}')
    parser.add_argument('--processes', type=int, default=1, help='GPUs of each run, by DDP: 1, 2 or 4')
    parser.add_argument('--no-graph', action='store_true', help='train with --cuda_graph=False')
    parser.add_argument('--seconds', type=float, default=0, help='stop each run after so long; 0: when it is done')
    parser.add_argument('--draw', action='store_true', help='train nothing: draw the picture of the result file')
    parser.add_argument('--dry-run', action='store_true', help='a tiny model on the CPU')
    args = parser.parse_args()
    if args.draw:
        draw_rows(json.loads(args.out.read_text())['rows'], args.out.with_suffix('.png'))
        return
    args.work, args.data = args.work.resolve(), args.data.resolve()
    names = args.only.split(';')
    for name in names:
        if name not in RUNS:
            parser.error(f'--only: {name!r} is not one of {", ".join(RUNS)}')
    for name in names:
        began = time.perf_counter()
        train(name, args)
        print(f'{name}: {time.perf_counter() - began:.0f} s', flush=True)
        rows = collected(args.work)
        write_json(args.out, {**facts(cpu=args.dry_run), 'processes': args.processes, 'rows': rows})
    draw_rows(rows, args.out.with_suffix('.png'))
    print(longrun({'rows': rows}))


if __name__ == '__main__':
    main()
