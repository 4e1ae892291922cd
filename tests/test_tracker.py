"""Trackers: what they are sent, and that none of their faults costs a run anything but one warning."""

import importlib
import json
import sys
import time

import pytest

from conftest import NANOGPT, TINY, load, log_of
from errors import UserError

# a wandb that writes what it is sent to sent.json; ACT stands where the fault goes
WANDB = """
import json, sys, time
if STAGE == 'import': ACT
sent = []
def init(project, name, config):
    assert (project, name) == ('owt', 'gpt2') and config['n_layer'] == 2
    if STAGE == 'init': ACT
def log(record):
    sent.append(record)
    if STAGE == 'log' and len(sent) == 3: ACT
def finish():
    if STAGE == 'finish': ACT
    json.dump(sent, open('sent.json', 'w'))
"""
ACTS = {
    'raises': "raise ValueError('offline')",
    'exits': "sys.exit('offline')",
    'hangs': 'time.sleep(1e6)',
    'asks': 'input()',
}


def start(work, stage='none', act='pass', name='wandb'):
    """
    Writes the module `name` and a script that runs train.py with it, and with short time limits; returns the script.
    """
    (work / 'modules').mkdir()
    (work / 'modules' / f'{name}.py').write_text(f'STAGE = {stage!r}\n' + WANDB.replace('ACT', act))
    script = work / 'tracked.py'
    script.write_text(f"""
import runpy, sys
sys.path[:0] = [{str(work / 'modules')!r}, {str(NANOGPT)!r}]
import tracker
tracker.INIT_SECONDS = tracker.FINISH_SECONDS = 0.3
sys.argv[0] = {str(NANOGPT / 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
""")
    return script


@pytest.mark.parametrize('stage', ['import', 'init', 'log', 'finish'])
@pytest.mark.parametrize('act', ACTS)
def test_a_fault_is_one_warning(launch, work, stage, act):
    """The run is the same as without a tracker: all checkpoints, all records of the log, status 0."""
    script = start(work, stage, ACTS[act])
    run = launch(script, *TINY, '--eval_interval=5', '--wandb_log', timeout=40)
    assert run.stderr.count('WARNING: wandb: ') == 1 and 'Traceback' not in run.stderr, run
    assert load('out/ckpt.pt')['iter_num'] == 21
    log = log_of('out')
    assert log['run']['status'] == 'completed' and [c['iter'] for c in log['checkpoints']] == [5, 10, 15, 20, 21]
    if stage == 'log' and act != 'hangs':  # those after the fault too
        assert [record['iter'] for record in json.load(open('sent.json'))] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize('nproc', [1, 2])
@pytest.mark.parametrize(
    'flag, name', [('--wandb_log', 'wandb'), ('--tracker=wandb', 'wandb'), ('--tracker=trackio', 'trackio')]
)
def test_what_a_tracker_is_sent(launch, work, flag, name, nproc):
    run = launch(start(work, name=name), *TINY, flag, nproc=nproc)
    assert run.stderr == ''
    sent, evaluations = json.load(open('sent.json')), log_of('out')['evaluations']
    assert [(r['iter'], r['val/loss'], r['train/loss'], r['lr']) for r in sent] == [
        (e['iter'], e['val_loss'], e['train_loss'], e['lr']) for e in evaluations
    ]


def test_a_run_that_fails_finishes_its_tracker_before_the_report(launch, work):
    (work / 'out').mkdir()
    script = start(work, 'finish', "print('finished', file=sys.stderr)")
    run = launch(script, *TINY, '--wandb_log', '--learning_rate=1e30', '--grad_clip=0', check=False)
    assert run.returncode == 2 and run.stderr.startswith('finished\nerror: training diverged'), run
    assert json.load(open('sent.json')) and log_of('out')['run']['status'] == 'failed'


def test_two_ranks_end_with_a_tracker_that_hangs(launch, work):
    run = launch(start(work, 'finish', ACTS['hangs']), *TINY, '--wandb_log', nproc=2, timeout=40)
    assert run.stderr.count('WARNING') == 1 and log_of('out')['run']['status'] == 'completed'


def test_tensorboard(work, monkeypatch):
    """With a stand-in for the package: scalars by iteration, in the run's own folder."""
    (work / 'writer.py').write_text(
        'calls = []\nclass SummaryWriter:\n    def __init__(self, folder): calls.append(folder)\n'
        '    def add_scalar(self, *args): calls.append(args)\n    def flush(self): pass\n    def close(self): calls.append("closed")\n'
    )
    monkeypatch.syspath_prepend(work)
    import end_of_run
    import tracker

    monkeypatch.setitem(tracker.TRACKERS, 'tensorboard', ('writer', tracker.open_tensorboard))
    board = tracker.Tracker({'wandb_log': False, 'tracker': 'tensorboard', 'out_dir': 'out'})
    board.log({'iter': 3, 'val/loss': 1.5})
    assert end_of_run.end_run()
    assert importlib.import_module('writer').calls == ['out/tensorboard', ('val/loss', 1.5, 3), 'closed']


def test_a_record_costs_no_time(work, monkeypatch):
    """A tracker whose calls take a second each delays neither its start's caller nor log()."""
    (work / 'wandb.py').write_text(
        'import time\ndef init(**kwargs): time.sleep(1)\ndef log(record): time.sleep(1)\ndef finish(): pass\n'
    )
    monkeypatch.syspath_prepend(work)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    import end_of_run
    import tracker

    monkeypatch.setattr(tracker, 'INIT_SECONDS', 0)
    monkeypatch.setattr(tracker, 'FINISH_SECONDS', 0)
    started = time.monotonic()
    slow = tracker.Tracker({'wandb_log': True, 'wandb_project': '', 'wandb_run_name': ''})
    for i in range(100):
        slow.log({'iter': i})
    assert not end_of_run.end_run()  # it has not finished
    assert time.monotonic() - started < 0.9  # less than one of its 102 calls
    sys.modules.pop('wandb', None)


def test_unknown_and_disabled_trackers():
    from tracker import Tracker

    config = {'wandb_log': False, 'tracker': 'notebook'}
    with pytest.raises(UserError, match="tracker is 'notebook', but it can be wandb, trackio, tensorboard or empty"):
        Tracker(config)
    Tracker({'wandb_log': True}, enabled=False).log({'iter': 0})  # as on ranks other than 0
    Tracker({'wandb_log': False, 'tracker': ''}).log({'iter': 0})
