"""FP8 on two ranks, in Triton's interpreter on the CPU: the trainers of DDP, ZeRO-1 and FSDP."""

import shutil

import pytest

from conftest import NANOGPT, PROGRAMS, ROOT, TINY, log_of, make_letters

FLAGS = [
    *TINY,
    '--model_dir=../phase2_triton',
    '--dtype=bfloat16',
    '--fp8',
    '--n_layer=2',
    '--block_size=8',
    '--batch_size=2',
    '--warmup_iters=0',
    '--eval_iters=1',
    '--eval_interval=2',
    '--max_iters=2',
]


def records(out_dir, key):
    return [record[key] for record in log_of(out_dir)['iterations']]


@pytest.fixture(scope='module')
def with_ddp(launch_interpreted, tmp_path_factory):
    """The losses of three iterations with DDP."""
    folder = tmp_path_factory.mktemp('ddp')
    make_letters(folder)
    launch_interpreted(NANOGPT / 'train.py', *FLAGS, '--eval_interval=9', nproc=2, cwd=folder)
    return records(folder / 'out', 'loss')


@pytest.mark.parametrize(
    'folder, options',
    [('phase1_zero1', []), ('phase3_fsdp', ['--fsdp_min_num_params=1', '--ckpt_format=sharded'])],
    ids=['ZeRO-1', 'FSDP'],
)
def test_sharded(launch_interpreted, with_ddp, work, folder, options):
    """They have DDP's losses. Each rank resumes with its own scales, so a resumed run repeats the loss exactly."""
    run = [ROOT / folder / 'train.py', *FLAGS, *options]
    out = launch_interpreted(*run, nproc=2).stdout
    assert out.count('using FP8 in forward and for input gradients\n') == 1
    before = records('out', 'loss')
    if folder == 'phase3_fsdp':
        # FSDP rounds weights, gradients and the residual stream to bfloat16
        assert before == pytest.approx(with_ddp, rel=3e-3)
        shutil.copy('out/ckpt_sharded/best', 'out/ckpt_sharded/latest')
    else:
        assert before == pytest.approx(with_ddp, rel=1e-6)  # the same numbers, added in another order
        shutil.copy('out/ckpt_best.pt', 'out/ckpt.pt')
    assert set(records('out', 'fp8_clamped')) == {0}
    out = launch_interpreted(*run, '--init_from=resume', nproc=2).stdout
    assert 'measured again' not in out and records('out', 'loss') == before[2:]


def test_the_log_counts_the_clamped_micro_steps_of_all_ranks(launch_interpreted, work):
    """Here only rank 1 clamps. A micro-step is counted at the start of the next, and the first only measures."""
    launch_interpreted(PROGRAMS / 'clamping.py', NANOGPT / 'train.py', *FLAGS, '--eval_interval=9', nproc=2)
    assert records('out', 'fp8_clamped') == [0, 0, 1]
