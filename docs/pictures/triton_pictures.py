"""
Draws the pictures of phase2_triton/IMPLEMENTATION.md from benchmarks/results/: where the time of a micro-step goes
(triton_step.svg), the roofline (triton_roofline.svg) and the ladder (triton_ladder.svg).

    python docs/pictures/triton_pictures.py

Each SVG file contains a digest of the numbers that it shows, which tests/test_chapters.py compares with the result
files.
"""

import hashlib
import json
import statistics
from pathlib import Path

from style import BLUE, GREEN, ORANGE, RED, SKY, plt

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / 'benchmarks' / 'results'
LIGHT, DARK = '#BBBBBB', '#333333'


def load(name: str) -> dict:
    return json.loads((RESULTS / f'{name}.json').read_text())


# where the time of a micro-step goes

PARTS = {  # part: (words in names of its kernels, colour); a kernel belongs to the first part that matches
    'matmuls': (('nvjet', 'splitKreduce'), LIGHT),
    'attention': (('cudnn',), '#DDDDDD'),
    'loss': (('softmax', 'FillFunctor<c10::BFloat16>'), RED),
    'LayerNorm, residual': (('layer_norm',), BLUE),
    'GELU': (('gelu',), ORANGE),
    'casts, copies,\nsums, AdamW': (('',), GREEN),
}
# labels of narrow parts: shift to the right in ms, height above the bar, alignment
LABELS = {'LayerNorm, residual': (0, 1.05, 'center'), 'casts, copies,\nsums, AdamW': (-0.9, 0.55, 'left')}


def step_numbers() -> dict[str, float]:
    """Returns the milliseconds of each part of the compiled reference's micro-step; `idle` is without kernels."""
    row = next(row for row in load('phase2_profile_h200')['rows'] if row['name'] == 'reference, compiled')
    parts = dict.fromkeys(PARTS, 0.0)
    for us, _, kernel in row['kernels']:
        parts[next(part for part, (words, _) in PARTS.items() if any(word in kernel for word in words))] += us / 1000
    return parts | {'idle': row['span_ms'] - row['ms']}


def draw_step(parts):
    figure, axes = plt.subplots(figsize=(10, 3.4))
    left = 0.0
    for part, ms in parts.items():
        colour = PARTS[part][1] if part in PARTS else 'white'
        axes.barh(0, ms, left=left, color=colour, edgecolor=DARK, hatch='////' if part == 'idle' else None)
        middle, name = left + ms / 2, f'{part}\n{ms:.1f}'
        if ms > 2.3:
            axes.text(middle, 0, name, ha='center', va='center', bbox={'color': 'white' if part == 'idle' else colour})
        else:
            x, height, side = LABELS.get(part, (0, 0.55, 'center'))
            axes.annotate(name, (middle, 0.4), (middle + x, height), ha=side, arrowprops={'arrowstyle': '-'})
        left += ms
    axes.set(xlim=(0, left), ylim=(-0.4, 1.6), yticks=[], xlabel='milliseconds of a micro-step')
    axes.spines[['left', 'right', 'top']].set_visible(False)
    return figure


# the roofline

# operations per element, forward + backward, counted in the kernels: each addition, multiplication, comparison,
# division, exponential or erf. A wrong count would move a dot along the slope, not away from it.
OPERATIONS = {'GELU': 41, 'residual + LayerNorm': 24, 'LayerNorm': 22, 'loss': 10}
PEAK = 989.4e12  # FLOP/s of bfloat16 matmuls on H100 and H200: nanoGPT/hardware.py


def matmul_bytes(M: int, out: int, inner: int) -> int:
    """
    Returns the bytes that x @ w.T and its two gradients read and write: 2 per number, and 4 + 4 to add to a float32
    gradient.
    """
    x, w, y = M * inner, out * inner, M * out
    return 2 * ((x + w + y) + (y + w + x) + (y + x)) + 8 * w


def roofline_numbers() -> dict:
    """
    Returns `dots`, each (label, GPU, operations per byte, operations per second with PyTorch's kernels and with ours),
    and `bandwidth` in bytes per second by GPU.
    """
    report, dots = load('kernels_h200'), []
    for name in ('GELU 12288 x 3072 bf16', 'residual + LayerNorm 12288 x 768 fp32 + bf16', 'loss 12288 x 50304'):
        row = next(row for row in report['rows'] if row['name'] == name)
        kind, _, sizes = name.partition(' 12288 x ')
        count = 12288 * int(sizes.split()[0]) * OPERATIONS[kind]
        rates = [count / (row[way]['us'] * 1e-6) for way in ('eager', 'ours')]
        label = {'loss': 'cross-entropy'}.get(kind, kind)
        dots.append((label, 'H200', count / row['bytes_moved'], *rates))
    for name in ('linear 12288 x 2304 x 768', 'linear 12288 x 768 x 3072'):
        row = next(row for row in report['rows'] if row['name'] == name)
        M, out, inner = map(int, name.removeprefix('linear ').split(' x '))
        rates = [6 * M * out * inner / (row[way]['us'] * 1e-6) for way in ('eager', 'ours')]
        dots.append((f'matmul {inner} → {out}', 'H200', 6 * M * out * inner / matmul_bytes(M, out, inner), *rates))
    report_h100 = load('layer_norm_h100')
    row = next(r for r in report_h100['rows'] if (r['M'], r['N'], r['x'], r['weight']) == (12288, 768, 'bf16', 'bf16'))
    count = 12288 * 768 * OPERATIONS['LayerNorm']
    rates = [count / (row[way]['both_us'][0] * 1e-6) for way in ('eager', 'ours')]
    dots.append(('LayerNorm', 'H100', OPERATIONS['LayerNorm'] / 10, *rates))  # 5 passes of 2 bytes
    bandwidth = {'H200': report['copy_gb_per_s'] * 1e9, 'H100': report_h100['copy_gb_per_s'][0] * 1e9}
    return {'dots': dots, 'bandwidth': bandwidth}


def draw_roofline(numbers):
    figure, axes = plt.subplots(figsize=(9, 5.4))
    for gpu, style in (('H200', '-'), ('H100', '--')):
        bandwidth = numbers['bandwidth'][gpu]
        ridge = PEAK / bandwidth
        label = f'{gpu}: {bandwidth / 1e12:.1f} TB/s'
        axes.plot([0.01, ridge, 2000], [0.01 * bandwidth, PEAK, PEAK], style, color=DARK, lw=1.5, label=label)
    axes.text(1900, PEAK * 1.12, 'bfloat16 tensor cores: 989 TFLOP/s', ha='right')
    colours = dict(zip([label for label, *_ in numbers['dots']], (ORANGE, BLUE, RED, '#777777', '#777777', SKY)))
    places = {  # positions of labels that are not below and right of their dots
        'matmul 768 → 2304': (46, -86, 'right'),
        'matmul 3072 → 768': (46, -106, 'right'),
        'residual + LayerNorm': (-8, 7, 'right'),
    }
    for label, gpu, intensity, theirs, ours in numbers['dots']:
        colour = colours[label]
        axes.plot([intensity] * 2, [theirs, ours], color=colour, lw=1)
        axes.plot(intensity, theirs, 'o', color='white', mec=colour, mew=1.8, ms=8)
        axes.plot(intensity, ours, 's' if gpu == 'H100' else 'o', color=colour, ms=9)
        roof = min(PEAK, intensity * numbers['bandwidth'][gpu])
        text = f'{label}{" (H100)" if gpu == "H100" else ""}, {ours / roof:.0%}'
        right, up, side = places.get(label, (10, -12, 'left'))
        color = colour if label.startswith('matmul') else 'black'  # these labels are far from their dots
        axes.annotate(text, (intensity, ours), (right, up), textcoords='offset points', ha=side, color=color)
    axes.plot([], [], 'o', color='white', mec=DARK, mew=1.8, ms=8, label='PyTorch, eager')
    axes.plot([], [], 'o', color=DARK, ms=9, label='kernels/, with the share of the roof')
    axes.set(xscale='log', yscale='log', xlim=(0.01, 2000), ylim=(1.5e11, 2e15))
    axes.set(xlabel='operations per byte of memory traffic', ylabel='operations per second')
    axes.legend(loc='lower right', frameon=False)
    return figure


# the ladder

H100_RUNGS = {  # rows of phase2_ladder_h100.json after `reference, compiled`
    'cuda_graph, PyTorch only': 'CUDA graphs instead of compile',
    '+ cross-entropy in place of the logits': 'cross-entropy in place',
    '+ residual and LayerNorm in one': 'residual + LayerNorm',
    '+ GELU': 'GELU',
    '+ float32 weight gradients from the matmul': 'gradients added by the matmul',
    "+ embedding adds to the head's gradient": 'embedding adds to the head',
    '+ weights rounded once an iteration': 'weights rounded once',
    '+ half_residual': 'half_residual',
}
H200_RUNGS = {  # rows of phase2_ladder_h200.json after `reference, compiled`
    'cuda_graph, PyTorch only': 'CUDA graphs instead of compile',
    '+ cross-entropy in place of the logits': 'cross-entropy in place',
    '+ residual and LayerNorm in one': 'residual + LayerNorm',
    '+ GELU': 'GELU',
    '+ float32 weight gradients from the matmul': 'gradients added by the matmul',
    "+ embeddings in one, added to the head's gradient": 'embeddings in one kernel',
    '+ weights rounded once an iteration': 'weights rounded once',
    '+ scaling of the loss by a kernel': 'loss scaled by a kernel',
    '+ LayerNorm gradients summed together': 'LayerNorm gradients together',
    "+ attention's gradients packed by cuDNN": "attention's gradients packed",
    '+ cuBLASLt where it is faster': 'cuBLASLt where it is faster',
    '+ exponentials written by the last matmul': 'exponentials instead of logits',
    '+ half_residual': 'half_residual',
}


def ladder_numbers() -> dict:
    """Returns {GPU: [(rung, median milliseconds of an iteration)]}, from the compiled reference on."""
    panels = {}
    for gpu, name, rungs in (('H100', 'phase2_ladder_h100', H100_RUNGS), ('H200', 'phase2_ladder_h200', H200_RUNGS)):
        rows = {row['name']: row for row in load(name)['rows']}
        panels[gpu] = [('compiled reference', statistics.median(rows['reference, compiled']['ms']))]
        panels[gpu] += [(text, statistics.median(rows[rung]['ms'])) for rung, text in rungs.items()]
    return panels


def draw_ladder(panels):
    figure, both = plt.subplots(1, 2, figsize=(14, 6))
    for axes, (gpu, rungs) in zip(both, panels.items()):
        names, times = zip(*rungs)
        start, end = times[0], times[-1]
        for i, ms in enumerate(times):
            y, before = -i, times[i - 1]
            if i == 0:
                axes.barh(y, ms, color=LIGHT)
                axes.text(ms + 1, y, f'{ms:.1f}', va='center')
                continue
            axes.barh(y, ms - before, left=before, color=RED if ms > before else BLUE)
            axes.plot([before, before], [y + 0.4, y + 0.6], color=DARK, lw=1)
            axes.text(max(ms, before) + 1, y, f'{ms - before:+.1f}'.replace('-', '−'), va='center')
        axes.barh(-len(times), end, color=GREEN)
        axes.text(end + 1, -len(times), f'{end:.1f}: {start / end:.2f} × as fast', va='center')
        axes.set_yticks(range(0, -len(times) - 1, -1), [*names, 'all of these'])
        axes.set_xlim(150, max(times) + 30)
        axes.set_xlabel('milliseconds per iteration (axis from 150)')
        axes.set_title(f'one {gpu}')
    return figure


PICTURES = {
    'triton_step.svg': (step_numbers, draw_step),
    'triton_roofline.svg': (roofline_numbers, draw_roofline),
    'triton_ladder.svg': (ladder_numbers, draw_ladder),
}


def digest(numbers: object) -> str:
    """Returns a digest of the numbers and of this file, which an up-to-date picture contains."""
    return hashlib.sha256(json.dumps(numbers).encode() + Path(__file__).read_bytes()).hexdigest()[:16]


def outdated() -> list[str]:
    """Returns the names of the pictures whose numbers are not those of the result files."""
    return [name for name, (collect, _) in PICTURES.items() if digest(collect()) not in (HERE / name).read_text()]


def main():
    plt.rcParams['hatch.linewidth'] = 0.5
    for name, (collect, draw) in PICTURES.items():
        numbers = collect()
        figure = draw(numbers)
        description = f'numbers {digest(numbers)}'
        figure.savefig(HERE / name, bbox_inches='tight', metadata={'Date': None, 'Description': description})
        plt.close(figure)
        print(name)


if __name__ == '__main__':
    main()
