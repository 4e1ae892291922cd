"""
The JSON log against real kills, full disks, deleted folders and odd values: python -m pytest
tests/test_training_logger.py
"""

import errno
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import training_logger
from conftest import PROGRAMS
from training_logger import PAGE, Speed, TrainingLogger

FOLDER = Path(training_logger.__file__).parent
RUN = {
    'phase': 'nanoGPT',
    'command': 'train.py',
    'world_size': 1,
    'device': 'cpu',
    'versions': {'torch': torch.__version__},
}


def read(log):
    """
    Returns the document in a file, or that of a TrainingLogger once its thread is done; as strictly as JSON gets: no
    NaN, no Infinity, no key twice.
    """
    if isinstance(log, TrainingLogger):
        log.wait()
        log = log.path

    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), f'a key twice in {[key for key, _ in pairs]}'
        return dict(pairs)

    def never(constant):
        raise AssertionError(f'{constant} is not JSON')

    return json.loads(Path(log).read_bytes(), parse_constant=never, object_pairs_hook=unique)


def step(log, i, **changes):
    usual = {
        'loss': 4.0 / (i + 1),
        'lr': 1e-3,
        'time_ms': 20.0,
        'tokens_per_sec': 1e5,
        'mfu': 0.3,
        'grad_norm': 1.0,
        'peak_memory_bytes': 2**30,
    }
    log.iteration(i, **usual | changes)


def child(code, *args):
    """Starts a Python process that imports training_logger and nothing else, and then runs `code`."""
    code = f'import sys; sys.path.insert(0, {str(FOLDER)!r})\nfrom training_logger import *\n{code}'
    return subprocess.Popen(
        [sys.executable, '-S', '-c', code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_schema_and_values(tmp_path):
    log = TrainingLogger(tmp_path, {'learning_rate': 6e-4, 'out_dir': 'out'}, RUN)
    assert read(log)['summary']['iterations'] == 0
    log.evaluation(0, train_loss=4.2, val_loss=4.3, lr=0.0)
    for i in range(12):
        step(log, i, time_ms=1000.0 if i == 0 else 20.0 + i, skipped_steps=0)
    log.evaluation(10, train_loss=3.2, val_loss=3.3, lr=1e-3)
    log.checkpoint(10, path='out/ckpt.pt', bytes=123, seconds=0.5)
    document = read(log)
    assert set(document) == {'schema_version', 'run', 'config', 'iterations', 'evaluations', 'checkpoints', 'summary'}
    assert document['run']['status'] == 'running' and document['run']['end_time'] is None
    assert document['run'].items() >= RUN.items() and document['run']['resumed_from'] is None
    assert document['config'] == {'learning_rate': 6e-4, 'out_dir': 'out'}
    assert [record['iter'] for record in document['iterations']] == list(range(12))
    assert document['iterations'][3] == {
        'iter': 3,
        'loss': 1.0,
        'lr': 1e-3,
        'time_ms': 23.0,
        'tokens_per_sec': 1e5,
        'mfu': 0.3,
        'grad_norm': 1.0,
        'peak_memory_bytes': 2**30,
        'skipped_steps': 0,
    }
    assert document['evaluations'][1] == {'iter': 10, 'train_loss': 3.2, 'val_loss': 3.3, 'lr': 1e-3}
    assert document['checkpoints'] == [{'iter': 10, 'path': 'out/ckpt.pt', 'bytes': 123, 'seconds': 0.5}]
    log.close('completed')
    closed = read(log)
    assert closed['run']['status'] == 'completed' and closed['run']['end_time'].endswith('Z')
    assert {key: closed[key] for key in ('config', 'iterations', 'evaluations', 'checkpoints', 'summary')} == {
        key: document[key] for key in ('config', 'iterations', 'evaluations', 'checkpoints', 'summary')
    }
    summary = closed['summary']
    assert (summary['first_loss'], summary['best_loss'], summary['best_loss_iter'], summary['final_loss']) == (
        4.0,
        4 / 12,
        11,
        4 / 12,
    )
    assert (
        summary['first_val_loss'],
        summary['best_val_loss'],
        summary['best_val_loss_iter'],
        summary['final_val_loss'],
    ) == (4.3, 3.3, 10, 3.3)
    # the median of steps 5 to 11: 25, 26, ... 31 ms
    assert summary['time_ms_mean'] == 28.0 == pytest.approx(summary['time_ms_median'], rel=0.002)
    assert (
        summary['tokens_per_sec_mean'] == 1e5
        and summary['mfu_median'] == pytest.approx(0.3, rel=0.002)
        and summary['peak_memory_bytes'] == 2**30
    )
    assert summary['iterations'] == 12 and summary['dropped_records'] == 0 and summary['total_time_s'] >= 0
    assert os.listdir(tmp_path) == [os.path.basename(log.path)]


def test_values_json_does_not_know(tmp_path):
    config = {
        'path': Path('a'),
        'dtype': torch.bfloat16,
        'betas': (0.9, math.inf),
        'x': np.float32(0.5),
        'name': 'ü"\ud800',
    }
    log = TrainingLogger(tmp_path, config, RUN)
    step(log, 0, loss=math.nan, grad_norm=math.inf, mfu=None, time_ms=np.float64(3.0), lr=torch.tensor(0.5))
    step(log, 1, loss=2.0)
    step(log, 2, loss=np.float32('-inf'))
    log.evaluation(2, train_loss=math.nan, val_loss=math.nan, lr=0.1)
    document = read(log)
    assert document['config'] == {
        'path': 'a',
        'dtype': 'torch.bfloat16',
        'betas': [0.9, None],
        'x': 0.5,
        'name': 'ü"\ud800',
    }
    first = document['iterations'][0]
    assert (first['loss'], first['grad_norm'], first['mfu'], first['time_ms'], first['lr']) == (
        None,
        None,
        None,
        3.0,
        0.5,
    )
    assert (document['summary']['first_loss'], document['summary']['best_loss'], document['summary']['final_loss']) == (
        2.0,
        2.0,
        None,
    )
    assert document['summary']['best_val_loss'] is None
    log.close('completed')


def test_disabled_does_nothing(tmp_path, capfd):
    log = TrainingLogger(tmp_path / 'new', {}, RUN, enabled=False)
    step(log, 0)
    log.evaluation(0, train_loss=1, val_loss=1, lr=1)
    log.checkpoint(0, path='x', bytes=1, seconds=1)
    log.close('completed')
    assert log.path is None and not (tmp_path / 'new').exists() and capfd.readouterr() == ('', '')


def test_two_runs_in_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training_logger.time, 'strftime', lambda form, *_: form.replace('%Y%m%d_%H%M%S', '20260102_030405')
    )
    logs = [TrainingLogger(tmp_path, {}, RUN) for _ in range(3)]
    for i, log in enumerate(logs):
        step(log, i)
        log.close('completed')
    assert [os.path.basename(log.path) for log in logs] == [
        f'run_20260102_030405{suffix}.json' for suffix in ('', '_2', '_3')
    ]
    assert [read(log)['iterations'][0]['iter'] for log in logs] == [0, 1, 2]


def test_many_processes_in_one_second(tmp_path):
    children = [
        child('TrainingLogger(sys.argv[1], {"n": sys.argv[2]}, {}).close("completed")', tmp_path, i) for i in range(6)
    ]
    assert [process.wait() for process in children] == [0] * 6
    assert sorted(read(path)['config']['n'] for path in tmp_path.iterdir()) == [str(i) for i in range(6)]


@contextmanager
def endless_logs(tmp_path):
    """
    start(name) begins a log in a process that writes as fast as it can, and returns its .path, .sent() and
    .end(signal).
    """
    command = [sys.executable, '-S', PROGRAMS / 'log_forever.py', FOLDER]
    quiet = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, text=True, **quiet) as parent:

        def start(name):
            counter = tmp_path / 'counter'
            counter.write_bytes(bytes(8))
            print(tmp_path / name, counter, file=parent.stdin, flush=True)
            pid, path = parent.stdout.readline().split()

            def end(number):
                os.kill(int(pid), number)
                assert parent.stdout.readline() == 'ended\n'

            return SimpleNamespace(path=path, end=end, sent=lambda: int.from_bytes(counter.read_bytes(), 'little'))

        yield start
        parent.stdin.close()


def test_kill_nine_at_200_random_moments(tmp_path):
    """
    Each process writes as fast as it can, over page borders and growing lists, so that most kills hit the logger at
    work.
    """
    moments, behind = random.Random(0), 0
    with endless_logs(tmp_path) as start:
        for i in range(200):
            log = start(str(i))
            time.sleep(moments.uniform(0, 0.03))
            log.end(signal.SIGKILL)
            behind += check_after_a_kill(read(log.path), log.sent())
            os.unlink(log.path)
    assert behind < 100  # the time between record and summary is the smaller part of even this loop: a quarter of it


def check_after_a_kill(document, sent):
    """
    Asserts that a killed log has all records passed to it, except for those in flight. Returns whether its summary
    lacks the last one.
    """
    iters = [record['iter'] for record in document['iterations']]
    assert iters == list(range(len(iters))) and sent - 1 <= len(iters) <= sent + 1
    assert [record['iter'] for record in document['evaluations']] in (
        list(range(0, len(iters), 10)),
        list(range(0, len(iters) - 1, 10)),
    )
    assert document['run']['status'] == 'running' and document['config'] == {'a': 1}
    summary = document['summary']
    assert (
        0 <= len(iters) - summary['iterations'] <= 1 and 0 <= len(document['evaluations']) - summary['evaluations'] <= 1
    )
    if summary['iterations']:
        assert summary['final_loss'] == 1.0 / summary['iterations'] == summary['best_loss']
    return summary['iterations'] < len(iters)


def test_no_write_crosses_a_page_nor_grows_with_the_run(tmp_path, monkeypatch):
    """
    Why a kill is harmless, and a record as cheap at the end as at the start: if it is true of the bytes, it is true of
    the time.
    """
    writes, pwrite, log = [], os.pwrite, TrainingLogger(tmp_path, {}, RUN)
    monkeypatch.setattr(os, 'pwrite', lambda fd, data, at: writes.append((at, len(data))) or pwrite(fd, data, at))
    per_record, copied = [], 0
    for i in range(3000):
        for add in (
            lambda: step(log, i, loss=1 / 3 + i, grad_norm=i / 7),
            lambda: log.evaluation(i, train_loss=i / 3, val_loss=i / 7, lr=1e-3),
        ):
            writes.clear()
            fd = log.fd
            add()
            log.wait()
            if log.fd != fd:  # a list has grown into a new file
                copied += sum(size for _, size in writes)
            else:
                assert len(writes) == 2 and all(at // PAGE == (at + size - 1) // PAGE for at, size in writes)
                per_record.append(sum(size for _, size in writes))
    assert max(per_record[-1000:]) <= max(per_record[:1000]) + 16  # the numbers themselves get longer
    final = os.path.getsize(log.path)
    # growing by half, each of the two lists copies at most 1 + 2/3 + 4/9 + ... = 3 times its final size
    assert copied < 6 * final
    document = read(log)
    assert len(document['iterations']) == len(document['evaluations']) == 3000
    log.close('completed')
    assert os.path.getsize(log.path) < final and read(log)['iterations'] == document['iterations']


class Disk:
    """os.pwrite of a disk that takes `room` more bytes and then fails, after a short write."""

    def __init__(self, monkeypatch):
        self.room, self.pwrite = math.inf, os.pwrite
        monkeypatch.setattr(os, 'pwrite', self)

    def __call__(self, fd, data, at):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.pwrite(fd, data[: int(min(self.room, len(data)))], at)
        self.room -= written
        return written


def test_disk_that_fills_up(tmp_path, monkeypatch, capfd):
    """
    At whichever byte the disk fills up, training continues with one warning; once there is room again, the log
    continues and stays valid.
    """
    for room in (0, 1, 100, 170, 180, 250, 4000, 5000, 9999):
        disk, log = Disk(monkeypatch), TrainingLogger(tmp_path / str(room), {}, RUN)
        for i in range(3):
            step(log, i)
        log.wait()
        disk.room = room
        for i in range(3, 30):
            step(log, i)
        log.wait()
        error = capfd.readouterr().err
        assert error.count('\n') == 1 and 'No space left on device' in error and log.path in error
        disk.room = math.inf
        for i in range(30, 33):
            step(log, i)
        document = read(log)
        iters = [record['iter'] for record in document['iterations']]
        assert iters == sorted(set(iters)) and iters[:3] == [0, 1, 2] and iters[-3:] == [30, 31, 32]
        assert document['summary']['iterations'] == len(iters)
        disk.room = 0
        log.close('completed')  # not even the status can be written, but what is there stays readable
        disk.room = math.inf
        assert capfd.readouterr().err == ''
        monkeypatch.undo()


def test_disk_without_room_to_grow(tmp_path, monkeypatch, capfd):
    log = TrainingLogger(tmp_path, {}, RUN)
    real = os.open
    monkeypatch.setattr(
        os, 'open', lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    )
    for i in range(1000):
        step(log, i)
    full = read(log)
    assert 100 < len(full['iterations']) < 1000 and full['summary']['iterations'] == len(full['iterations'])
    log.evaluation(1000, train_loss=1.0, val_loss=1.0, lr=1e-3)  # this list still has room
    assert read(log)['summary']['dropped_records'] == 1000 - len(full['iterations'])
    monkeypatch.setattr(os, 'open', real)
    step(log, 1001)
    assert len(read(log)['iterations']) == len(full['iterations'])  # not tried again at every step
    log.retry_at = 0.0  # read() has waited for the thread
    step(log, 1002)
    assert read(log)['iterations'][-1]['iter'] == 1002
    assert capfd.readouterr().err.count('\n') == 1
    log.close('completed')
    assert read(log)['run']['status'] == 'completed'


def test_file_size_limit_of_the_system(tmp_path):
    """A real refusal by the kernel (EFBIG), in a process of its own."""
    command = [sys.executable, '-S', PROGRAMS / 'log_to_a_small_disk.py', FOLDER, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True)
    document, error = read(run.stdout.strip()), run.stderr
    assert run.returncode == 0 and error.count('\n') == 1 and 'File too large' in error
    assert 500 < len(document['iterations']) < 3000 and document['run']['status'] == 'completed'
    assert document['summary']['dropped_records'] == 3000 - len(document['iterations'])


@pytest.mark.parametrize('make', ['file', 'parent', 'proc'])
def test_folder_that_cannot_be_written(tmp_path, capfd, make):
    (tmp_path / 'file').write_text('')
    log = TrainingLogger(
        {'file': tmp_path / 'file', 'parent': tmp_path / 'file' / 'out', 'proc': '/proc/out'}[make], {}, RUN
    )
    step(log, 0)
    log.close('completed')
    assert log.path is None and capfd.readouterr().err.count('\n') == 1


def test_deleted_folder(tmp_path, capfd):
    """The log is written again, with all its records, as soon as its folder can be made."""
    log = TrainingLogger(tmp_path / 'out', {}, RUN)
    for i in range(4):
        step(log, i)
        log.wait()
        log.second = 0  # it looks once a second
        if i == 0:
            shutil.rmtree(tmp_path / 'out')
        elif i == 1:
            assert len(read(log)['iterations']) == 2
            shutil.rmtree(tmp_path / 'out')
            (tmp_path / 'out').touch()
        elif i == 2:
            (tmp_path / 'out').unlink()
    assert [record['iter'] for record in read(log)['iterations']] == [0, 1, 3]
    shutil.rmtree(tmp_path / 'out')
    log.close('completed')
    assert read(log)['run']['status'] == 'completed' and read(log)['summary']['dropped_records'] == 1
    assert capfd.readouterr().err.count('\n') == 1


def test_a_disk_that_does_not_answer(tmp_path, monkeypatch):
    """Other ranks would time out while this one waits, so records are kept in memory meanwhile."""
    log, answers, pwrite = TrainingLogger(tmp_path, {}, RUN), threading.Event(), os.pwrite
    monkeypatch.setattr(training_logger, 'PATIENCE_S', 0.05)
    monkeypatch.setattr(os, 'pwrite', lambda *args: (answers.wait(60), pwrite(*args))[1])
    started = time.monotonic()
    for i in range(1000):
        step(log, i)
    assert time.monotonic() - started < 30  # once PATIENCE_S, not once per record or until the disk answers
    answers.set()
    assert [record['iter'] for record in read(log)['iterations']] == list(range(1000))
    log.close('completed')


def test_impossible_records_are_dropped(tmp_path, capfd):
    log = TrainingLogger(tmp_path, {}, RUN)
    step(log, 0, note='x' * 5000)
    step(log, 1, loss=torch.zeros(2))
    log.iteration(2, los=1.0)
    step(log, 3)
    assert [record['iter'] for record in read(log)['iterations']] == [1, 3] and capfd.readouterr().err.count('\n') == 1
    log.close('completed')


@pytest.mark.parametrize('strange', ['x' * 3500, 10**1500, 10**400], ids=['text', '1500 digits', '400 digits'])
def test_the_head_stays_a_page(tmp_path, strange):
    log = TrainingLogger(tmp_path, {}, RUN)
    step(log, 0, loss=strange)
    step(log, 1, loss=2.0, peak_memory_bytes=strange)
    document = read(log)
    assert [record['loss'] for record in document['iterations']] == [strange, 2.0]
    assert document['summary']['first_loss'] == 2.0 and document['summary']['dropped_records'] == 0
    path = log.path
    log.close('x' * 5000)
    assert read(path)['iterations'] == document['iterations']


FORK = """
if os.fork() == 0:  # while the thread writes a record; the child has no such thread and must neither hang nor write
    log.evaluation(1, train_loss=9.0, val_loss=9.0)
    log.close('failed')
    sys.exit()
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
log.close('completed')
"""


# train.py imports it first; its excepthook ends with os._exit
@pytest.mark.parametrize('before', ['', 'import errors'])
@pytest.mark.parametrize(
    ('code', 'status'),
    [
        ('raise ValueError', 'failed'),
        ('sys.exit(1)', 'failed'),
        ('log.close("stopped")', 'stopped'),
        ('log.wait(); os.kill(os.getpid(), 9)', 'running'),
        ('sys.excepthook(*sys.exc_info()); os._exit(1)', 'failed'),
        (FORK, 'completed'),
    ],
)
def test_status_of_every_end(tmp_path, before, code, status):
    start = (
        'log = TrainingLogger(sys.argv[1], {}, {})\nfor i in range(3): log.evaluation(i, train_loss=1.0, val_loss=1.0)'
    )
    process = child(f'{before}\n{start}\n{code}', tmp_path)
    process.communicate(timeout=60)
    (path,) = tmp_path.iterdir()
    document = read(path)
    assert document['run']['status'] == status and [record['iter'] for record in document['evaluations']] == [0, 1, 2]


def test_an_iteration_is_written_at_flush(tmp_path):
    log, deadline = TrainingLogger(tmp_path, {}, RUN), time.monotonic() + 20
    step(log, 0)
    time.sleep(0.05)
    assert read(log.path)['iterations'] == []
    log.flush()
    while not (iterations := read(log.path)['iterations']) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [record['iter'] for record in iterations] == [0]
    log.close('completed')


def test_training_waits_for_the_record_before_and_close_for_the_last(tmp_path, monkeypatch):
    log, disk, done = TrainingLogger(tmp_path, {}, RUN), threading.Event(), []
    pwrite = os.pwrite
    monkeypatch.setattr(os, 'pwrite', lambda *args: disk.wait() and pwrite(*args))
    step(log, 0)  # returns while the disk hangs
    training = threading.Thread(
        target=lambda: (step(log, 1), done.append('step'), log.close('completed'), done.append('close'))
    )
    training.start()
    time.sleep(0.1)
    assert done == []
    disk.set()
    training.join(timeout=20)
    assert done == ['step', 'close'] and len(read(log)['iterations']) == 2 and read(log)['run']['status'] == 'completed'


def test_resumed_run_names_its_predecessor(tmp_path):
    first = TrainingLogger(tmp_path, {}, RUN)
    first.close('stopped')
    second = TrainingLogger(tmp_path, {}, RUN, resumed_from={'log': os.path.basename(first.path), 'iter': 20})
    assert read(second)['run']['resumed_from'] == {'log': os.path.basename(first.path), 'iter': 20}
    second.close('completed')


def test_speed_of_any_stream():
    noise = random.Random(0)
    streams = [
        [20 * math.exp(noise.gauss(0, 0.05)) for _ in range(3000)],
        [noise.choice([1.0, 1000.0]) for _ in range(3000)],
        [5.0] * 100,
    ]
    streams += [
        [30_000.0] + [1e-3 * 1.01**i for i in range(1500)],
        sorted(noise.uniform(1, 9) for _ in range(1000))[::-1],
    ]
    for stream in streams:
        speed = Speed()
        for i, value in enumerate(stream):
            speed.add(value)
            kept = stream[5 : i + 1] if i >= 10 else stream[: i + 1]
            if i < 40 or i % 97 == 0:
                # bins 0.4% wide put a value within 0.2%
                assert speed.median == pytest.approx(statistics.median(kept), rel=1e-9 if i < 10 else 0.00201)
                assert speed.mean == pytest.approx(statistics.fmean(kept))
    for nothing in (None, 0, -1.0, 'fast'):
        speed.add(nothing)
    assert speed.count == len(streams[-1]) - 5


def test_random_numbers_of_training_are_left_alone(tmp_path):
    random.seed(1)
    before = random.getstate()
    log = TrainingLogger(tmp_path, {}, RUN)
    for i in range(20):
        step(log, i)
    log.close('completed')
    assert random.getstate() == before


def test_interrupt_at_any_moment_ends_the_run_with_a_whole_file(tmp_path):
    moments = random.Random(0)
    with endless_logs(tmp_path) as start:
        for i in range(20):
            log = start(str(i))
            time.sleep(moments.uniform(0, 0.02))
            log.end(signal.SIGINT)
            assert read(log.path)['run']['status'] == 'failed'  # train.py catches the signal and says 'stopped'
