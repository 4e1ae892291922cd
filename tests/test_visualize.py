"""
The pictures of training logs, checked by what is drawn: python -m pytest tests/test_visualize.py
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import visualize_training as vis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from training_logger import TrainingLogger
from visualize_training import LogError, Run, draw, label_runs, load_log, main, smoothed, thin

SCRIPT = Path(vis.__file__)


def write_log(folder, phase='nanoGPT', steps=200, start=0, status='completed', speed=1e5, memory=2**31, resumed_from=None, nan_from=None, **config):
    """A log of a simulated run: loss 4 falling to 1, validation 0.1 above it and best at iteration 120, one step of 20 that is slow."""
    config = {'dataset': 'shakespeare_char', 'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'out_dir': str(folder)} | config
    run = {'phase': phase, 'world_size': 4, 'device': 'NVIDIA H200', 'dtype': 'bfloat16', 'parameters': 10_646_784, 'tokens_per_iter': 16384}
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
    """Pairs of texts outside of the plotting areas (titles, labels, ticks, facts) that overlap, and those that are cut off."""
    FigureCanvasAgg(figure).draw()
    boxes = []
    for ax in figure.axes:
        ticks = [label for axis in (ax.xaxis, ax.yaxis) if axis.get_visible() for label in axis.get_ticklabels() if label.get_text()]
        for text in (ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts, *(ticks if ax.axison else ())):
            if text.get_text() and text.get_visible() and (ax.axison or text in ax.texts or text is ax._left_title):
                box = text.get_window_extent()
                low, high = (ax.get_window_extent().min - 2, ax.get_window_extent().max + 2)
                if text in ticks and not (low[0] <= (box.x0 + box.x1) / 2 <= high[0] or low[1] <= (box.y0 + box.y1) / 2 <= high[1]):
                    continue  # the label of a tick outside of the limits is not drawn
                boxes.append((text.get_text(), box))
    size = figure.bbox
    cut = [name for name, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > size.width + 1 or box.y1 > size.height + 1]
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
    assert 'nanoGPT' in figure.get_suptitle() and 'shakespeare_char' in figure.get_suptitle() and 'completed' in figure.get_suptitle()
    loss = axes['loss']
    assert len(line(loss, '_raw').get_xdata()) == 200 and line(loss, '_raw').get_alpha() < 0.5
    assert 'mean of 4 records' in line(loss, 'training').get_label()
    assert line(loss, 'validation').get_xdata().tolist() == [0, 40, 80, 120, 160]
    best = line(loss, 'best validation')
    assert best.get_xdata().tolist() == [120] and f'{1.1 + 3 * math.exp(-4):.4f}' in best.get_label() and '120' in best.get_label()
    assert line(loss, 'checkpoint').get_xdata().tolist() == [50, 100, 150]
    assert {text.get_text() for text in loss.get_legend().get_texts()} >= {'validation', 'checkpoint', best.get_label()}
    assert line(axes['lr'], 'nanoGPT').get_ydata()[:2].tolist() == [1e-3, 1e-3 * (1 - 1 / 400)]
    slow = line(axes['time_ms'], '10 slower')
    assert slow.get_xdata().tolist() == list(range(19, 200, 20)) and slow.get_color() != line(axes['time_ms'], 'median').get_color()
    assert slow.get_ydata().max() <= axes['time_ms'].get_ylim()[1]
    assert axes['mfu'].lines[0].get_ydata()[100] == pytest.approx(40) and '%' in axes['mfu'].get_ylabel()
    assert axes['peak_memory_bytes'].lines[0].get_ydata()[0] == 2.0 and 'GiB' in axes['peak_memory_bytes'].get_ylabel()
    for fact in ('completed', 'nanoGPT', '10.6M parameters', '6 layers, 6 heads, 384 wide', 'shakespeare_char', '16,384 tokens', '4 × NVIDIA H200'):
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
    assert set(axes) == {'loss', *vis.BARS}
    legend = [text.get_text() for text in axes['loss'].get_legend().get_texts()]
    assert legend == ['nanoGPT', 'phase1_zero1', 'phase3_fsdp', 'validation']
    assert len({line(axes['loss'], name).get_color() for name in legend[:3]}) == 3
    bars = {name: [patch.get_width() for patch in axes[name].patches] for name in vis.BARS}
    assert bars['tokens_per_sec_median'] == pytest.approx([1e5, 9e4, 2e5]) and bars['peak_memory_bytes'] == [2.0, 1.0, 0]
    assert [text.get_text() for text in axes['tokens_per_sec_median'].texts] == ['100k  baseline', '90k  0.900×', '200k  2.000×']
    assert [text.get_text() for text in axes['peak_memory_bytes'].texts] == ['2  baseline', '1  0.500×', 'not recorded']
    assert [label.get_text() for label in axes['tokens_per_sec_median'].get_yticklabels()] == legend[:3]
    assert overlaps(figure) == []


def test_more_runs_than_colors_differ_all_the_same(tmp_path):
    runs = vis.load_runs([write_log(tmp_path / str(i), steps=12) for i in range(12)])
    lines = [each for each in axes_of(draw(runs))['loss'].lines if not each.get_label().startswith('_')]
    assert len(lines) == 12 == len({(each.get_color(), str(each._unscaled_dash_pattern)) for each in lines})
    assert [each.get_linestyle() for each in lines] == ['-'] + ['--'] * 11  # a solid one would cover those that it agrees with


def test_labels_say_what_differs(tmp_path):
    def labels(*logs):
        runs = [Run(path) for path in logs]
        label_runs(runs)
        return [run.label for run in runs]

    a, b, c = (write_log(tmp_path / name, 'phase1_zero1', steps=2) for name in 'abc')
    triton = write_log(tmp_path / 'd', 'phase1_zero1', steps=2, model_dir='../phase2_triton')
    reference = write_log(tmp_path / 'a', 'nanoGPT', steps=2)
    again = write_log(tmp_path / 'a', 'phase1_zero1', steps=2)
    assert labels(a, reference) == ['phase1_zero1', 'nanoGPT']
    assert labels(a, b, c, triton) == ['phase1_zero1, a', 'phase1_zero1, b', 'phase1_zero1, c', 'phase1_zero1 with phase2_triton']
    assert labels(a, again) == [f'phase1_zero1, {os.path.basename(path)}' for path in (a, again)]


def test_crashed_run_with_nulls(tmp_path):
    figure = draw([Run(write_log(tmp_path, status='failed', nan_from=150, memory=None))])
    axes = axes_of(figure)
    assert line(axes['loss'], 'loss not finite: 50 records').get_xdata().tolist() == list(range(150, 200))
    assert len(line(axes['loss'], '_raw').get_xdata()) == 150
    assert line(axes['loss'], 'training').get_xdata().max() == 149  # no mean of what was before goes on behind it
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
    """Where a metric ends before the others, there is nothing, and one sees since when."""
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
        log.checkpoint(i, path='ckpt.pt')
    log.close('completed')
    assert line(axes_of(draw([Run(log.path)]))['loss'], 'checkpoint').get_xdata().tolist() == [1200, 1201, 1400]


def test_running_and_dead(tmp_path):
    path = Path(write_log(tmp_path, steps=30, status='running'))
    assert Run(path).status == 'running'
    log = json.loads(path.read_text())
    for minutes, slowest_ms, status in ((9, 100, 'running'), (11, 100, 'died'), (11, 60_000, 'running'), (30, 60_000, 'died')):
        log['run']['last_record_time'] = (datetime.now(UTC) - timedelta(minutes=minutes)).strftime('%Y-%m-%dT%H:%M:%SZ')
        log['iterations'][3]['time_ms'] = slowest_ms
        path.write_text(json.dumps(log))
        assert Run(path).status == status
    assert 'died, last record 30.0 min ago' in texts(axes_of(draw([Run(path)]))['facts'])


def test_resumed_chain_is_one_run(tmp_path):
    first = write_log(tmp_path, steps=130, status='stopped')
    second = write_log(tmp_path, start=100, steps=170, status='running', resumed_from={'log': os.path.basename(first), 'iter': 100})
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
    assert load_log(third)['iterations'][0]['iter'] == 100  # what there is
    nameless = write_log(tmp_path / 'other', start=100, resumed_from={'log': None, 'iter': 100})  # the checkpoint was one of upstream's
    assert load_log(nameless)['segments'] == [nameless]


def test_axes_smoothing_and_metrics(tmp_path):
    run = Run(write_log(tmp_path))
    tokens = axes_of(draw([run], x='tokens', metrics=['loss', 'lr']))
    assert set(tokens) == {'loss', 'lr', 'facts'} and line(tokens['loss'], '_raw').get_xdata()[-1] == 199 * 16384
    assert 'tokens' in tokens['loss'].get_xlabel()
    seconds = axes_of(draw([run], x='time', smooth=1))['loss']
    assert line(seconds, '_raw').get_xdata()[-1] == pytest.approx((190 + 10 * 8) * 0.16384) and 'seconds' in seconds.get_xlabel()
    assert line(seconds, 'training').get_ydata().tolist() == line(seconds, '_raw').get_ydata().tolist()
    overlaid = axes_of(draw([run, run], metrics=['time_ms', 'grad_norm']))
    assert set(overlaid) == {'time_ms', 'grad_norm', *vis.BARS}


def test_smoothing():
    values = np.array([5.0, 4, 3, 2, 1, 1, 1, math.nan, 1, 1])
    assert smoothed(values, 1)[:7].tolist() == values[:7].tolist() and math.isnan(smoothed(values, 1)[7])
    assert smoothed(np.linspace(4, 1, 100), 20)[:80] == pytest.approx(np.linspace(4, 1, 100)[:80])  # no lag behind a falling loss
    assert np.isfinite(smoothed(values, 8)).all() and np.isnan(smoothed(np.full(20, math.nan), 8)).all()
    assert smoothed(np.full(50, 2.0), 9) == pytest.approx(np.full(50, 2.0))
    x, y = thin(np.arange(100_000.0), np.where(np.arange(100_000) == 77_777, 9.0, 1.0))
    assert len(x) < 5000 and y.max() == 9 and x[y == 9].tolist() == [77_777] and (x[0], x[-1]) == (0, 99_999)


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old, new = (os.path.relpath(write_log(Path(name), phase)) for name, phase in (('out-old', 'nanoGPT'), ('out-new', 'phase1_zero1')))
    os.utime(old, (1, 1))
    assert main([]) == 0
    picture = Path(new).with_name(Path(new).stem + '_analysis.png')
    assert picture.read_bytes()[:4] == b'\x89PNG' and f'wrote {picture}' in capsys.readouterr().out
    assert main(['out-old', 'out-*/run_*.json', '--json', '--title', 'Mine']) == 0  # the first one twice is one run
    table = json.loads(capsys.readouterr().out)
    assert [row['label'] for row in table] == ['nanoGPT', 'phase1_zero1'] and table[1]['tokens_per_sec_median_ratio'] == pytest.approx(1)
    assert table[0]['best_val_loss_iter'] == 120 and table[0]['peak_memory_bytes'] == 2**31
    assert Path(old).with_name(Path(old).stem + '_comparison_analysis.png').exists()
    assert main(['out-new', '--output', 'curve.svg', '--metrics', 'loss', '--x', 'time', '--smooth', '3']) == 0
    assert b'<svg' in Path('curve.svg').read_bytes() and not list(Path().glob('*.tmp*'))


def document(**changes):
    return json.dumps({'run': {'start_time': '2026-01-01T00:00:00Z'}, 'config': {}, 'iterations': [], 'evaluations': [], 'checkpoints': []} | changes)


NO_JSON = ('{"iterations": [', '', '\udcff\udcfe')
NO_LOG = ('[1, 2]', '{"model": 1}', document(iterations=[{'loss': 1}]), document(iterations=[{'iter': 0, 'loss': {}}]), document(evaluations=[3]))


@pytest.mark.parametrize(
    ('content', 'words'), [(text, 'not a JSON document') for text in NO_JSON] + [(text, 'not a training log') for text in NO_LOG]
)
def test_what_is_no_log_gets_one_message(tmp_path, capsys, content, words):
    path = tmp_path / 'run_1.json'
    path.write_bytes(content.encode('utf-8', 'surrogateescape'))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and words in error and str(path) in error


def test_other_mistakes_get_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_log(Path('elsewhere'), steps=2)
    for argv, words in (
        ([], 'no run_*.json in out*/'),
        (['nothing-*.json'], 'no such file'),
        (['.git'], 'no such file'),
        ([path, '--output', 'no/where.png'], 'no/where'),
        ([path, '--output', 'x.docx'], 'docx'),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and words in error
    for argv in ([path, '--metrics', 'losses'], [path, '--smooth', '0'], [path, '--x', 'epochs'], [path, '--follow', '-1']):
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
    rest = [  # of a record, as long as real ones are
        f'"loss": {3.1 + 1 / (i + 1)}, "lr": 0.0006, "time_ms": {20 + i % 7 / 3}, "tokens_per_sec": {24576 / 7}, "mfu": {i % 9 / 13}, '
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
    process = subprocess.run([sys.executable, '-c', code, path, '--json'], env=environment, capture_output=True, text=True, check=True)
    peak_kib = int(process.stderr.split()[-1])
    print(f'{time.perf_counter() - start:.1f} s, {peak_kib / 2**10:.0f} MiB for {path.stat().st_size / 2**20:.0f} MiB')
    assert json.loads(process.stdout)[0]['last_iter'] == 599_999 and peak_kib < 2**20
    assert path.with_name('run_big_analysis.png').exists()
