"""
The pictures of training logs, checked by their contents: python -m pytest tests/test_visualize.py
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import visualize_training as vis
from run_logs import LogError, Run, find_logs, label_runs, load_log
from training_logger import TrainingLogger
from visualize_training import draw, main, smoothed, thin

SCRIPT = Path(vis.__file__)
BARS = {'tokens_per_sec_median', 'peak_memory_bytes', 'final_val_loss'}  # in a picture of logs without state_bytes


def write_log(
    folder,
    phase='nanoGPT',
    steps=200,
    start=0,
    status='completed',
    speed=1e5,
    memory=2**31,
    resumed_from=None,
    nan_from=None,
    state_bytes=None,
    **config,
):
    """
    Writes the log of a simulated run: loss 4 falling to 1, validation 0.1 above it and best at iteration 120, one step
    of 20 that is slow.
    """
    config = {'dataset': 'shakespeare_char', 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'out_dir': str(folder)} | config
    config |= {'phase1_zero1': {'use_zero1': True}, 'phase3_fsdp': {'use_fsdp': True}}.get(phase, {})
    run = {
        'phase': phase,
        'world_size': 4,
        'device': 'NVIDIA H200',
        'dtype': 'bfloat16',
        'parameters': 10_646_784,
        'tokens_per_iter': 16384,
        'state_bytes': state_bytes,
    }
    log = TrainingLogger(folder, config, run, resumed_from=resumed_from)
    for i in range(start, steps):
        loss = 1 + 3 * math.exp(-i / 30)
        if i % 40 == 0:
            log.evaluation(i, train_loss=loss, val_loss=loss + 0.1 + max(0, i - 120) / 100, lr=1e-3)
        if i % 50 == 0 and i > start:
            log.checkpoint(i, path='ckpt.pt', bytes=10**8, seconds=0.3)
        time_ms = 16384e3 / speed * (8 if i % 20 == 19 else 1)
        log.iteration(
            i,
            loss=math.nan if nan_from and i >= nan_from else loss,
            lr=1e-3 * (1 - i / 400),
            time_ms=time_ms,
            tokens_per_sec=16384e3 / time_ms,
            mfu=None if memory is None else 0.4,
            grad_norm=0.5,
            peak_memory_bytes=memory,
        )
    if status != 'running':
        log.close(status)
    log.wait()
    return log.path


def axes_of(figure):
    return {ax.get_label(): ax for ax in figure.axes}


def line(ax, label):
    return next(line for line in ax.lines if line.get_label().startswith(label))


def texts(ax):
    return ' '.join(text.get_text() for text in ax.texts)


def overlaps(figure):
    """
    Pairs of texts outside of the plotting areas (titles, labels, ticks, facts) that overlap, and those that are cut
    off.
    """
    FigureCanvasAgg(figure).draw()
    boxes = []
    for ax in figure.axes:
        ticks = [
            label
            for axis in (ax.xaxis, ax.yaxis)
            if axis.get_visible()
            for label in axis.get_ticklabels()
            if label.get_text()
        ]
        for text in (
            ax.title,
            ax._left_title,
            ax.xaxis.label,
            ax.yaxis.label,
            *ax.texts,
            *(ticks if ax.axison else ()),
        ):
            if text.get_text() and text.get_visible() and (ax.axison or text in ax.texts or text is ax._left_title):
                box = text.get_window_extent()
                low, high = (ax.get_window_extent().min - 2, ax.get_window_extent().max + 2)
                if text in ticks and not (
                    low[0] <= (box.x0 + box.x1) / 2 <= high[0] or low[1] <= (box.y0 + box.y1) / 2 <= high[1]
                ):
                    continue  # the label of a tick outside of the limits is not drawn
                boxes.append((text.get_text(), box))
    size = figure.bbox
    cut = [
        name for name, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > size.width + 1 or box.y1 > size.height + 1
    ]
    return cut + [
        (a, b)
        for i, (a, one) in enumerate(boxes)
        for b, two in boxes[i + 1 :]
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]


def test_single_run_shows_everything(tmp_path):
    run = Run(write_log(tmp_path))
    figure = draw([run])
    axes = axes_of(figure)
    assert set(axes) == {'loss', 'lr', 'time_ms', 'tokens_per_sec', 'mfu', 'grad_norm', 'peak_memory_bytes', 'facts'}
    assert (
        'DDP' in figure.get_suptitle()
        and 'shakespeare_char' in figure.get_suptitle()
        and 'completed' in figure.get_suptitle()
    )
    loss = axes['loss']
    assert len(line(loss, '_raw').get_xdata()) == 200 and line(loss, '_raw').get_alpha() < 0.5
    assert 'mean of 4 records' in line(loss, 'training').get_label()
    assert line(loss, 'validation').get_xdata().tolist() == [0, 40, 80, 120, 160]
    best = line(loss, 'best validation')
    assert (
        best.get_xdata().tolist() == [120]
        and f'{1.1 + 3 * math.exp(-4):.4f}' in best.get_label()
        and '120' in best.get_label()
    )
    assert line(loss, 'checkpoint').get_xdata().tolist() == [50, 100, 150]
    assert {text.get_text() for text in loss.get_legend().get_texts()} >= {'validation', 'checkpoint', best.get_label()}
    assert line(axes['lr'], 'DDP').get_ydata()[:2].tolist() == [1e-3, 1e-3 * (1 - 1 / 400)]
    slow = line(axes['time_ms'], '10 slower')
    assert (
        slow.get_xdata().tolist() == list(range(19, 200, 20))
        and slow.get_color() != line(axes['time_ms'], 'median').get_color()
    )
    assert slow.get_ydata().max() <= axes['time_ms'].get_ylim()[1]
    assert axes['mfu'].lines[0].get_ydata()[100] == pytest.approx(40) and '%' in axes['mfu'].get_ylabel()
    assert axes['peak_memory_bytes'].lines[0].get_ydata()[0] == 2.0 and 'GiB' in axes['peak_memory_bytes'].get_ylabel()
    for fact in (
        'completed',
        'nanoGPT',
        '10.6M parameters',
        '6 layers, 6 heads, 384 wide',
        'shakespeare_char',
        '16,384 tokens',
        '4 × NVIDIA H200',
    ):
        assert fact in texts(axes['facts'])
    assert all(ax.get_xlabel() and ax.get_ylabel() for name, ax in axes.items() if name not in ('facts', 'mfu'))
    assert overlaps(figure) == []


def test_comparison_against_the_first(tmp_path):
    paths = [
        write_log(tmp_path / name, name, speed=speed, memory=memory)
        for name, speed, memory in (('nanoGPT', 1e5, 2**31), ('phase1_zero1', 9e4, 2**30), ('phase3_fsdp', 2e5, None))
    ]
    runs = vis.load_runs(paths)
    figure = draw(runs)
    axes = axes_of(figure)
    assert set(axes) == {'loss', *BARS}
    legend = [text.get_text() for text in axes['loss'].get_legend().get_texts()]
    assert legend == ['DDP', 'ZeRO-1', 'FSDP', 'validation']
    assert len({line(axes['loss'], name).get_color() for name in legend[:3]}) == 3
    bars = {name: [patch.get_width() for patch in axes[name].patches] for name in BARS}
    assert bars['tokens_per_sec_median'] == pytest.approx([1e5, 9e4, 2e5]) and bars['peak_memory_bytes'] == [
        2.0,
        1.0,
        0,
    ]
    assert [text.get_text() for text in axes['tokens_per_sec_median'].texts] == [
        '100k  baseline',
        '90k  0.900×',
        '200k  2.000×',
    ]
    assert [text.get_text() for text in axes['peak_memory_bytes'].texts] == ['2  baseline', '1  0.500×', 'not recorded']
    assert [label.get_text() for label in axes['tokens_per_sec_median'].get_yticklabels()] == legend[:3]
    assert overlaps(figure) == []


def test_state_is_a_stacked_bar(tmp_path):
    mib = 2**20
    parts = {'nanoGPT': (4, 4, 8), 'phase1_zero1': (4, 4, 4), 'phase3_fsdp': (2, 2, 4)}
    names = ('parameters', 'gradients', 'optimizer')
    paths = [
        write_log(tmp_path / phase, phase, state_bytes={name: n * mib for name, n in zip(names, sizes)})
        for phase, sizes in parts.items()
    ]
    runs = vis.load_runs(paths)
    figure = draw(runs)
    ax = axes_of(figure)['state_bytes_total']
    drawn = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert drawn == [(0, 4), (4, 4), (8, 8), (0, 4), (4, 4), (8, 4), (0, 2), (2, 2), (4, 4)]
    words = [text.get_text() for text in ax.texts]
    assert words == [*'PGO', '16  baseline', *'PGO', '12  0.750×', *'PGO', '8  0.500×']
    assert 'MiB' in ax.get_xlabel() and overlaps(figure) == []
    assert '16 MiB on each rank' in texts(axes_of(draw(runs[:1]))['facts'])
    for run in runs:
        run.run['device'] = 'cpu'  # whose peak is that of the whole process
    assert 'peak_memory_bytes' not in axes_of(draw(runs))


def test_labels_are_those_of_what_ran(tmp_path):
    def label(phase, model=None, world_size=2, **config):
        run = {'phase': phase, 'model': model or phase, 'world_size': world_size}
        log = TrainingLogger(tmp_path, config, run)
        log.close('completed')
        return Run(log.path).label

    assert label('nanoGPT') == 'DDP' and label('nanoGPT', world_size=1) == 'one process'
    assert label('nanoGPT', 'phase2_triton') == label('phase2_triton', world_size=1) == 'Triton'
    assert label('phase2_triton', use_triton=False) == 'DDP'
    assert label('phase1_zero1', use_zero1=True) == 'ZeRO-1' and label('phase1_zero1', use_zero1=False) == 'DDP'
    assert label('phase3_fsdp', 'phase2_triton', use_fsdp=True) == 'FSDP + Triton'
    assert label('phase3_fsdp') == 'DDP'  # by its copy of the reference trainer, which has no such flag
    assert label('mine') == 'mine' and label('nanoGPT', 'mine') == 'nanoGPT with mine'


def test_more_runs_than_colors_differ_all_the_same(tmp_path):
    runs = vis.load_runs([write_log(tmp_path / str(i), steps=12) for i in range(12)])
    lines = [each for each in axes_of(draw(runs))['loss'].lines if not each.get_label().startswith('_')]
    assert len(lines) == 12 == len({(each.get_color(), str(each._unscaled_dash_pattern)) for each in lines})
    # a solid curve would hide equal curves
    assert [each.get_linestyle() for each in lines] == ['-'] + ['--'] * 11


def test_labels_say_what_differs(tmp_path):
    def labels(*logs):
        runs = [Run(path) for path in logs]
        label_runs(runs)
        return [run.label for run in runs]

    a, b, c = (write_log(tmp_path / name, 'phase1_zero1', steps=2) for name in 'abc')
    triton = write_log(tmp_path / 'd', 'phase1_zero1', steps=2, model_dir='../phase2_triton')
    reference = write_log(tmp_path / 'a', 'nanoGPT', steps=2)
    again = write_log(tmp_path / 'a', 'phase1_zero1', steps=2)
    assert labels(a, reference) == ['ZeRO-1', 'DDP']
    assert labels(a, b, c, triton) == ['ZeRO-1, a', 'ZeRO-1, b', 'ZeRO-1, c', 'ZeRO-1 + Triton']
    assert labels(a, again) == [f'ZeRO-1, {os.path.basename(path)}' for path in (a, again)]
    copy = tmp_path / 'copy' / os.path.basename(a)
    copy.parent.mkdir()
    copy.write_bytes(Path(a).read_bytes())
    assert labels(a, copy) == [f'ZeRO-1, {path}' for path in (a, copy)]


def test_crashed_run_with_nulls(tmp_path):
    figure = draw([Run(write_log(tmp_path, status='failed', nan_from=150, memory=None))])
    axes = axes_of(figure)
    assert line(axes['loss'], 'loss not finite: 50 records').get_xdata().tolist() == list(range(150, 200))
    assert len(line(axes['loss'], '_raw').get_xdata()) == 150
    assert line(axes['loss'], 'training').get_xdata().max() == 149  # no mean of earlier values continues after it
    assert 'not recorded' in texts(axes['peak_memory_bytes']) and 'mfu' not in axes
    status = next(text for text in axes['facts'].texts if text.get_text() == 'failed')
    assert status.get_color() == vis.VERMILLION and 'failed' in figure.get_suptitle()
    assert overlaps(figure) == []


def test_single_record_and_none(tmp_path):
    for steps in (0, 1):
        figure = draw([Run(write_log(tmp_path, steps=steps, status='running'))])
        assert overlaps(figure) == []
        ax = axes_of(figure)['loss']
        assert len(ax.lines) == (0 if steps == 0 else 4) and ('not recorded' in texts(ax)) == (steps == 0)
    ticks = [label.get_text() for label in ax.get_yticklabels()]
    assert len(set(ticks)) == len(ticks) > 2  # on an axis of 0.1 nats, too


def test_panels_of_a_run_share_their_x_axis(tmp_path):
    """A metric that ends before the others leaves a visible gap."""
    path = Path(write_log(tmp_path))
    log = json.loads(path.read_text())
    for record in log['iterations'][120:]:
        record['grad_norm'] = None
    path.write_text(json.dumps(log))
    axes = axes_of(draw([Run(path)]))
    assert len({axes[name].get_xlim() for name in vis.TITLES}) == 1


def test_checkpoint_of_the_last_evaluation_and_final_one_are_one_tick(tmp_path):
    log = TrainingLogger(tmp_path, {}, {'phase': 'nanoGPT'})
    for i in range(1000, 1401):
        log.iteration(i, loss=1.0, lr=1e-3, time_ms=20.0, tokens_per_sec=1e5)
    for i in (1200, 1201, 1400, 1401):  # one is saved at the last evaluation, and one an iteration later at the end
        log.checkpoint(i, path='ckpt.pt', bytes=1)
    log.checkpoint(1300, path='ckpt.pt', bytes=None)  # it failed
    log.close('completed')
    assert line(axes_of(draw([Run(log.path)]))['loss'], 'checkpoint').get_xdata().tolist() == [1200, 1201, 1400]


def test_running_and_dead(tmp_path):
    path = Path(write_log(tmp_path, steps=30, status='running'))
    assert Run(path).status == 'running'
    log = json.loads(path.read_text())
    cases = (
        (9, 100, 1, 'running'),
        (11, 100, 1, 'died'),
        (11, 60_000, 1, 'running'),
        (25, 10_000, 100, 'running'),
        (30, 60_000, 1, 'died'),
    )
    for minutes, slowest_ms, log_interval, status in cases:
        log['config']['log_interval'] = log_interval
        log['run']['last_record_time'] = (datetime.now(UTC) - timedelta(minutes=minutes)).strftime('%Y-%m-%dT%H:%M:%SZ')
        log['iterations'][3]['time_ms'] = slowest_ms
        path.write_text(json.dumps(log))
        assert Run(path).status == status
    assert 'died, last record 30.0 min ago' in texts(axes_of(draw([Run(path)]))['facts'])
    log['run']['last_record_time'] = '2999-01-01T00:00:00Z'  # by another machine's clock
    path.write_text(json.dumps(log))
    assert Run(path).silence == 'last record 0.0 s ago'


def test_resumed_chain_is_one_run(tmp_path):
    first = write_log(tmp_path, steps=130, status='stopped')
    second = write_log(
        tmp_path, start=100, steps=170, status='running', resumed_from={'log': os.path.basename(first), 'iter': 100}
    )
    third = write_log(tmp_path, start=150, resumed_from={'log': os.path.basename(second), 'iter': 150})
    log = load_log(third)
    assert [record['iter'] for record in log['iterations']] == list(range(200))
    assert [record['iter'] for record in log['evaluations']] == [0, 40, 80, 120, 160]
    assert [record['iter'] for record in log['checkpoints']] == [50, 100, 150]
    assert log['segments'] == [first, second, third]
    runs = vis.load_runs([str(tmp_path / 'run_*.json')])
    assert [run.path for run in runs] == [third] and 'resumed 2×' in texts(axes_of(draw(runs))['facts'])
    assert overlaps(draw(runs)) == []
    os.unlink(first)
    assert load_log(third)['iterations'][0]['iter'] == 100  # the records that are left
    Path(first).write_text('{"run": ')
    assert load_log(third)['iterations'][0]['iter'] == 100 and 'drawn without it' in Run(third).notes[0]
    log = json.loads(Path(third).read_text()) | {'schema_version': 2}
    Path(third).write_text(json.dumps(log))
    assert 'has schema_version 2, and only 1 is known' in Run(third).notes[0]
    # the checkpoint was upstream's
    nameless = write_log(tmp_path / 'other', start=100, resumed_from={'log': None, 'iter': 100})
    assert load_log(nameless)['segments'] == [nameless]


def test_a_resumed_run_has_speed_memory_and_tokens_of_its_own(tmp_path, capsys):
    first = Path(write_log(tmp_path, steps=150, memory=2**32))
    log = json.loads(first.read_text())
    log['run'] |= {'tokens_per_iter': 1000, 'start_time': '2026-01-01T00:00:00Z'}
    first.write_text(json.dumps(log))
    second = write_log(tmp_path, start=140, speed=2e5, resumed_from={'log': first.name, 'iter': 140})
    run = Run(second)
    row = run.summary()
    assert row['tokens_per_sec_median'] == pytest.approx(2e5) and row['time_ms_median'] == pytest.approx(81.92)
    assert row['peak_memory_bytes'] == 2**31
    assert run.x(np.array([0, 140, 141.0]), 'tokens').tolist() == [0, 140_000, 140_000 + 16384]
    assert '2026-01-01 00:00 UTC, resumed 1×' in texts(axes_of(draw([run]))['facts'])
    # 140 to 149 are not drawn
    assert main([str(first), second]) == 0 and 'continues from iteration 140' in capsys.readouterr().err


def test_axes_smoothing_and_metrics(tmp_path):
    run = Run(write_log(tmp_path))
    tokens = axes_of(draw([run], x='tokens', metrics=['loss', 'lr']))
    assert set(tokens) == {'loss', 'lr', 'facts'} and line(tokens['loss'], '_raw').get_xdata()[-1] == 199 * 16384
    assert 'tokens' in tokens['loss'].get_xlabel()
    seconds = axes_of(draw([run], x='time', smooth=1))['loss']
    assert (
        line(seconds, '_raw').get_xdata()[-1] == pytest.approx((190 + 10 * 8) * 0.16384)
        and 'seconds' in seconds.get_xlabel()
    )
    assert line(seconds, 'training').get_ydata().tolist() == line(seconds, '_raw').get_ydata().tolist()
    overlaid = axes_of(draw([run, run], metrics=['time_ms', 'grad_norm']))
    assert set(overlaid) == {'time_ms', 'grad_norm', *BARS}


def test_smoothing():
    values = np.array([5.0, 4, 3, 2, 1, 1, 1, math.nan, 1, 1])
    assert smoothed(values, 1)[:7].tolist() == values[:7].tolist() and math.isnan(smoothed(values, 1)[7])
    # no lag behind a falling loss
    assert smoothed(np.linspace(4, 1, 100), 20)[:80] == pytest.approx(np.linspace(4, 1, 100)[:80])
    assert np.isfinite(smoothed(values, 8)).all() and np.isnan(smoothed(np.full(20, math.nan), 8)).all()
    assert smoothed(np.full(50, 2.0), 9) == pytest.approx(np.full(50, 2.0))
    spike = np.where(np.arange(100) == 20, 1e18, 1.0)
    assert smoothed(spike, 6)[30:].tolist() == [1.0] * 70 and smoothed(spike, 10**30)[-1] > 1e16
    x, y = thin(np.arange(100_000.0), np.where(np.arange(100_000) == 77_777, 9.0, 1.0))
    assert len(x) < 5000 and y.max() == 9 and x[y == 9].tolist() == [77_777] and (x[0], x[-1]) == (0, 99_999)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old, new = (
        os.path.relpath(write_log(Path(name), phase))
        for name, phase in (('out-old', 'nanoGPT'), ('out-new', 'phase1_zero1'))
    )
    os.utime(old, (1, 1))
    assert main([]) == 0
    picture = Path(new).with_name(Path(new).stem + '_analysis.png')
    assert picture.read_bytes()[:4] == b'\x89PNG' and f'wrote {picture}' in capsys.readouterr().out
    assert main(['out-old', 'out-*/run_*.json', '--json', '--title', 'Mine']) == 0  # the first one twice is one run
    table = json.loads(capsys.readouterr().out)
    assert [row['label'] for row in table] == ['DDP', 'ZeRO-1'] and table[1][
        'tokens_per_sec_median_ratio'
    ] == pytest.approx(1)
    assert table[0]['best_val_loss_iter'] == 120 and table[0]['peak_memory_bytes'] == 2**31
    assert Path(old).with_name(Path(old).stem + '_comparison_analysis.png').exists()
    assert main(['out-new', '--output', 'curve.svg', '--metrics', 'loss', '--x', 'time', '--smooth', '3']) == 0
    assert b'<svg' in Path('curve.svg').read_bytes() and not list(Path().glob('*.tmp*'))


def test_output_without_ending_in_a_folder_and_of_two_processes(tmp_path, monkeypatch):
    path, temporary = write_log(tmp_path / 'a', steps=2), []
    replace = os.replace
    monkeypatch.setattr(vis.os, 'replace', lambda a, b: temporary.append(a) or replace(a, b))
    for pid in (1, 2):
        monkeypatch.setattr(vis.os, 'getpid', lambda: pid)
        for output in (tmp_path / 'curve', tmp_path):
            assert main([path, '--metrics', 'loss', '--output', str(output)]) == 0
    assert len(set(temporary)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'curve.png', Path(path).stem + '_analysis.png']
    monkeypatch.setattr(vis.os, 'replace', lambda a, b: os.stat('/no/where'))
    assert main([path, '--output', str(tmp_path / 'b.png')]) == 2 and not list(tmp_path.glob('b*'))


def test_newest_run_is_one_that_trained(tmp_path):
    trained, evaluated = write_log(tmp_path, steps=2), write_log(tmp_path, steps=0, eval_only=True)
    os.utime(trained, (1, 1))
    assert find_logs([str(tmp_path)]) == [trained] and find_logs([evaluated]) == [evaluated]
    earlier = Path(trained).with_name('run_20200101_000000.json')
    earlier.write_bytes(Path(trained).read_bytes())  # a copy has lost the times
    (tmp_path / 'run_latest.json').symlink_to('nowhere')
    assert find_logs([str(tmp_path)]) == [trained]


def test_follow_before_the_folder():
    for argv in (['--follow', 'out'], ['out', '--follow'], ['--follow', '10', 'out']):
        args = vis.parse_args(argv)
        assert (args.logs, args.follow) == (['out'], 10)
    assert vis.parse_args(['a', '--follow', 'b']).logs == ['a', 'b']  # the others are compared with the first


def test_names_that_matplotlib_and_terminals_would_trip_over(tmp_path):
    name = r'_a$\frac$ü'
    path = write_log(tmp_path / name, name, steps=3, dataset=name)
    runs = [Run(path), Run(write_log(tmp_path / 'b', steps=3))]
    for shown in (runs[:1], runs):
        assert overlaps(draw(shown, title=name)) == []
    assert len(axes_of(draw(runs))['loss'].get_legend().get_texts()) == 3
    run = subprocess.run(
        [sys.executable, SCRIPT, path], env=os.environ | {'PYTHONIOENCODING': 'ascii'}, capture_output=True, text=True
    )
    assert run.returncode == 0 and 'xfc' in run.stdout, run.stderr


ODD_NAMES = (b'M\xfcller', '中文'.encode(), b'line\nbreak\x07', '\U0001f9ea'.encode())


@pytest.mark.parametrize('name', ODD_NAMES)
def test_names_that_the_font_cannot_show_are_escaped(tmp_path, monkeypatch, capsys, name):
    """
    A folder name that is no UTF-8, or whose characters the font lacks, breaks neither the picture nor those of a glob.
    """
    name = os.fsdecode(name)
    monkeypatch.chdir(tmp_path)
    odd = write_log(Path(f'out-{name}'), name, steps=3, dataset=name)
    write_log(Path('out-plain'), name, steps=3)
    monkeypatch.setattr(vis.Figure, 'savefig', warnings_are_errors(vis.Figure.savefig))
    for logs in (['out-*/run_*.json'], [f'out-{name}']):
        assert main([*logs, '--metrics', 'loss', '--title', f'a title with {name}']) == 0, capsys.readouterr().err
    assert Path(odd).with_name(Path(odd).stem + '_analysis.png').exists()
    drawn = ' '.join(text.get_text() for text in draw([Run(odd)]).findobj(Text))
    assert name.encode('unicode_escape').decode() in drawn and name not in drawn


def warnings_are_errors(function):
    """Raises matplotlib's warnings: it warns of a missing glyph, and draws a box."""

    def checked(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            return function(*args, **kwargs)

    return checked


def test_a_log_that_cannot_be_read_does_not_hide_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = [write_log(Path(f'out-{i}'), steps=3) for i in range(2)]
    for i, broken in enumerate(('{"run": ', '[]')):
        Path(f'out-broken{i}').mkdir()
        Path(f'out-broken{i}/run_20260101_000000.json').write_text(broken)
    for logs in (['out-*/run_*.json'], ['out-broken0', *good, 'out-broken1/run_20260101_000000.json']):
        assert main(logs) == 0
        captured = capsys.readouterr()
        assert captured.err.count('the other logs are drawn without it') == 2
        assert all(f'out-broken{i}' in captured.err for i in range(2))
        assert captured.out.count('completed at iteration 2') == 2
    assert main(['out-broken*']) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ('series', 'strange', 'top'), [('evaluations', 4e5, 6), ('iterations', 0.3, 4), ('evaluations', 1e308, 6)]
)
def test_outliers_leave_the_loss_in_sight(tmp_path, series, strange, top):
    """A validation loss that diverges at the end, or a first loss far below the rest."""
    path = Path(write_log(tmp_path, start=0, steps=100))
    log = json.loads(path.read_text())
    for record in log['iterations']:
        record['loss'] += 2 * (series == 'iterations')
    if series == 'iterations':
        log['evaluations'], log['iterations'][0]['loss'], log['iterations'][50]['grad_norm'] = [], strange, 1e308
    else:
        log['evaluations'][-1]['val_loss'] = strange
    path.write_text(json.dumps(log))
    figure = draw([Run(path)])
    assert overlaps(figure) == []
    low, high = axes_of(figure)['loss'].get_ylim()
    assert low < 3 and (3 if series == 'iterations' else 4) < high < top + 2


def test_long_names_and_large_losses_stay_legible(tmp_path):
    paths = [write_log(tmp_path / str(i), steps=3, out_dir=f'out-{"gpt2-124M-" * 6}{i}') for i in range(8)]
    log = json.loads(Path(paths[0]).read_text())
    for record in log['iterations'] + log['evaluations']:
        record |= {key: 1e30 for key in record if 'loss' in key}
    Path(paths[0]).write_text(json.dumps(log))
    log['iterations'] = [dict.fromkeys(record, None) | {'iter': record['iter']} for record in log['iterations']]
    Path(paths[1]).write_text(json.dumps(log | {'evaluations': []}))
    figure = draw(vis.load_runs(paths), title='A title of many words ' * 12)
    assert overlaps(figure) == []
    axes = axes_of(figure)
    # 8 runs, the mark of validation losses, and that of losses that are not finite
    assert len(axes['loss'].get_legend().get_texts()) == 10 and axes['loss'].get_window_extent().width > 900
    assert axes['loss'].get_legend().get_window_extent().x0 > axes['loss'].get_window_extent().x0
    assert texts(axes['final_val_loss']).startswith('1e+30  baseline')
    one = draw([Run(paths[0])], title='A title of many words ' * 12)
    assert overlaps(one) == [] and 'bfloat16' in [text.get_text() for text in axes_of(one)['facts'].texts]


def test_losses_of_runs_that_end_at_different_iterations_have_no_ratio(tmp_path):
    runs = vis.load_runs([write_log(tmp_path / str(steps), steps=steps) for steps in (200, 100, 200)])
    axes = axes_of(draw(runs))['final_val_loss']
    assert axes.get_title('left') == 'Last validation loss' and axes.get_xlabel().endswith('and its iteration')
    assert '×' not in texts(axes)
    assert [text.get_text().split(' at ')[1] for text in axes.texts] == ['160', '80', '160']
    assert '×' in texts(axes_of(draw(runs[::2]))['final_val_loss'])


def test_losses_on_different_tokens_have_no_ratio(tmp_path):
    runs = vis.load_runs([write_log(tmp_path / str(n), val_tokens=n) for n in (0, 4000)])
    axes = axes_of(draw(runs))['final_val_loss']
    assert axes.get_xlabel() == 'nats/token, on different tokens' and '×' not in texts(axes)


def test_the_bars_name_many_runs(tmp_path):
    """A legend of so many names would cover the curves."""
    runs = vis.load_runs([write_log(tmp_path / str(i), steps=1) for i in range(vis.MAX_NAMES + 1)])
    axes = axes_of(draw(runs))
    assert axes['loss'].get_legend() is None
    assert [label.get_text() for label in axes['tokens_per_sec_median'].get_yticklabels()] == [
        run.label for run in runs
    ]


def test_time_and_last_iteration_of_a_run_without_iterations(tmp_path):
    log = TrainingLogger(tmp_path, {}, {'phase': 'nanoGPT', 'parameters': 'many', 'tokens_per_iter': '512'})
    log.evaluation(0, train_loss=1.0, val_loss=1.0)
    log.wait()
    assert draw([Run(log.path)], x='time')
    log.evaluation(20, train_loss=1.0, val_loss=1.0)
    log.checkpoint(31, path='ckpt.pt', bytes=1)
    log.close('completed')
    assert Run(log.path).summary()['last_iter'] == 30 and draw([Run(log.path)])
    with pytest.raises(LogError, match='--x time'):
        draw([Run(log.path)], x='time')


def document(**changes):
    return json.dumps(
        {
            'run': {'start_time': '2026-01-01T00:00:00Z'},
            'config': {},
            'iterations': [],
            'evaluations': [],
            'checkpoints': [],
        }
        | changes
    )


NO_JSON = ('{"iterations": [', '', '\udcff\udcfe', '[' * 100_000)
NO_LOG = (
    '[1, 2]',
    '{"model": 1}',
    document(iterations=[{'loss': 1}]),
    document(iterations=[{'iter': 0, 'loss': {}}]),
    document(evaluations=[3]),
)
NO_LOG += (
    document(iterations=[{'iter': 0, 'loss': 10**400}]),
    document(iterations=[{'iter': 0, 'loss': [1]}]),
    document(results=[5]),
    document(run={'resumed_from': {'log': 'x', 'iter': None}}),
)
WRONG_TYPES = (
    (document(config=[]), 'its config is a list, not a dict'),
    (
        document(iterations={}, evaluations=None),
        'its iterations is a dict, not a list, its evaluations is a null, not a list',
    ),
    ('{"run": {}}', 'it has no config, it has no iterations'),
    ('[1]', 'it is a list'),
)


@pytest.mark.parametrize(
    ('content', 'words'),
    [(text, 'not a JSON document') for text in NO_JSON]
    + [(text, 'not a training log') for text in NO_LOG]
    + list(WRONG_TYPES),
)
def test_what_is_no_log_gets_one_message(tmp_path, capsys, content, words):
    path = tmp_path / 'run_1.json'
    path.write_bytes(content.encode('utf-8', 'surrogateescape'))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and words in error and str(path) in error


def test_results_of_another_kind_are_not_drawn(tmp_path):
    """Neither a HellaSwag result nor a number may be a text."""
    path = tmp_path / 'run_1.json'
    path.write_text(
        document(results=[{'hellaswag': 'good', 'hellaswag_llmc': {'acc_norm': 'x'}, 'bits_per_byte': '1'}])
    )
    texts = [text.get_text() for ax in vis.draw(vis.load_runs([str(path)])).axes for text in ax.texts]
    assert 'folder' in texts and 'evaluated' not in texts


def test_a_named_pipe_is_no_log(tmp_path, capsys):
    path = str(tmp_path / 'run_1.json')
    os.mkfifo(path)  # opening it would wait for its writer
    assert main([path]) == 2 and capsys.readouterr().err == f'visualize_training: {path}: not a regular file\n'


def test_other_mistakes_get_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_log(Path('elsewhere'), steps=2)
    for argv, words in (
        ([], 'no run_*.json in out*/'),
        (['nothing-*.json'], 'no such file'),
        (['.git'], 'no such file'),
        ([path, '--output', 'no/where.png'], 'no/where'),
        ([path, '--output', 'x.docx'], 'docx'),
        ([path, '--output', 'no/'], '--output=no/: there is no such folder'),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and words in error
    for argv in (
        [path, '--metrics', 'losses'],
        [path, '--smooth', '0'],
        [path, '--html', path],  # the page would replace the log
        [path, '--x', 'epochs'],
        [path, '--follow', '-1'],
        ['--follow', 'nan'],
        ['--follow', 'inf'],
    ):
        with pytest.raises(SystemExit, match='2'):
            main(argv)
    log = json.loads(Path(path).read_text())
    del log['run']['tokens_per_iter']
    Path(path).write_text(json.dumps(log))
    assert Run(path).x(np.array([2]), 'tokens').tolist() == [2 * 16384]  # it follows from the speed
    log['iterations'] = []
    Path(path).write_text(json.dumps(log))
    with pytest.raises(LogError, match='tokens'):
        draw([Run(path)], x='tokens')


def test_follow_until_the_run_ends(tmp_path, monkeypatch):
    log = TrainingLogger(tmp_path, {}, {'phase': 'nanoGPT'})
    picture, sizes = Path(log.path).with_name(Path(log.path).stem + '_analysis.png'), []

    def train(_):
        sizes.append((len(Run(log.path).iterations['iter']), picture.stat().st_mtime_ns))
        log.iteration(len(sizes), loss=1.0, lr=1e-3, time_ms=20.0, tokens_per_sec=1e5)
        log.close('completed') if len(sizes) == 3 else log.wait()

    monkeypatch.setattr(vis.time, 'sleep', train)
    assert main([log.path, '--follow', '1', '--metrics', 'loss']) == 0
    assert [count for count, _ in sizes] == [0, 1, 2] and len({when for _, when in sizes}) == 3


def test_reading_while_the_log_is_written(tmp_path):
    log, stop = TrainingLogger(tmp_path, {}, {'phase': 'nanoGPT'}), threading.Event()

    def train():
        i = 0
        while not stop.is_set():
            log.iteration(i, loss=1.0, lr=1e-3, time_ms=20.0, tokens_per_sec=1e5)
            i += 1

    thread = threading.Thread(target=train)
    thread.start()
    try:
        counts, end = [0], time.monotonic() + 20
        while counts[-1] < 1000 and time.monotonic() < end:
            counts.append(len(load_log(log.path)['iterations']))
    finally:
        stop.set()
        thread.join()
    assert counts == sorted(counts) and counts[-1] >= 1000 and len(counts) > 3
    log.close('completed')


def test_600_000_records_within_1_gib_without_a_display(tmp_path):
    """The time, under 10 s on an idle machine, is printed but not asserted: tests run on busy ones, too."""
    path = tmp_path / 'run_big.json'
    before, behind = Path(write_log(tmp_path, steps=0)).read_text().split('"iterations": []')
    rest = [  # the other fields of a record, as long as in a real log
        f'"loss": {3.1 + 1 / (i + 1)}, "lr": 0.0006, "time_ms": {20 + i % 7 / 3}, '
        f'"tokens_per_sec": {24576 / 7}, "mfu": {i % 9 / 13}, '
        '"grad_norm": 0.5432, "peak_memory_bytes": 41234567890}'
        for i in range(1000)
    ]
    with path.open('w') as file:
        file.write(before + '"iterations": [')
        file.writelines(f'{"," if i else ""}\n{{"iter": {i}, {rest[i % 1000]}' for i in range(600_000))
        file.write(']' + behind)
    # ru_maxrss of a child begins with what its parent had, VmHWM does not
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
import visualize_training; assert visualize_training.main(sys.argv[1:]) == 0
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1], file=sys.stderr)
"""
    environment = {key: value for key, value in os.environ.items() if key not in ('DISPLAY', 'WAYLAND_DISPLAY')}
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, '-c', code, path, '--json'], env=environment, capture_output=True, text=True, check=True
    )
    peak_kib = int(process.stderr.split()[-1])
    print(f'{time.perf_counter() - start:.1f} s, {peak_kib / 2**10:.0f} MiB for {path.stat().st_size / 2**20:.0f} MiB')
    assert json.loads(process.stdout)[0]['last_iter'] == 599_999 and peak_kib < 2**20
    assert path.with_name('run_big_analysis.png').exists()
