"""
Promises that every trainer keeps: exact resumes, half precision, the latest and the best checkpoint, kills, and full
disks. FSDP_KILLS=20 kills FSDP more often.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conftest import PROGRAMS, ROOT, TINY, assert_same, load, losses

RESUME = '--init_from=resume'
CONVERT = ROOT / 'phase3_fsdp' / 'sharded_checkpoint.py'


@dataclass(frozen=True)
class Trainer:
    folder: str
    nproc: int
    flags: tuple = ()

    def __str__(self):
        return f'{self.folder}{"+sharded" * self.sharded}-{self.nproc}'

    @property
    def script(self):
        return ROOT / self.folder / 'train.py'

    @property
    def sharded(self):
        return '--ckpt_format=sharded' in self.flags


ALONE = Trainer('nanoGPT', 1)
DDP = Trainer('nanoGPT', 2)
ZERO1 = Trainer('phase1_zero1', 2)
FSDP = Trainer('phase3_fsdp', 2, ('--fsdp_min_num_params=1',))  # a unit for each block
SHARDED = Trainer('phase3_fsdp', 2, ('--fsdp_min_num_params=1', '--ckpt_format=sharded'))


@pytest.fixture
def train(launch, work):
    """train(trainer, *flags, program=..., **options of launch) runs it, by way of one of programs/ if there is one."""

    def train(trainer, *flags, program=None, **options):
        scripts = [trainer.script] if program is None else [PROGRAMS / program, trainer.script]
        return launch(*scripts, *TINY, *trainer.flags, *flags, nproc=trainer.nproc, **options)

    return train


@pytest.fixture
def saved(launch, work):
    """
    saved(trainer, out_dir='out', name='ckpt') returns the trainer's checkpoint, a sharded one converted to a file.
    """

    def saved(trainer, out_dir='out', name='ckpt'):
        if not trainer.sharded:
            return load(f'{out_dir}/{name}.pt')
        assert not os.path.exists(f'{out_dir}/ckpt.pt')
        shutil.copytree(out_dir, 'copy')
        assert 'wrote copy/ckpt.pt\n' in launch(CONVERT, 'full', 'copy').stdout
        checkpoint = load(f'copy/{name}.pt')
        shutil.rmtree('copy')
        return checkpoint

    return saved


@pytest.mark.parametrize(
    'trainer, dropout',
    [(ALONE, 0.0), (ALONE, 0.2), (DDP, 0.0), (DDP, 0.2), (ZERO1, 0.2), (FSDP, 0.2), (SHARDED, 0.2)],
    ids=str,
)
def test_resume_is_exact(train, saved, trainer, dropout):
    """20 iterations at once, and 7 + 13: every digit that is printed and every bit that is saved."""
    dropout = f'--dropout={dropout}'
    once = train(trainer, dropout, '--out_dir=once')
    first = train(trainer, dropout, '--max_iters=6', '--out_dir=twice')
    second = train(trainer, dropout, RESUME, '--out_dir=twice')
    assert losses(once.stdout) == losses(first.stdout) + losses(second.stdout)
    of_the_run = ('out_dir', 'init_from', 'max_iters', 'log')
    assert_same(saved(trainer, 'once'), saved(trainer, 'twice'), but=of_the_run)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('trainer', [ALONE, FSDP], ids=str)
def test_half_precision_learns(train, trainer, dtype):
    """
    The loss is float32's up to the rounding of 8 or 11 bits of mantissa, after 40 steps in which it fell from 3.7.
    """
    flags = ['--max_iters=40', '--lr_decay_iters=40', '--eval_interval=40']
    exact = train(Trainer('nanoGPT', trainer.nproc), *flags, '--out_dir=exact')
    half = train(trainer, f'--dtype={dtype}', *flags)
    last = [float(re.search(r'step 40: .* val loss (\S+)', run.stdout)[1]) for run in (half, exact)]
    assert abs(last[0] - last[1]) < 0.02 and last[1] < 2
    resumed = train(trainer, f'--dtype={dtype}', RESUME, '--max_iters=45').stdout
    assert float(re.search(r'iter 41: loss (\S+?),', resumed)[1]) < 2


@pytest.mark.parametrize('trainer', [ALONE, SHARDED], ids=str)
def test_latest_and_best_are_both_kept(train, saved, trainer):
    """With a learning rate that ruins the model after iteration 10 the best stays that of iteration 10."""
    train(trainer, '--max_iters=10')
    best = saved(trainer, name='ckpt_best')
    ruinous = [RESUME, '--learning_rate=3', '--min_lr=3']
    train(trainer, *ruinous)
    assert saved(trainer)['iter_num'] == 21 and best['iter_num'] == 10
    assert_same(saved(trainer, name='ckpt_best'), best)
    # with always_save_checkpoint off only improvements and the last iteration are saved
    out = train(trainer, *ruinous, '--always_save_checkpoint=False', '--max_iters=35').stdout
    assert out.count('saving checkpoint') == 1 and saved(trainer)['iter_num'] == 36


@pytest.mark.parametrize(
    'trainer, kills, seconds',
    [
        (ALONE, 50, 0.25),
        (FSDP, int(os.environ.get('FSDP_KILLS', 3)), 0.6),
        (SHARDED, int(os.environ.get('FSDP_KILLS', 3)), 0.6),
    ],
    ids=str,
)
def test_killed_while_it_saves(train, saved, trainer, kills, seconds):
    """
    kill -9 of one rank at a random moment of a run that saves after each step, now and then also while it starts. Each
    run continues from the last complete checkpoint.
    """
    moments = torch.Generator().manual_seed(0)
    each_step = ['--eval_interval=1', '--eval_iters=1']
    train(trainer, *each_step, '--max_iters=1')
    reached, progress = saved(trainer)['iter_num'], 0
    for i in range(kills):
        env = dict(
            FAULT='kill', VICTIM=str(i % trainer.nproc), DELAY=str(seconds * torch.rand((), generator=moments).item())
        )
        env['EARLY'] = str(int(i % 5 == 4))
        Path('started').unlink(missing_ok=True)
        flags = [*each_step, RESUME, '--max_iters=1000000']
        run = train(trainer, *flags, program='disturbed.py', env=env, check=False)
        assert run.returncode != 0 and 'does not fit' not in run.stderr and 'is incomplete' not in run.stderr
        latest = saved(trainer)
        for checkpoint in (latest, saved(trainer, name='ckpt_best')):
            assert all(torch.isfinite(v).all() for v in checkpoint['model'].values())
        assert latest['iter_num'] >= reached
        progress += latest['iter_num'] > reached
        reached = latest['iter_num']
    last = train(trainer, RESUME, f'--max_iters={reached + 20}', '--eval_interval=1000')
    assert f'iter {reached}:' in last.stdout and 'nan' not in last.stdout and progress >= max(1, kills // 4)


@pytest.mark.parametrize('trainer', [ALONE, SHARDED], ids=str)
def test_full_disk_is_a_warning_until_the_end(train, saved, trainer):
    """
    A limit on the size of files stands for the disk: writes fail in the middle, at iterations 20 and 30 and at the end.
    """
    train(trainer, '--max_iters=10')
    before = saved(trainer)
    flags = [RESUME, '--max_iters=30', '--lr_decay_iters=30']
    run = train(trainer, *flags, program='small_disk.py', check=False)
    assert 'iter 30:' in run.stdout and run.returncode == 2 and 'Traceback' not in run.stderr
    assert 'training continues' in run.stderr and run.stderr.count('error: ') == 1
    assert run.stderr.count('[Errno 27] File too large') == 3  # the reason, not torch's position in the file
    assert_same(saved(trainer), before)
    assert not os.path.exists('out/ckpt.pt.tmp')
    assert 'iter 11:' in train(trainer, RESUME, '--max_iters=12').stdout
