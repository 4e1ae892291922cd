"""
slurm.sh, with stand-ins for srun, scontrol and scancel (programs/slurm/): a SIGUSR1 to the batch script leads to a
checkpoint and a requeue, and the next start continues to the end. (The real Slurm is not part of this.)
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import NANOGPT, PROGRAMS, ROOT, TINY, losses


@pytest.fixture
def sbatch(work):
    env = dict(
        os.environ,
        PATH=f'{PROGRAMS / "slurm"}:{os.environ["PATH"]}',
        PYTHON=sys.executable,
        PYTHONUNBUFFERED='1',
        SLURM_JOB_ID=str(os.getpid()),  # slurm.sh derives a port from it
        SLURM_NNODES='2',
        SLURM_JOB_NODELIST='machine[1-2]',
    )

    def start(*args):
        for name in ('tasks', 'requeued'):
            if os.path.exists(name):
                os.remove(name)
        with open('slurm.out', 'a') as out:  # --open-mode=append
            return subprocess.Popen([ROOT / 'slurm.sh', *args], stdout=out, stderr=subprocess.STDOUT, env=env)

    return start


def test_saves_requeues_and_continues(launch, work, sbatch):
    flags = [*TINY, '--max_iters=300', '--lr_decay_iters=300', '--eval_interval=1000', '--dropout=0.1']
    job = sbatch(NANOGPT / 'train.py', *flags)
    while '\niter 50:' not in open('slurm.out').read():
        assert job.poll() is None, open('slurm.out').read()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) != 0 and os.path.exists('requeued')
    stopped = losses(open('slurm.out').read())
    assert len(stopped) < 300

    job = sbatch(NANOGPT / 'train.py', *flags)  # as Slurm would
    assert job.wait(timeout=120) == 0 and not os.path.exists('requeued')
    assert losses(open('slurm.out').read()) == losses(
        launch(NANOGPT / 'train.py', *flags, '--out_dir=once', nproc=2).stdout
    )


@pytest.mark.full
def test_a_mistake_is_not_requeued(work, sbatch):
    assert sbatch(NANOGPT / 'train.py', *TINY, '--batch_size=0').wait(timeout=120) != 0
    assert not os.path.exists('requeued') and 'batch_size=0' in open('slurm.out').read()
