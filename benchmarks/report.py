"""
Puts the measurements into the documents. A document has a table between `<!-- table: NAME -->` and `<!-- end -->`, and
a number inside a sentence between `<!-- number: NAME WORDS -->` and `<!-- end -->`. The benchmarks define both (see
tables.py).

    python benchmarks/report.py            # after a new result file: rewrites documents and pictures
    python benchmarks/report.py --check    # fails if a document or picture is outdated; a test runs this
    python benchmarks/report.py --run      # first runs the verification commands and stores their output
"""

import argparse
import hashlib
import json
import re
import statistics
import sys

import bench_attention  # noqa: F401  the benchmarks register their tables
import bench_data  # noqa: F401
import bench_fsdp  # noqa: F401
import bench_kernels  # noqa: F401
import bench_layer_norm  # noqa: F401
import bench_longrun  # noqa: F401
import bench_mlp  # noqa: F401
import bench_peers
import bench_phase2  # noqa: F401
import bench_planner  # noqa: F401
import bench_reference  # noqa: F401
import bench_sampling  # noqa: F401
import bench_trainers
import bench_zero1  # noqa: F401
import computed  # noqa: F401
import tables
from checks import run_checks
from common import GIB, ROOT
from tables import (
    NAMES,
    NUMBERS,
    TABLES,
    cite,
    commit_of,
    gib,
    load,
    machine_of,
    markdown,
    render,
    sessions_of,
    table,
    times,
)

BLOCK = re.compile(r'(<!-- (table|number): ([^\n]*?) -->)(.*?)(<!-- end -->)', re.S)
WHAT = {  # beginning of a result file's name -> what it measures
    'adamw': 'AdamW and clipping in one kernel',
    'attention': "attention's backward",
    'checks': 'verification commands',
    'data': 'batches from many shards',
    'data_speed': 'steps with batches from shards',
    'fp8_curves': 'FP8: loss curves',
    'fp8_ladder': 'FP8: speed of training',
    'fp8_matmuls': 'FP8: matmuls and quantization',
    'fp8_tuning': 'FP8: launch configurations, errors of matmuls',
    'fsdp_checkpoint': 'FSDP: saves',
    'fsdp_curves': 'FSDP: loss curves',
    'fsdp_largest': 'the largest model',
    'fsdp_variants': 'FSDP: single choices',
    'gluon_step': 'the Gluon matmul in the step',
    'kernels': 'Triton kernels',
    'layer_norm_tuning': 'LayerNorm: launch configurations',
    'layer_norm': 'LayerNorm',
    'longrun': 'a long run: loss curves',
    'memory': 'memory of one GPU, for the planner',
    'mlp': 'GELU inside a matmul',
    'peers': 'upstream nanoGPT, llm.c and our trainers',
    'peers_losses': 'losses of upstream nanoGPT and our trainers',
    'phase2_changes': 'Triton: the latest changes',
    'phase2_curves': 'Triton: loss curves',
    'phase2_gradients': 'Triton: gradients against float64',
    'phase2_ladder': 'Triton: one change after the other',
    'phase2_largest': 'Triton: the largest batch',
    'phase2_hopper': 'the Gluon matmul and cuBLAS',
    'phase2_matmuls': 'cuBLAS and cuBLASLt',
    'phase2_widths': 'matmuls at 1600 and 1664 columns',
    'phase2_profile': 'Triton: kernels of a micro-step',
    'planner_8gpus': 'predictions for eight GPUs',
    'planner_error': "the planner's errors",
    'reference': "the reference's loop",
    'sampling': 'sampling with the key-value cache',
    'second_stream': 'weight gradients on a second stream',
    'segments': 'segments of fixed sizes, and expandable ones',
    'shards': 'bytes on eight processes',
    'trainers': 'speed and memory of the trainers',
    'zero1_124M_curves': 'ZeRO-1: loss curves, profile',
    'zero1': 'ZeRO-1 and DDP in turn',
}
FOUR = 'trainers_h200x4'  # the speeds in the summary's picture; its memory is in bench_trainers.PEAKS
MOST = {'124M': '10', '1.5B': '5'}  # size -> the most micro-steps that were measured
PEERS = 'peers_h200'  # the programs on one GPU
ORANGE, GREY = '#E69F00', '#999999'


@table('*', together=True)
def result_files(reports):
    """Returns one row for each result file, text files included."""
    rows = []
    names = {path.name: path for path in sorted(tables.RESULTS.iterdir()) if path.suffix in ('.json', '.txt')}
    for name, path in names.items():
        what = max((key for key in WHAT if name.startswith(key)), key=len, default=None)
        if path.suffix == '.txt':
            first = path.read_text().split('\n', 1)[0]
            date, commit = (re.search(pattern, first) for pattern in (r'\d{4}-\d\d-\d\d', r'commit \w+'))
            machine = first.split(',')[0]
            line = [machine, date[0] if date else '', commit[0] if commit else 'no commit recorded']
        else:
            report = reports[path.stem]
            session = sessions_of(report)[0]
            date = session.get('date') or session.get('time') or ''
            line = [machine_of(report), date[:10], commit_of(report)]
        rows.append((f'[{name}](root:benchmarks/results/{name})', WHAT.get(what, ''), *line))
    return markdown(['file', 'what it measures', 'machine', 'date', 'code'], rows)


@table(PEERS, FOUR, together=True)
def results(reports):
    """Returns one row for each program: 124M on one GPU, compared with upstream nanoGPT, and 1.5B on four."""
    names = {'nanoGPT/ here': 'DDP'}
    speeds = {names.get(name, name): its for name, its in bench_peers.peer_speeds(reports[PEERS]).items()}
    peaks = {names.get(row['name'], row['name']): row['peak_memory_bytes'] for row in reports[PEERS]['rows']}
    upstream, *others = sorted(speeds.keys() - NAMES.values(), reverse=True)
    trainers = ('ddp', 'zero1', 'triton', 'triton+half_residual', 'fsdp', 'fsdp+triton')
    cells = []
    for name, trainer in {upstream: None, **dict.fromkeys(others), **{NAMES[key]: key for key in trainers}}.items():
        cell = [name, '', '', '', '']
        if name in speeds:
            cell[1:3] = times(speeds[name], speeds[upstream]), gib(peaks[name], 1)
        if trainer:
            row = bench_trainers.row_of(FOUR, trainer, '1.5B', MOST['1.5B'])
            of_ddp = bench_trainers.against_ddp(row, reports[FOUR]['rows'])
            cell[3] = of_ddp or f'{row["tokens_per_sec"]["median"]:,.0f} tokens/s'
        if trainer and trainer != 'triton+half_residual':  # whose peak was not measured there
            its = bench_trainers.row_of(bench_trainers.PEAKS, trainer, '1.5B', MOST['1.5B'])['memory_bytes']
            cell[4] = f'{gib(its["rest"], 1)}, {gib(its["peak"], 1)}'
        cells.append(cell)
    sources = {'one H200': PEERS, 'four': FOUR, 'memory on four': bench_trainers.PEAKS}
    sources = '; '.join(f'{what}: {cite(file)}, {commit_of(load(file))}' for what, file in sources.items())
    header = ['speed', '124M, one H200: × upstream', 'GiB', '1.5B, four H200s: % of DDP', 'GiB per GPU: at rest, peak']
    return f'{markdown(header, cells)}\n\n{sources[0].upper()}{sources[1:]}.'


def overview_data():
    """
    Returns the data of the summary's picture: memory by part in GiB, speed in percent of DDP, thousands of tokens/s.
    """
    parts = {'parameters': 'parameters', 'gradients': 'gradients', "AdamW's moments": 'optimizer'}
    parts |= {'other, at rest': 'not_accounted_for', 'more at the peak': 'activations'}
    memory = {}
    for trainer in ('ddp', 'zero1', 'fsdp'):
        its = bench_trainers.row_of(bench_trainers.PEAKS, trainer, '1.5B', MOST['1.5B'])['memory_bytes']
        memory[NAMES[trainer]] = {label: its[key] / GIB for label, key in parts.items()}
    speed = {}
    for size, micro_steps in MOST.items():
        base = bench_trainers.row_of(FOUR, 'ddp', size, micro_steps)['tokens_per_sec']['median']
        for trainer in ('zero1', 'triton', 'fsdp', 'fsdp+triton'):
            row = bench_trainers.row_of(FOUR, trainer, size, micro_steps)
            speed[f'{NAMES[trainer]}, {size}'] = 100 * row['tokens_per_sec']['median'] / base
    peers = {name: statistics.median(its) / 1000 for name, its in bench_peers.peer_speeds(load(PEERS)).items()}
    peers = dict(sorted(peers.items(), key=lambda item: item[1]))
    return {'memory': memory, 'speed': speed, 'peers': peers}


def draw_overview(data, path, mark):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    plt.rcParams.update({'font.size': 15, 'axes.spines.top': False, 'axes.spines.right': False})
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.4), layout='constrained', width_ratios=(1, 0.9, 1.2))
    draw_memory(axes[0], data['memory'])
    draw_speed(axes[1], data['speed'])
    draw_peers(axes[2], data['peers'])
    figure.savefig(path, dpi=80, metadata={'Source-Data': mark})
    plt.close(figure)


def draw_memory(axes, memory):
    colors = ('#0072B2', '#56B4E9', ORANGE, '#CC79A7', '#DDDDDD')
    for i, (name, parts) in enumerate(memory.items()):
        bottom = 0.0
        for (part, height), color in zip(parts.items(), colors):
            hatch = '//' if part == 'more at the peak' else None
            label = part if i == 0 and part != 'other, at rest' else None  # too little to see
            axes.bar(name, height, 0.62, bottom, color=color, hatch=hatch, edgecolor='white', label=label)
            bottom += height
        at_rest = bottom - parts['more at the peak']
        axes.text(i, bottom + 1.2, f'peak {bottom:.1f}', ha='center')
        axes.text(i, at_rest + 1.0, f'at rest {at_rest:.1f}', ha='center', bbox={'color': 'white', 'pad': 1})
    tallest = max(sum(parts.values()) for parts in memory.values())
    axes.set(ylabel='GiB on each GPU', ylim=(0, 1.4 * tallest), title='Memory: GPT-2 1.5B on four H200s')
    axes.tick_params(axis='x', length=0)
    axes.legend(frameon=False, loc='upper center', ncols=2, fontsize=12)


def draw_speed(axes, speed):
    labels = list(speed)[::-1]
    for i, label in enumerate(labels):
        axes.barh(i, speed[label], 0.62, color=ORANGE if speed[label] >= 99 else GREY)
        axes.text(speed[label] + 2, i, f'{speed[label]:.0f}%', va='center')
    axes.plot([100, 100], [-0.5, len(labels) - 0.6], color='black', linewidth=1.5)
    axes.text(100, len(labels) - 0.5, 'DDP', ha='center')
    axes.set_yticks(range(len(labels)), [label.replace(', ', '\n') for label in labels], fontsize=12.5)
    title = 'Speed: four H200s'
    axes.set(xlabel='% of DDP, 10 (1.5B: 5) micro-steps', xlim=(0, 135), ylim=(-0.5, len(labels) - 0.1), title=title)
    axes.tick_params(axis='y', length=0)


def draw_peers(axes, peers):
    for i, (label, thousands) in enumerate(peers.items()):
        axes.bar(i, thousands, 0.62, color=ORANGE if label.startswith('Triton') else GREY)
        axes.text(i, thousands + 8, f'{thousands:.0f}', ha='center')
    axes.set_xticks(range(len(peers)), [label.replace(' ', '\n') for label in peers], fontsize=11.5)
    top = 1.12 * max(peers.values())
    axes.set(ylabel='thousand tokens/s', ylim=(0, top), title='Speed: GPT-2 124M on one H200')
    axes.tick_params(axis='x', length=0)


def mark_of(data):
    """Returns a hash of the data, which is stored in the picture's metadata."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


PICTURES = {'benchmarks/results/overview.png': (overview_data, draw_overview)}


def mark_in(path):
    from PIL import Image  # comes with matplotlib

    with Image.open(path) as image:
        return image.info.get('Source-Data')


def rewrite(text, document):
    """Returns the document's text with all tables and numbers taken from the result files."""

    def fill(match):
        opening, kind, name, old, closing = match.groups()
        known = TABLES if kind == 'table' else NUMBERS
        if name.split()[0] not in known:
            raise SystemExit(f'{document}: there is no {kind} {name}; there are {", ".join(sorted(known))}')
        if kind == 'number':
            function, *words = name.split()
            return f'{opening}{NUMBERS[function](*words)}{closing}'
        content = render(name, document)
        return f'{opening}\n\n{content}\n\n{closing}' if content else f'{opening}{closing}'

    return BLOCK.sub(fill, text)


def documents():
    """Returns the path of every .md of the project."""
    skip = re.compile(r'(^|/)(\.|out|build|node_modules)')
    return [path for path in sorted(ROOT.rglob('*.md')) if not skip.search(str(path.relative_to(ROOT)))]


def stale(write=False):
    """Returns the names of documents and pictures that differ from the result files. write: rewrites them."""
    found = []
    for path in documents():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        new = rewrite(text, name)
        if new != text:
            found.append(name)
            if write:
                path.write_text(new)
    for name, (collect, draw) in PICTURES.items():
        data, path = collect(), ROOT / name
        if not path.exists() or mark_in(path) != mark_of(data):
            found.append(name)
            if write:
                draw(data, path, mark_of(data))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, and fail if something is outdated')
    parser.add_argument('--run', action='store_true', help='run the verification commands first')
    args = parser.parse_args()
    if args.run:
        run_checks()
    found = stale(write=not args.check)
    if args.check and found:
        sys.exit(f'{", ".join(found)}: outdated; run python benchmarks/report.py')
    print('written: ' + ', '.join(found) if found else 'everything is up to date')


if __name__ == '__main__':
    main()
