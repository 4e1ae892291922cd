"""benchmarks/bench_peers.py, with stand-ins for nanoGPT and llm.c that print the same lines."""

import json
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT

UPSTREAM = """import sys
assert '--batch_size=2' in sys.argv and '--gradient_accumulation_steps=3' in sys.argv
print('step 0: train loss 10.6224, val loss 10.6335')
if '--max_iters=100' in sys.argv:
    print('step 100: train loss 2.1000, val loss 2.2000')
for i in range(4):
    print(f'iter {i}: loss 10.6, time {[9000, 200, 210, 190][i]:.2f}ms, mfu -100.00%')
"""
LLMC = """#!/bin/sh
echo 'val loss 11.012345'
for ms in 400.00 100.00 105.00 95.00; do
    echo "step    1/4 | loss 11.01 (+nanz)| norm 15.3 (+nanz)| lr 6.00e-04 | $ms ms | 52.1% bf16 MFU | 521000 tok/s"
done
"""


@pytest.fixture
def peers(tmp_path):
    """run(*flags): the finished benchmark, on a data set of ten tokens."""
    for split in ('train', 'val'):
        np.arange(10, dtype=np.uint16).tofile(tmp_path / f'{split}.bin')
    (tmp_path / 'train.py').write_text(UPSTREAM)
    (tmp_path / 'train_gpt2cu').write_text(LLMC)
    (tmp_path / 'train_gpt2cu').chmod(0o755)

    def run(*flags):
        command = [sys.executable, ROOT / 'benchmarks/bench_peers.py', f'--nanogpt={tmp_path}', f'--data={tmp_path}']
        sizes = ['--iterations=4', '--timed=3', '--batch_size=2', '--micro_steps=3', '--rounds=2']
        return subprocess.run([*command, *sizes, *flags], capture_output=True, text=True)

    return run


def test_times_and_first_losses_side_by_side(peers, tmp_path):
    done = peers(f'--llmc={tmp_path}/train_gpt2cu', '--only=upstream;llm.c', f'--out={tmp_path}/peers.json')
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / 'peers.json').read_text())
    assert [row['name'] for row in report['rows']] == ['upstream nanoGPT, compiled', 'llm.c'] * 2, 'in turns'
    upstream, llmc = report['rows'][:2]
    assert upstream['ms'] == [200, 210, 190] and llmc['ms'] == [100, 105, 95], 'without the first iteration'
    assert (upstream['first_train_loss'], upstream['first_val_loss']) == (10.6224, 10.6335)
    assert llmc['first_val_loss'] == 11.012345
    ratios = '| 2.000 (2.000 to 2.000) | 1.000 (1.000 to 1.000) |'
    assert f'| llm.c | 100.0 | 61,440 (61,440 to 61,440) {ratios}' in done.stdout


def test_losses_after_some_steps(peers, tmp_path):
    done = peers('--steps=100', '--only=upstream', f'--out={tmp_path}/peers_losses.json')
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / 'peers_losses.json').read_text())['rows']
    assert row['evaluations'] == [[0, 10.6224, 10.6335], [100, 2.1, 2.2]]
    assert '| 10.6224, 10.6335 | 2.1000, 2.2000 | +0.0000 |' in done.stdout


@pytest.mark.parametrize('missing', ['train.py', 'val.bin'])
def test_what_is_missing_is_named(peers, tmp_path, missing):
    (tmp_path / missing).unlink()
    done = peers(f'--out={tmp_path}/peers.json')
    assert done.returncode != 0 and f'there is no {tmp_path}/{missing}' in done.stderr


def test_a_program_that_fails_ends_the_benchmark(peers, tmp_path):
    (tmp_path / 'train.py').write_text('raise SystemExit("no GPU")')
    done = peers(f'--out={tmp_path}/peers.json', '--only=upstream')
    assert done.returncode != 0 and 'failed in' in done.stderr and 'no GPU' in done.stderr
