"""
Draws the JSON logs of training runs (training_logger.py writes them, run_logs.py reads them; LOGGING_GUIDE.md has the
schema).

    python visualize_training.py                             # the newest run under out*/
    python visualize_training.py out/run_20260102_030405.json
    python visualize_training.py out-reference out-zero1     # the newest run of each, compared with the first one
    python visualize_training.py out --follow                # redraw until the run ends
    python visualize_training.py out --html run.html         # also a page to zoom into

The picture is written next to the (first) log: run_..._analysis.png, or for several runs
run_..._comparison_analysis.png. A run that was resumed is drawn with its predecessors as one. Exit status 2, with one
message, if there is nothing to draw.
"""

import errors  # isort: skip  # noqa: F401  first: it reports a missing package

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import sys
import textwrap
import time
from contextlib import suppress

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from interactive_page import page
from replaced import replaced
from run_logs import LogError, duration, load_runs, positive, summarize
from shell import pip_install

# Okabe and Ito's colours, which people with any colour blindness can tell apart
BLUE, VERMILLION, GREEN, PURPLE = '#0072B2', '#D55E00', '#009E73', '#CC79A7'
ORANGE, SKY, BLACK, GREY = '#E69F00', '#56B4E9', '#000000', '#777777'
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, BLACK)
# dashes of all curves but the first, so that equal curves stay visible
DASHES = ((5, 3), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3), (3, 2, 1, 2, 1, 2))
MARKERS = 'osD^vP'
MAX_NAMES = 20  # runs in a legend
STYLE = {
    'font.size': 13,
    'axes.titlesize': 14,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.grid': True,
    'grid.color': '#e4e4e4',
    'axes.axisbelow': True,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'legend.fontsize': 12,
    'legend.edgecolor': 'none',
    'legend.framealpha': 0.8,
    'text.parse_math': False,  # a $ in a name is a $
}
TITLES = {
    'loss': ('Loss', 'cross-entropy (nats/token)'),
    'lr': ('Learning rate', 'learning rate'),
    'time_ms': ('Step time', 'ms per step'),
    'tokens_per_sec': ('Throughput', 'tokens/s'),
    'grad_norm': ('Gradient norm', 'norm before clipping'),
    'peak_memory_bytes': ('Peak memory', 'GiB on rank 0'),
}
BARS = {
    'tokens_per_sec_median': ('Throughput', 'median tokens/s'),
    'state_bytes_total': ('Memory from step to step', 'on each rank'),
    'peak_memory_bytes': ('Peak memory', 'on rank 0'),
    'final_val_loss': ('Final validation loss', 'nats/token'),
}
HATCHES = {'parameters': '', 'gradients': '///', 'optimizer': '...'}  # for the parts of state_bytes


def smoothed(values, records):
    """
    Returns the triangular mean over about `records` values around each value, without NaNs. The window narrows at the
    start, where a loss falls fast, and the result ends with the last value.
    """
    index, half = np.arange(len(values)), min(len(values), records // 3)
    end = np.max(index[np.isfinite(values)], initial=-1)
    # two boxes of 2/3 of the width make a triangle of the full width
    for _ in range(2 if records >= 3 else 0):
        known = np.isfinite(values)
        total, count = _window_sums(np.where(known, values, 0), half), _window_sums(known, half)
        values = np.where((count > 0) & (index <= end), total / np.maximum(count, 1), math.nan)
    return values


def _window_sums(values, half):
    """
    Returns the sums of each value and up to `half` values on either side. Differences of one cumulative sum would lose
    values smaller than the rounding error of an earlier outlier, so each window joins the end of one block and the
    start of the next.
    """
    width, start = 2 * half + 1, np.arange(len(values)) - half
    blocks = np.pad(values, (0, width + -len(values) % width)).reshape(-1, width)
    head, tail = np.cumsum(blocks, axis=1).ravel(), np.cumsum(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    sums = tail[start] + np.where(start % width, head[start + width - 1], 0)
    sums[:half] = head[: 2 * min(half, len(values)) : 2]  # at the start, as few on the right as on the left
    return sums


def thin(x, y, pieces=1000):
    """Returns x and y without NaNs, and of a long curve only the extremes of each piece, so that no outlier is lost."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) <= 2 * pieces:
        return x, y
    starts = np.linspace(0, len(y), pieces, endpoint=False).astype(int)
    index = np.concatenate(
        [[a + np.argmin(part), a + np.argmax(part)] for a, part in zip(starts, np.split(y, starts[1:]))]
    )
    index = np.unique(np.concatenate(([0], index, [len(y) - 1])))
    return x[index], y[index]


def short(value, digits=3):
    """Formats 12345678 as 12.3M; numbers below 1000 get one more significant digit."""
    for size, unit in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if size <= abs(value) < 1e15:
            text = f'{value / size:.{digits}g}'
            return f'{value / size:.0f}{unit}' if 'e' in text else text + unit
    return f'{value:.{digits + 1}g}'


def binary_unit(size):
    """Returns (bytes, name) of the unit in which a size has one to four digits before the point."""
    return next(((2**k, name) for k, name in ((30, 'GiB'), (20, 'MiB'), (10, 'KiB')) if size >= 2**k), (1, 'bytes'))


def tick(value, _=None):
    """Formats a tick with enough digits that neighbours on a narrow axis differ."""
    return short(value, 6)


@functools.cache
def has_glyph(char):
    """Returns whether the picture's font can show a character, in its normal and its bold form."""
    fonts = (FontProperties(weight=weight) for weight in ('normal', 'bold'))
    return char.isprintable() and all(get_font(findfont(font)).get_char_index(ord(char)) for font in fonts)


def shown(text):
    """
    Returns text with escapes such as \\udcff and \\u4e2d for everything that the picture cannot show: undecodable bytes
    in names, control characters, and characters without a glyph in its font.
    """
    return ''.join(char if has_glyph(char) else char.encode('unicode_escape').decode() for char in text)


def clip(text, most):
    """Returns a label that the picture can show. Shortens the middle: labels differ more often at the end."""
    text = shown(text)
    return text if len(text) <= most else f'{text[: most // 3]}…{text[most // 3 + 1 - most :]}'


def number(loss):
    return 'n/a' if loss is None else f'{loss:.4f}' if abs(loss) < 1e5 else f'{loss:.4g}'


def scientific(value, _=None):
    mantissa, exponent = f'{value:.2e}'.split('e')
    return '0' if value == 0 else f'{float(mantissa):g}e{int(exponent)}'


def draw(runs, x='iter', smooth=None, metrics=None, title=None, figure=None):
    """
    Returns a Figure of one run (panels of `metrics`, facts) or of several (overlaid `metrics`, bars relative to the
    first run).

    x: 'iter', 'tokens' or 'time'. smooth: records to average over; None: 2% of the run; 1: no smoothing. metrics: names
    from TITLES; by default all of them for one run and the loss for several. Each axes has the name of its metric as
    its label.
    """
    several = len(runs) > 1
    metrics = metrics or (['loss'] if several else list(TITLES))
    table = summarize(runs)
    wide = metrics if several else [m for m in metrics if m == 'loss']
    cells = bars_of(runs) if several else [m for m in metrics if m != 'loss'] + ['facts']
    columns = 2 if len(cells) == 4 else 3
    heights = [4.6] * len(wide) + [1.4 + 0.45 * len(runs) if several else 3.4] * math.ceil(len(cells) / columns)
    with matplotlib.rc_context(STYLE):
        figure = figure or Figure()
        figure.run_names = [clip(run.label, 34) for run in runs]  # for interactive_page.py
        figure.set_size_inches(14, sum(heights) + 0.8)
        figure.set_layout_engine('constrained', w_pad=0.1, h_pad=0.1)
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        data = ', '.join(dict.fromkeys(str(run.config['dataset']) for run in runs if 'dataset' in run.config))
        automatic = (
            [f'{len(runs)} runs on {data or "different data"}']
            if several
            else filter(None, (runs[0].label, data, runs[0].status))
        )
        figure.suptitle(
            textwrap.fill(shown(' '.join((title or ' · '.join(automatic)).split())), 90),
            x=0.01,
            ha='left',
            fontsize=18,
            fontweight='bold',
        )
        for i, key in enumerate(wide):
            _curves(figure.add_subplot(grid[i, :], label=key), runs, key, x, smooth)
        for i, key in enumerate(cells):
            ax = figure.add_subplot(grid[len(wide) + i // columns, i % columns], label=key)
            if several:
                _bars(ax, runs, key, table, named=i % columns == 0)
            elif key == 'facts':
                _facts(ax, runs[0], table[0])
            else:
                _curves(ax, runs, key, x, smooth)
    return figure


def bars_of(runs):
    """
    Returns the keys of BARS that are meaningful for these runs. Older logs have no state_bytes, and the peak memory of
    a run on a CPU is that of the whole process, mostly Python and PyTorch.
    """
    state = any(any(run.state_bytes.values()) for run in runs)
    on_cpus = state and all(run.run.get('device') == 'cpu' for run in runs)
    left_out = {'state_bytes_total': not state, 'peak_memory_bytes': on_cpus}
    return [key for key in BARS if not left_out.get(key)]


def _curves(ax, runs, key, axis, smooth):
    """Draws one metric of one run, or of several overlaid."""
    several, losses = len(runs) > 1, []
    longest = max(run.seconds.max(initial=0) for run in runs)
    unit_s, unit = next(
        (size, name)
        for size, name in ((3600, 'hours'), (60, 'minutes'), (1, 'seconds'))
        if longest > 2 * size or size == 1
    )
    for i, run in enumerate(runs):
        width = 2 + 3 * (len(runs) - 1 - i) / max(3, len(runs) - 1)  # narrower on top: equal curves stay visible
        look = {
            'color': COLORS[i % len(COLORS)],
            'ls': (0, DASHES[(i - 1) % len(DASHES)]) if i else '-',
            'lw': width,
            # matplotlib leaves labels that start with _ out of the legend
            'label': ' ' * run.label.startswith('_') + clip(run.label, 42 if len(runs) > 5 else 80),
        }

        def place(iters, run=run):
            return run.x(iters, axis) / (unit_s if axis == 'time' else 1)

        x, y = place(run.iterations['iter']), run.iterations[key] / (2**30 if key == 'peak_memory_bytes' else 1)
        known = y[np.isfinite(y)]
        if len(known) == 1:
            look['marker'] = 'o'
        if key == 'time_ms' and len(known) and not several:
            _step_times(ax, x, y)
        elif key in ('lr', 'peak_memory_bytes') and len(known):
            ax.plot(*thin(x, y), **look)
        elif len(known):
            records = smooth or max(1, round(len(y) / 50))
            ax.plot(*thin(x, y), color=look['color'], lw=0.8, alpha=0.2 if several else 0.4, label='_raw')
            smooth_y = smoothed(y, records)
            if not several:
                look['label'] = f'training, mean of {records:,} records' if records >= 3 else 'training'
            ax.plot(*thin(x, smooth_y), **look)
            losses += [np.percentile(known, 0.2), np.nanmin(smooth_y), min(np.nanmax(smooth_y), _highest(known))]
        elif several:
            ax.plot([], [], **look)  # puts a run without values into the legend
        if key == 'loss':
            losses += _events(ax, run, place, i if several else None)
    xlabel = {'iter': 'iteration', 'tokens': 'training tokens', 'time': f'{unit} of training steps'}[axis]
    reach = np.concatenate([run.x(run.iterations['iter'], axis) for run in runs]) / (unit_s if axis == 'time' else 1)
    _frame(ax, key, xlabel, losses, reach, wide=several or key == 'loss')
    if key == 'tokens_per_sec' and not several and np.isfinite(runs[0].iterations['mfu']).any():
        _utilization(ax, x, runs[0].iterations['mfu'], smooth)
    handles, labels = ax.get_legend_handles_labels()
    if several and key == 'loss':
        for word, marker, there in (
            ('validation', 'o', any(len(run.evaluations['iter']) for run in runs)),
            ('loss not finite', 'x', any(np.isnan(run.iterations['loss']).any() for run in runs)),
        ):
            handles += [Line2D([], [], color=GREY, marker=marker, mfc='white', ls='none')] * there
            labels += [word] * there
    # a longer legend would cover the curves, and the bars name the runs in the same colours
    if len(runs) <= MAX_NAMES and (several or (handles and key in ('loss', 'time_ms'))):
        columns, small = 2 if len(labels) > 6 else 1, key == 'time_ms' and not several
        ax.legend(
            handles, labels, loc='upper right' if small else 'best', ncols=columns, markerscale=1.6 if small else 1
        )


def _highest(losses):
    """Returns the highest loss to show; a diverging loss leaves the picture at the top."""
    return 1.3 * max(losses[0], np.median(losses))


def _frame(ax, key, xlabel, losses, reach, wide):
    """Sets title, labels, limits and ticks. The x axis spans all records, `reach`, even those with unknown values."""
    ax.set(title=TITLES[key][0], xlabel=xlabel, ylabel=TITLES[key][1])
    values = np.concatenate([[], *(line.get_ydata() for line in ax.lines)])
    if not len(values):
        ax.text(0.5, 0.5, 'not recorded', transform=ax.transAxes, ha='center', va='center', color=GREY)
        ax.set(xticks=[], yticks=[])
        return
    if key == 'loss' and losses:
        low, high = min(losses), max(losses)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1
        ax.set_ylim(low - room, high + room)
    elif key in ('time_ms', 'grad_norm') and values.max() > 10 * np.median(values) and values.min() > 0:
        ax.set_yscale('log')
        ax.yaxis.set_minor_formatter('')
        # room for the legend
        ax.set_ylim(values.min() / 1.3, values.max() * (values.max() / values.min()) ** (0.1 if wide else 0.45))
    elif key != 'loss':
        ax.set_ylim(0, (1.4 if key == 'time_ms' else 1.1) * values.max() or 1)
    places = np.concatenate([reach, *(line.get_xdata() for line in ax.lines)])
    room = 0.02 * (places.max() - places.min()) or 1
    ax.set_xlim(places.min() - room, places.max() + room)
    ax.xaxis.set_major_locator(
        MaxNLocator(nbins=10 if wide else 5, steps=[1, 2, 2.5, 5, 10], integer=xlabel == 'iteration', min_n_ticks=1)
    )
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    ax.yaxis.set_major_formatter(FuncFormatter(scientific if key == 'lr' else tick))


def _events(ax, run, place, i):
    """
    Draws validation losses, steps with a non-finite loss, and for a single run (i None) the best loss and the
    checkpoints. Returns the losses to keep in view.
    """
    iters, val = run.evaluations['iter'], run.evaluations['val_loss']
    known, lost = np.isfinite(val), np.isnan(run.iterations['loss'])
    # y runs from 0 at the bottom to 1 at the top
    edge = {'ls': 'none', 'mew': 2, 'transform': ax.get_xaxis_transform()}
    if i is None:
        color, marker, size = VERMILLION, 'o', 5 if known.sum() < 100 else 2
        look = {'lw': 1.2, 'label': 'validation'}
    else:
        color, marker, size = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)], 7
        look = {'ls': 'none', 'mfc': 'white', 'mew': 1.6, 'label': '_validation'}
    if known.any():
        ax.plot(place(iters[known]), val[known], color=color, marker=marker, ms=size, zorder=3, **look)
    if known.any() and i is None:
        best = np.nanargmin(val)
        label = f'best validation: {number(val[best])} at iteration {iters[best]:,.0f}'
        ax.plot(
            place(iters[[best]]),
            val[[best]],
            color=ORANGE,
            marker='*',
            ms=18,
            mec=BLACK,
            ls='none',
            zorder=4,
            label=label,
        )
    if len(run.checkpoints) and i is None:
        saved = place(run.checkpoints)
        if len(saved) > 1 and saved[-1] - saved[-2] < 0.005 * np.ptp(np.append(saved, place(run.iterations['iter']))):
            saved = saved[:-1]  # one tick for the last evaluation's checkpoint and the final one, an iteration later
        ax.plot(saved, np.full(len(saved), 0.03), color=BLACK, marker='|', ms=14, label='checkpoint', **edge)
    if lost.any():
        label = f'loss not finite: {lost.sum():,} records' if i is None else '_lost'
        ax.plot(
            place(run.iterations['iter'][lost]),
            np.full(lost.sum(), 0.95),
            color=color,
            marker='x',
            ms=8,
            label=label,
            **edge,
        )
    return np.minimum(val[known], _highest(val[known])).tolist() if known.any() else []


def _step_times(ax, x, y):
    median = np.nanmedian(y)
    slow = y > 2 * median
    ax.plot(
        *thin(x, np.where(slow, math.nan, y)),
        color=BLUE,
        marker='o',
        ms=2.5,
        ls='none',
        label=f'median {median:,.1f} ms',
    )
    if slow.any():
        ax.plot(
            *thin(x[slow], y[slow]),
            color=VERMILLION,
            marker='D',
            ms=4,
            ls='none',
            label=f'{slow.sum():,} slower than twice that',
        )


def _utilization(ax, x, mfu, smooth):
    right = ax.twinx()
    right.set_label('mfu')
    percent = 100 * smoothed(mfu, smooth or max(1, round(len(mfu) / 50)))
    right.plot(*thin(x, percent), color=VERMILLION, lw=2, ls='--', marker='o' if len(mfu) == 1 else None)
    right.set_ylim(0, 1.3 * right.get_lines()[0].get_ydata().max() or 1)
    right.set_ylabel('MFU (%, dashed)', color=VERMILLION)
    right.tick_params(axis='y', colors=VERMILLION)
    right.spines.right.set_visible(True)
    right.grid(False)


def _facts(ax, run, row):
    """Writes the facts about a run as two columns of text."""
    config, facts = run.config, run.run
    shape = (('n_layer', 'layers'), ('n_head', 'heads'), ('n_embd', 'wide'))
    started = str(run.parts[0][1].get('start_time') or '')[:16].replace('T', ' ') + ' UTC'
    lines = {
        'status': f'{run.status}, {run.silence}' if run.status in ('running', 'died') else run.status,
        'folder': run.phase,
        'model': f'{short(parameters)} parameters' if (parameters := positive(facts.get('parameters'))) else '',
        'state': _state(run),
        'shape': ', '.join(f'{config[key]} {name}' for key, name in shape if key in config),
        'data': str(config.get('dataset') or ''),
        'batch': f'{run.tokens[-1]:,} tokens per step' if run.tokens[-1] else '',
        'device': f'{facts.get("world_size") or 1} × {facts.get("device") or "?"}',
        'dtype': str(facts.get('dtype') or config.get('dtype') or ''),
        'started': started + (f', resumed {len(run.segments) - 1}×' if len(run.segments) > 1 else ''),
        'steps': f'{row["last_iter"] or 0:,} in {duration(run.seconds.max(initial=0))}',
        'speed': f'median {short(row["tokens_per_sec_median"])} tokens/s' if row['tokens_per_sec_median'] else '',
        'losses': f'train {number(row["final_loss"])}, best val {number(row["best_val_loss"])}',
        'evaluated': ', '.join(_results(run.results)),
    }
    lines = {name: text for name, text in lines.items() if text}
    ax.set_axis_off()
    ax.set_title('Run')
    for i, (name, text) in enumerate((name, shown(text)) for name, text in lines.items()):
        alarm = {'color': VERMILLION, 'weight': 'bold'} if name == 'status' and run.status in ('failed', 'died') else {}
        for place, words, look in (
            (0, name, {'color': GREY}),
            (0.2, text if len(text) <= 37 else text[:36] + '…', alarm),
        ):
            ax.text(
                place,
                0.99 - i * min(0.09, 1.05 / len(lines)),
                words,
                transform=ax.transAxes,
                va='top',
                fontsize=12,
                in_layout=False,
                **look,
            )


def _results(results):
    """Returns evaluate.py's results as a list of short texts."""
    words = [f'{bits:.3f} bits/byte' for bits in [positive(results.get('bits_per_byte'))] if bits]
    for key, name in (('hellaswag', 'HellaSwag'), ('hellaswag_llmc', 'HellaSwag (llm.c)')):
        accuracy = positive(results[key].get('acc_norm')) if isinstance(results.get(key), dict) else None
        words += [f'{name} {100 * accuracy:.1f}%'] if accuracy else []
    return words


def _state(run):
    size = sum(run.state_bytes.values())
    scale, unit = binary_unit(size)
    return f'{short(size / scale)} {unit} on each rank' if size else ''


def _validation_tokens(run):
    """Returns the flags that decide on which tokens a run takes its validation loss."""
    folder = os.path.basename(str(run.config.get('dataset')).rstrip('/'))
    return folder, run.config.get('val_tokens') or 0, run.config.get('block_size')


def _bars(ax, runs, key, table, named):
    (title, unit), scale = BARS[key], 1
    if key in ('state_bytes_total', 'peak_memory_bytes'):
        scale, name = binary_unit(max(row[key] or 0 for row in table))
        unit = f'{name} {unit}'
    if key == 'state_bytes_total':
        unit += '\nparameters (P), gradients (G), optimizer (O)'
    values = [math.nan if row[key] is None else row[key] / scale for row in table]
    widest = max(np.nan_to_num(values)) or 1
    lengths = {run.evaluations['iter'].max() for run in runs if len(run.evaluations['iter'])}
    comparable = key != 'final_val_loss' or len({_validation_tokens(run) for run in runs}) == 1
    if not comparable:
        unit += ', on different tokens'
    if key == 'final_val_loss' and len(lengths) > 1:
        title, unit = 'Last validation loss', f'{unit}, and its iteration'
    for i, (value, row) in enumerate(zip(values, table)):
        known, color = math.isfinite(value), COLORS[i % len(COLORS)]
        if known and key == 'state_bytes_total':
            start = 0
            for part, hatch in HATCHES.items():
                width = row['state_bytes'][part] / scale
                look = {'color': color} if not hatch else {'color': 'white', 'ec': color, 'hatch': hatch}
                ax.barh(i, width, left=start, height=0.7, **look)
                if width > 0.06 * widest:
                    letter = ax.text(start + width / 2, i, part[0].upper(), ha='center', va='center', weight='bold')
                    letter.set_bbox(dict(fc='white', ec='none', pad=2))
                start += width
        else:
            ax.barh(i, value if known else 0, color=color, height=0.7)
        ratio = 'baseline' if i == 0 else f'{row[f"{key}_ratio"]:.3f}×' if row[f'{key}_ratio'] else ''
        ratio = ratio if comparable else ''
        text = f'{number(value) if key == "final_val_loss" else short(value)}  {ratio}'
        if key == 'final_val_loss' and len(lengths) > 1:  # a ratio would compare different points of training
            text = f'{number(value)} at {int(runs[i].evaluations["iter"].max(initial=0)):,}'
        ax.text((value if known else 0) + 0.02 * widest, i, text if known else 'not recorded', va='center', fontsize=12)
    ax.set_title(title)
    ax.set_xlabel(unit)
    ax.set_xlim(0, 1.65 * widest)  # room for the numbers next to the bars
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.xaxis.set_major_formatter(FuncFormatter(tick))
    ax.grid(False, axis='y')
    ax.set_yticks(range(len(runs)), ax.get_figure().run_names if named else [''] * len(runs))
    ax.tick_params(axis='y', length=0)
    ax.set_ylim(len(runs) - 0.4, -0.6)  # the first run at the top


def parse_args(argv):
    parser = argparse.ArgumentParser(description='Draw one training run, or compare several with the first one.')
    parser.add_argument(
        'logs',
        nargs='*',
        metavar='LOG',
        help='files, folders (the newest run in each) or globs; default: the newest under out*/',
    )
    parser.add_argument(
        '--output', help='picture to write, or its folder; the ending picks the format; default: next to the first log'
    )
    parser.add_argument('--html', metavar='FILE', help='also write an interactive page, which needs the package plotly')
    parser.add_argument('--show', action='store_true', help='also open a window')
    parser.add_argument(
        '--smooth', type=int, metavar='N', help='records to average over; 1 for none; default: 2%% of the run'
    )
    parser.add_argument(
        '--x',
        choices=('iter', 'tokens', 'time'),
        default='iter',
        help='the horizontal axis; time: seconds of training steps',
    )
    parser.add_argument(
        '--metrics',
        metavar='A,B',
        help=f'panels to draw, any of {", ".join(TITLES)}; default: all, or for several runs the loss',
    )
    parser.add_argument('--title', help='title of the picture')
    parser.add_argument('--json', action='store_true', help='print the summary table as JSON')
    parser.add_argument(
        '--follow', type=float, metavar='SECONDS', help='redraw until the runs end; without SECONDS every 10 s'
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(argv):
        behind = argv[i + 1 : i + 2]
        if word == '--follow' and (
            not behind or os.path.exists(behind[0]) or not re.fullmatch(r'-?([\d.]+|nan|inf)', behind[0])
        ):
            argv[i] = '--follow=10'  # the next word is a log, not a number of seconds
    args = parser.parse_intermixed_args(argv)  # logs may come before or after flags
    args.metrics = args.metrics.split(',') if args.metrics else None
    for name in args.metrics or ():
        if name not in TITLES:
            parser.error(f'--metrics: {name!r} is not one of {", ".join(TITLES)}')
    if (args.smooth is not None and args.smooth < 1) or (args.follow is not None and not 0 < args.follow < 1e6):
        parser.error('--smooth and --follow must be positive, and --follow below a million')
    if args.html is not None and not args.html.endswith(('.html', '.htm')):
        parser.error(f'--html: the name of the page must end in .html, but it is {args.html!r}')
    return args


def output_path(args, runs):
    """
    Returns the path of the picture: next to the first log, unless --output names a file or a folder. Raises LogError.
    """
    path = os.path.splitext(runs[0].path)[0] + ('_comparison_analysis.png' if len(runs) > 1 else '_analysis.png')
    if args.output and args.output.endswith(('/', os.sep)) and not os.path.isdir(args.output):
        raise LogError(f'--output={args.output}: there is no such folder')
    if args.output:
        path = os.path.join(args.output, os.path.basename(path)) if os.path.isdir(args.output) else args.output
    stem, ending = os.path.splitext(path)
    return stem + (ending or '.png')


def write(picture, output, html):
    """Writes the picture to output, and if html is not None the interactive page. Raises LogError or OSError."""
    try:
        with replaced(output) as temporary:
            picture.savefig(temporary, dpi=100)
    except ValueError as error:  # an unknown format
        raise LogError(f'{output}: {error}') from error
    if html:
        with replaced(html) as temporary, open(temporary, 'w', encoding='utf-8') as file:
            file.write(page(picture))


def open_window():
    """Returns pyplot and a Figure in a window. Raises LogError if there is no display."""
    from matplotlib import pyplot

    if matplotlib.get_backend().lower() == 'agg':
        raise LogError('--show needs a display')
    return pyplot, pyplot.figure()


def print_summary(runs, as_json):
    table = summarize(runs)
    if as_json:
        return print(json.dumps(table, indent=2))
    for row in table:
        speed = 'n/a' if row['tokens_per_sec_median'] is None else short(row['tokens_per_sec_median'])
        print(
            f'{row["label"]}: {row["status"]} at iteration {row["last_iter"]}, '
            f'best val loss {number(row["best_val_loss"])}, {speed} tokens/s'
        )


def visualize(args):
    """Draws the runs, with --follow until they end, and prints their summary. Raises LogError or OSError."""
    if args.html and importlib.util.find_spec('plotly') is None:
        raise LogError(f'--html needs the package plotly: {pip_install("plotly")}')
    pyplot, window = open_window() if args.show else (None, None)
    while True:
        runs = load_runs(args.logs)
        if window:
            window.clear()
        output = output_path(args, runs)
        write(draw(runs, args.x, args.smooth, args.metrics, args.title, window), output, args.html)
        if not args.follow or all(run.status != 'running' for run in runs):
            break
        if window:
            pyplot.pause(args.follow)
        else:
            time.sleep(args.follow)
    for note in [note for run in runs for note in run.notes]:
        print(f'visualize_training: {note}', file=sys.stderr)
    print_summary(runs, args.json)
    for written in (output, *([args.html] if args.html else [])):
        print(f'wrote {written}', file=sys.stderr if args.json else sys.stdout)
    if window:
        pyplot.show()


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # a stream of a notebook
            # names may have characters that the terminal's encoding lacks
            stream.reconfigure(errors='backslashreplace')
    args = parse_args(argv)
    try:
        visualize(args)
    except KeyboardInterrupt:
        return 0 if args.follow else 130
    except BrokenPipeError:  # `| head`: errors.py ends the program
        raise
    except (LogError, OSError, ImportError) as error:
        print(f'visualize_training: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
