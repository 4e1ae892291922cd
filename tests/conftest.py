"""
Fixtures of all tests. nanoGPT/ comes first on the path, so `import model` is the reference model; the Triton kernels
come after it.
"""

import glob
import json
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NANOGPT = ROOT / 'nanoGPT'
PROGRAMS = ROOT / 'tests' / 'programs'
TORCHRUN = PROGRAMS / 'torchrun.py'
sys.path[:0] = [str(NANOGPT), str(NANOGPT / 'data'), str(ROOT / 'tests')]
sys.path.append(str(ROOT / 'phase2_triton'))
os.environ['OMP_NUM_THREADS'] = '1'  # for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would those
torch.set_num_threads(1)

from launcher import Launcher

# flags of train.py for a model so small that a step takes a millisecond
TINY = [
    '--dataset=letters',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=2',
    '--max_iters=20',
    '--eval_interval=10',
    '--eval_iters=3',
    '--warmup_iters=5',
    '--lr_decay_iters=20',
    '--learning_rate=1e-2',
    '--min_lr=1e-3',
    '--device=cpu',
    '--log_interval=1',
]


def pytest_addoption(parser):
    parser.addoption('--regenerate-golden', action='store_true', help='rewrite tests/golden_losses.json')


@pytest.fixture(scope='session')
def launch():
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope='session')
def launch_interpreted():
    """
    Like launch, but Triton's kernels run on the CPU, in its interpreter, which must be chosen before Triton is
    imported.
    """
    launcher = Launcher(TRITON_INTERPRET='1')
    yield launcher
    launcher.close()


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to run in, with the data set `letters`."""
    make_letters(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_letters(path):
    """Makes the data set path/data/letters: 4,000 random characters out of 40, in an order that a model can learn."""
    folder = path / 'data' / 'letters'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.integers(1, 4, 4000)) % 40  # each character is 1 to 3 after the last: log(3) = 1.10 nats
    ids[:3600].astype(np.uint16).tofile(folder / 'train.bin')
    ids[3600:].astype(np.uint16).tofile(folder / 'val.bin')
    chars = [chr(ord('0') + i) for i in range(40)]
    meta = {'vocab_size': 40, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))


def losses(stdout):
    """Returns the step and iter lines of a run, without times."""
    return [line.split(', time')[0] for line in stdout.splitlines() if line.startswith(('step ', 'iter '))]


def load(path):
    """Returns a checkpoint, read without running code."""
    return torch.load(path, map_location='cpu', weights_only=True)


def log_of(out_dir):
    """Returns the newest log in out_dir."""
    with open(sorted(glob.glob(f'{out_dir}/run_*.json'))[-1]) as f:
        return json.load(f)


def assert_same(a, b, but=(), path=''):
    """Asserts that two values are equal in every type and bit, except for the keys `but` of any dict."""
    # an OrderedDict may replace a dict
    assert type(a) is type(b) or (isinstance(a, dict) and isinstance(b, dict)), path
    if isinstance(a, dict):
        assert [k for k in a if k not in but] == [k for k in b if k not in but], path
        for k in a:
            if k not in but:
                assert_same(a[k], b[k], but, f'{path}.{k}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, but, f'{path}.{i}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path
