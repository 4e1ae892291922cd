"""
Mistakes that users make: one message from one rank that says what to do, exit status 2, no hang, no traceback, nothing
lost. Each is tried alone and on 2 ranks.
"""

import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

import output
from conftest import NANOGPT, PROGRAMS, ROOT, TINY, load, log_of, make_letters
from errors import UserError
from output import Output
from run_report import RunReport
from step_guard import StepGuard

TRAIN, SHARDED = NANOGPT / 'train.py', ['--ckpt_format=sharded']


class Malicious:
    """Unpickling this object creates a file."""

    def __reduce__(self):
        return (os.system, ('touch executed',))


def edit_checkpoint(change):
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, 'out/ckpt.pt')


def write_tokens(ids, dtype=np.uint16):
    np.array(ids, dtype=dtype).tofile('data/letters/train.bin')


def cut(path, size):
    with open(path, 'r+b') as f:
        f.truncate(size)


def garble_weights():
    """Makes a complete zip file whose pickle is invalid."""
    with zipfile.ZipFile('out/ckpt.pt', 'w') as f:
        f.writestr('archive/data.pkl', b'garbage')
        f.writestr('archive/version', b'3')


RESUME = ['--init_from=resume']
MISTAKES = {
    # name: (change to a folder with data and a checkpoint, further flags, text that the message must contain)
    'flag': (None, ['--batchsize=3'], 'did you mean batch_size?'),
    'value': (None, ['--batch_size=0'], 'batch_size=0'),
    'no GPU to record on': (None, ['--cuda_graph'], 'cuda_graph=True needs a CUDA device'),
    'memory': (None, ['--batch_size=1000000000000000'], 'ran out of memory'),
    'heads': (None, ['--n_head=5'], 'n_embd=32 cannot be divided among n_head=5 heads'),
    'no such data set': (None, ['--dataset=leters'], "no data set 'leters'"),
    'data not prepared': (None, ['--dataset=shakespeare'], 'shakespeare/prepare.py'),
    'one file of it missing': (lambda: os.remove('data/letters/val.bin'), [], 'val.bin does not exist'),
    'token outside the vocabulary': (lambda: write_tokens([50] * 100), [], 'token 50'),
    'token beyond the checkpoint': (
        lambda: edit_checkpoint(lambda c: c['model_args'].update(vocab_size=3)),
        RESUME,
        'does not fit',
    ),
    'other vocabulary': (
        lambda: pickle.dump({'vocab_size': 41}, open('data/letters/meta.pkl', 'wb')),
        RESUME,
        'vocabulary of 40',
    ),
    'a folder for data': (lambda: (os.remove('data/letters/val.bin'), os.mkdir('data/letters/val.bin')), [], 'val.bin'),
    'truncated .bin': (lambda: cut('data/letters/train.bin', 999), [], 'train.bin is truncated'),
    'short .bin': (lambda: write_tokens([1] * 10), [], 'too few for block_size'),
    'meta.pkl with code': (
        lambda: pickle.dump({'vocab_size': Malicious()}, open('data/letters/meta.pkl', 'wb')),
        [],
        'could run code',
    ),
    'no checkpoint': (lambda: os.remove('out/ckpt.pt'), RESUME, 'no checkpoint out/ckpt.pt'),
    'truncated checkpoint': (lambda: cut('out/ckpt.pt', 9999), RESUME, 'cut short'),
    'empty checkpoint': (lambda: cut('out/ckpt.pt', 0), RESUME, 'out/ckpt.pt'),
    'checkpoint of noise': (lambda: open('out/ckpt.pt', 'wb').write(os.urandom(9999)), RESUME, 'out/ckpt.pt'),
    'garbled checkpoint': (garble_weights, RESUME, 'out/ckpt.pt'),
    'checkpoint with code': (lambda: torch.save({'model': Malicious()}, 'out/ckpt.pt'), RESUME, 'could run code'),
    'plain pickle with code': (lambda: pickle.dump(Malicious(), open('out/ckpt.pt', 'wb')), RESUME, 'out/ckpt.pt'),
    'file of something else': (
        lambda: torch.save({'a': 1}, 'out/ckpt.pt'),
        RESUME,
        'not the checkpoint of a training run',
    ),
    'checkpoint of another shape': (None, [*RESUME, '--n_embd=64'], 'n_embd=32, but the command asks for n_embd=64'),
    'longer block than the checkpoint': (None, [*RESUME, '--block_size=64'], 'give --block_size=16'),
    'malformed checkpoint': (
        lambda: edit_checkpoint(lambda c: c.update(model_args=None)),
        RESUME,
        'it lacks model_args',
    ),
    'lost weight': (
        lambda: edit_checkpoint(lambda c: c['model'].pop('lm_head.weight')),
        RESUME,
        'lm_head.weight is missing',
    ),
    'lost optimizer': (lambda: edit_checkpoint(lambda c: c.pop('optimizer')), RESUME, 'optimizer state is missing'),
    'malformed optimizer': (
        lambda: edit_checkpoint(lambda c: c.update(optimizer={'a': 1})),
        RESUME,
        'optimizer state is missing',
    ),
    'foreign optimizer': (
        lambda: edit_checkpoint(lambda c: c['optimizer']['state'][0].update(exp_avg=torch.zeros(7))),
        RESUME,
        'does not fit',
    ),
    'out_dir is a file': (
        lambda: open('occupied', 'w').close(),
        ['--out_dir=occupied'],
        'out_dir=occupied cannot be used',
    ),
    'name that torch cannot open': (None, ['--out_dir=o\udcff'], 'cannot be used'),
    'device': (None, ['--device=gpu'], "device is 'gpu'"),
    'part of a device': (None, ['--device=cpu:x'], "device is 'cpu:x'"),
    'device that is a number': (None, ['--device=1'], "device is '1'"),
    'dtype': (None, ['--dtype=half'], "dtype is 'half'"),
    'no compiler': (None, ['--compile=True'], '--compile=False works without it'),
    'learning rate that would rise': (
        None,
        ['--learning_rate=1e-4', '--warmup_iters=2'],
        'learning_rate=0.0001 is below min_lr=0.001',
    ),
    'tracker': (None, ['--tracker=notebook'], "tracker is 'notebook'"),
    'two trackers': (None, ['--tracker=trackio', '--wandb_log'], 'leave out one of the two'),
    'weights that are NaN': (
        lambda: edit_checkpoint(lambda c: c['model']['lm_head.weight'].fill_(math.nan)),
        [*RESUME, '--max_iters=20'],
        'holds numbers from nan to nan, so it is of no use',
    ),
    'learning rate that ruins the weights': (
        None,
        ['--learning_rate=1e10', '--grad_clip=0', '--max_iters=20'],
        'All weights are finite, the largest is ',
    ),
    'nccl without a GPU': (None, ['--backend=nccl'], 'backend=nccl works between GPUs only'),
    'backend': (None, ['--backend=smoke'], "backend is 'smoke'"),
    'pretrained': (None, ['--init_from=gpt2-tiny'], "init_from is 'gpt2-tiny'"),
    'pretrained on other tokens': (
        None,
        ['--init_from=gpt2'],
        "letters has 40 tokens of its own, but the pretrained models use GPT-2's",
    ),
    'init_from': (None, ['--init_from=somewhere'], "init_from is 'somewhere'"),
    'package missing': (None, ['--wandb_log'], 'pip install wandb'),
}


@pytest.fixture(scope='module')
def checkpoint_bytes(launch, tmp_path_factory):
    """A checkpoint of the tiny model, made once."""
    folder = tmp_path_factory.mktemp('made')
    make_letters(folder)
    launch(TRAIN, *TINY, '--max_iters=2', cwd=folder)
    return (folder / 'out' / 'ckpt.pt').read_bytes()


@pytest.mark.parametrize('nproc', [1, 2])
@pytest.mark.parametrize('name', MISTAKES)
def test_mistake(launch, work, checkpoint_bytes, name, nproc):
    prepare, flags, message = MISTAKES[name]
    os.makedirs('out')
    (work / 'out' / 'ckpt.pt').write_bytes(checkpoint_bytes)
    if prepare:
        prepare()
    before = (work / 'out' / 'ckpt.pt').read_bytes() if os.path.exists('out/ckpt.pt') else None
    env = {'PATH': '', 'TORCHINDUCTOR_CACHE_DIR': str(work)} if name == 'no compiler' else {}
    run = launch(TRAIN, *TINY, '--max_iters=4', *flags, nproc=nproc, check=False, env=env, timeout=40)
    assert run.returncode == 2, run
    assert run.stderr.count('error: ') == 1 and message in run.stderr and 'Traceback' not in run.stderr, run
    assert before is None or (work / 'out' / 'ckpt.pt').read_bytes() == before
    assert not os.path.exists('executed')


def test_world_size_that_does_not_divide_the_accumulation(launch, work):
    run = launch(TRAIN, *TINY, '--gradient_accumulation_steps=3', nproc=2, check=False)
    assert run.returncode == 2 and run.stderr.count('error: ') == 1
    assert 'gradient_accumulation_steps=3 must be a multiple of the 2 processes' in run.stderr


TWO = dict(RANK='1', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='29511')


@pytest.mark.parametrize(
    'env, found',
    [
        (dict(RANK='1'), 'RANK=1 WORLD_SIZE= MASTER_ADDR='),
        (dict(WORLD_SIZE='2'), 'RANK= WORLD_SIZE=2 MASTER_ADDR='),
        (dict(TWO, WORLD_SIZE='1'), 'RANK=1 WORLD_SIZE=1 MASTER_ADDR=localhost'),
        *((dict(TWO, **{name: ''}), f'{name}= ') for name in TWO if name != 'MASTER_PORT'),
        *(
            (dict(TWO, **{name: text}), f'{name}={text}')
            for name in TWO
            if name != 'MASTER_ADDR'
            for text in ('two', '-1')
        ),
        (dict(TWO, MASTER_PORT=''), 'MASTER_PORT=:'),
        (dict(TWO, MASTER_PORT='99999'), 'MASTER_PORT=99999'),
        (dict(LOCAL_RANK='first'), 'LOCAL_RANK=first'),
        (dict(LOCAL_WORLD_SIZE='1.0'), 'LOCAL_WORLD_SIZE=1.0'),
        (dict(TWO, LOCAL_WORLD_SIZE='2'), 'LOCAL_WORLD_SIZE=2'),
        (dict(TWO, LOCAL_RANK='2', LOCAL_WORLD_SIZE='2'), 'LOCAL_RANK=2'),
        (dict(TWO, LOCAL_RANK='0', LOCAL_WORLD_SIZE='4'), 'LOCAL_WORLD_SIZE=4'),
    ],
)
def test_half_an_environment(launch, work, env, found):
    """
    Variables of another launcher: rank 1 of 1 would train and save nothing, and rank 1 of 2 would wait in vain for rank
    0.
    """
    run = launch(TRAIN, *TINY, check=False, env=env, timeout=20)
    assert run.returncode == 2 and run.stderr.count('error: ') == 1 and 'the environment has ' in run.stderr
    assert found in run.stderr and 'Traceback' not in run.stderr


@pytest.mark.parametrize(
    'extra, says',
    [
        ('--learning_rate=1e-3', 'learning_rate is 0.01 on rank 0 and 0.001 on rank 1'),  # would train two models
        ('--max_iters=4', 'max_iters is 6 on rank 0 and 4 on rank 1'),  # rank 0 would wait for rank 1
        ('--n_layer=3', 'n_layer is 2 on rank 0 and 3 on rank 1'),
        ('--dataset=shorter', 'the number of training tokens in letters is 1800 on one rank and 3600 on another'),
        ('--dataset=reversed', 'the fingerprint of the data set letters is '),
    ],
)
@pytest.mark.parametrize('folder', ['nanoGPT', 'phase1_zero1', 'phase3_fsdp'])
def test_ranks_that_were_started_with_different_flags(launch, work, folder, extra, says):
    make_letters(work / 'x')
    shutil.move('x/data/letters', 'data/shorter')
    with open('data/shorter/train.bin', 'r+b') as f:
        f.truncate(3600)
    make_letters(work / 'x')
    shutil.move('x/data/letters', 'data/reversed')
    np.fromfile('data/letters/train.bin', np.uint16)[::-1].tofile('data/reversed/train.bin')
    run = [PROGRAMS / 'other_flags.py', ROOT / folder / 'train.py', *TINY, '--max_iters=6']
    result = launch(*run, nproc=2, check=False, env={'EXTRA': extra})
    assert result.returncode == 2 and result.stderr.count('\n') == 1 and 'error: ' in result.stderr
    assert says in re.sub('shorter|reversed', 'letters', result.stderr)


@pytest.mark.parametrize('folder, flags', [('nanoGPT', []), ('phase3_fsdp', []), ('phase3_fsdp', SHARDED)])
def test_ranks_that_see_different_checkpoints(launch, work, folder, flags):
    """Of the same iteration, as on a machine with a copy of its own. The ranks would train a mixture of two models."""
    script = ROOT / folder / 'train.py'
    for out_dir, rate in (('out', '1e-2'), ('own', '2e-2')):
        launch(script, *TINY, *flags, '--max_iters=3', f'--out_dir={out_dir}', f'--learning_rate={rate}', nproc=2)
    run = [PROGRAMS / 'other_flags.py', script, *TINY, *flags, '--init_from=resume']
    result = launch(*run, nproc=2, check=False, env={'EXTRA': '--out_dir=own'})
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    assert re.match(r'error: the fingerprint of .*ckpt.* is \d+ on one rank and \d+ on another: do all', result.stderr)


def test_flags_that_may_differ_between_ranks(launch, work):
    """Paths can be those of a machine, and only rank 0 has a log and a tracker."""
    run = [PROGRAMS / 'other_flags.py', TRAIN, *TINY, '--max_iters=6']
    launch(*run, nproc=2, env={'EXTRA': '--out_dir=own --json_log=False --wandb_run_name=b --dataset=./data/letters'})
    assert load('out/ckpt.pt')['iter_num'] == 7 and not os.path.exists('own')


def test_a_compiler_that_fails(launch, work):
    """As with a TMPDIR that cannot be written to. The message shows what the compiler says."""
    compiler = work / 'g++'
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo "g++ 12.2.0" ;;\n'
        '*) echo "In file included from x.h" >&2; echo "fatal error: no space left" >&2; exit 1 ;; esac\n'
    )
    compiler.chmod(0o755)
    env = {'PATH': str(work), 'TORCHINDUCTOR_CACHE_DIR': str(work / 'cache')}
    run = launch(TRAIN, *TINY, '--compile=True', env=env, check=False)
    assert run.returncode == 2
    assert 'error: torch.compile cannot run its compiler (fatal error: no space left): --compile' in run.stderr


@pytest.mark.parametrize('host', ['localhost', 'not..a.host'])
def test_rank_0_has_ended_before_the_others_start(launch, work, host):
    """Without torchrun, whose store is always there."""
    env = dict(TWO, MASTER_ADDR=host, MASTER_PORT='1')
    run = launch(TRAIN, *TINY, '--dist_timeout=1', check=False, env=env, timeout=20)
    assert run.returncode == 2 and run.stdout == '' and run.stderr.count('\n') == 1
    assert f'error: nothing answered at {host}:1 (MASTER_ADDR and MASTER_PORT) within dist_timeout=1 s' in run.stderr


@pytest.mark.parametrize(
    'env',
    [
        dict.fromkeys(('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'), ''),
        dict(MASTER_PORT='tcp://10.0.0.1:29500'),  # Kubernetes sets it for a service named master
        dict(RANK='0', WORLD_SIZE='1'),
    ],
)
def test_environments_of_one_process(launch, work, env):
    assert 'iter 1:' in launch(TRAIN, *TINY, '--max_iters=1', env=env).stdout


@pytest.mark.parametrize('script', ['sample.py', 'bench.py'])
def test_scripts_of_one_process_ignore_a_malformed_environment(launch, work, script):
    run = launch(NANOGPT / script, '--device=gpu', env=dict(RANK='x', WORLD_SIZE='two', LOCAL_RANK=''), check=False)
    assert run.returncode == 2 and "device is 'gpu'" in run.stderr


def test_mistake_on_one_rank_only_ends_all(work):
    """Under the real torchrun, before and after the ranks have met: the failing rank reports, and no rank hangs."""
    (work / 'config.py').write_text("import os\nif os.environ['RANK'] == '1': dataset = 'nowhere'\n")
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', TRAIN, *TINY]
    run = subprocess.run([*command, 'config.py'], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1  # torchrun's own
    assert run.stderr.count('error: ') == 1 and "error: there is no data set 'nowhere'" in run.stderr
    # torchrun's own report, which comes last, has the message as its cause
    assert 'exitcode  : 2' in run.stderr and "traceback : there is no data set 'nowhere'" in run.stderr


@pytest.mark.parametrize(
    'script, package',
    [
        ('nanoGPT/train.py', 'torch'),
        ('phase3_fsdp/train.py', 'torch'),
        ('nanoGPT/sample.py', 'torch'),
        ('nanoGPT/visualize_training.py', 'matplotlib'),
        ('nanoGPT/data/text/prepare.py', 'numpy'),
        ('demo.py', 'numpy'),
    ],
)
def test_without_the_packages(script, package):
    """-S: as with a Python outside the environment."""
    run = subprocess.run([sys.executable, '-S', ROOT / script], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith('error: ') and run.stderr.count('\n') == 1, run
    assert f'lacks the package {package}. ' in run.stderr and '. .venv/bin/activate' in run.stderr


def test_a_crash_of_one_rank_ends_all(launch, work):
    """A bug is not a user's mistake: one traceback, from the rank with the bug, and the others do not wait for it."""
    script = work / 'crash.py'
    script.write_text(
        f'import os, runpy, sys\nsys.path.insert(0, {str(NANOGPT)!r})\nsys.argv[0] = {str(TRAIN)!r}\n'
        'import step_guard\ncheck = step_guard.StepGuard.check\n'
        'def broken(self, iter_num, *args):\n'
        '    if os.environ["RANK"] == "1" and iter_num == 3: raise ValueError("a bug")\n'
        '    return check(self, iter_num, *args)\n'
        "step_guard.StepGuard.check = broken\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run = launch(script, *TINY, nproc=2, check=False, timeout=60)
    assert run.returncode == 1 and run.stderr.count('Traceback') == 1 and 'ValueError: a bug' in run.stderr


@pytest.mark.parametrize(
    'raised, status, message',
    [
        (
            "torch.OutOfMemoryError('CUDA out of memory. 1 GiB is free. Of the allocated')",
            2,
            '1 of crash.py: CUDA out of memory. 1 GiB is free',
        ),
        ("RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x')", 2, 'CUBLAS_STATUS_ALLOC_FAILED'),
        (
            "RuntimeError('the end complains') from RuntimeError('a kernel\\nCUDA error: out of memory\\nC++')",
            2,
            ': CUDA error: out of memory.',
        ),
        ('MemoryError()', 2, 'no CPU memory is left'),
        (
            "RuntimeError('CUDA driver error: operation not supported')",
            2,
            'PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False',
        ),
        ("RuntimeError('CUDA error: an illegal memory access was encountered')", 1, 'Traceback'),
        ("OSError('cannot allocate memory')", 1, 'Traceback'),
    ],
)
def test_errors_of_gpus_and_of_memory(work, raised, status, message):
    (work / 'crash.py').write_text(
        f'import sys, torch; sys.path.insert(0, {str(NANOGPT)!r}); import errors; raise {raised}\n'
    )
    run = subprocess.run([sys.executable, 'crash.py'], capture_output=True, text=True)
    assert run.returncode == status and message in run.stderr and ('Traceback' in run.stderr) == (status == 1), run


def test_the_end_of_a_run_has_an_order(launch, work):
    """
    If a mistake ends the run during a save, the save is finished, then recorded in the log, then the log is closed.
    """
    script = work / 'ends.py'
    script.write_text(f"""
import os, runpy, sys, time
sys.path.insert(0, {str(ROOT / 'phase3_fsdp')!r})
import sharded_checkpoint, step_guard
from errors import UserError
write, check = sharded_checkpoint.write_sharded, step_guard.StepGuard.check
def slow(*args, **kwargs):
    time.sleep(0.5)
    return write(*args, **kwargs)
def failing(self, iter_num, *args):
    if iter_num == 2:
        raise UserError('a mistake')
    return check(self, iter_num, *args)
sharded_checkpoint.write_sharded, step_guard.StepGuard.check = slow, failing
sys.argv[0] = {str(ROOT / 'phase3_fsdp' / 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
""")
    run = launch(script, *TINY, '--ckpt_format=sharded', '--eval_interval=2', nproc=2, check=False, timeout=60)
    assert run.returncode == 2 and run.stderr.count('error: a mistake') == 1, run
    log = log_of('out')
    assert [record['iter'] for record in log['checkpoints']] == [2] and log['run']['status'] == 'failed'


def test_actions_at_the_end(work):
    """
    Actions run in ORDER, not in order of registration, each once, even if others fail; then the report.
    """
    (work / 'ends.py').write_text(
        f'import sys; sys.path.insert(0, {str(NANOGPT)!r})\n'
        'import errors\nfrom end_of_run import at_end\n'
        "at_end('tracker', lambda error: print('tracker', error))\n"
        "at_end('log', lambda error: 1 / 0)\n"
        "at_end('save', lambda error: print('save', error))\n"
        "raise errors.UserError('a mistake')"
    )
    run = subprocess.run([sys.executable, '-u', 'ends.py'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 2 and run.stdout == 'save a mistake\ntracker a mistake\nerror: a mistake\n'


def with_a_nan(work, folder, calls):
    """
    Returns a program that runs folder/train.py with a loss of NaN in the forwards that `calls` compares, such as '==
    3', counted from 1 in training on this rank.
    """
    script = work / 'glitch.py'
    script.write_text(f"""
import runpy, sys
sys.path.insert(0, {str(ROOT / folder)!r})
import model
forward, calls = model.GPT.forward, []
def glitch(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    calls.extend([1] * self.training)
    return logits, loss * float('nan') if len(calls) {calls} and self.training else loss
model.GPT.forward = glitch
sys.argv[0] = {str(ROOT / folder / 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
""")
    return script


@pytest.mark.parametrize('folder', ['nanoGPT', 'phase3_fsdp'])
def test_a_nan_in_the_last_iteration(launch, work, folder):
    """
    The step is skipped, and an evaluation finds the weights good, so they are saved. (For bad weights see
    test_train.py.)
    """
    # with 2 ranks each has 1 of the 2 micro-steps of an iteration, so call 11 is in iteration 10
    run = launch(with_a_nan(work, folder, '== 11'), *TINY, '--max_iters=10', '--eval_interval=7', nproc=2)
    assert 'iter 10: loss nan' in run.stdout and '1 steps skipped' in run.stdout
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    assert checkpoint['iter_num'] == 11 and all(w.isfinite().all() for w in checkpoint['model'].values())


@pytest.mark.parametrize(
    'folder, options',
    [('nanoGPT', []), ('phase1_zero1', []), ('phase3_fsdp', []), ('phase3_fsdp', ['--ckpt_format=sharded'])],
    ids=['DDP', 'ZeRO-1', 'FSDP', 'FSDP sharded'],
)
def test_a_run_whose_last_state_is_not_saved_fails(launch, work, folder, options):
    """The message names the latest checkpoint, also one that was still being written when the loss became NaN."""
    run = [with_a_nan(work, folder, '>= 11'), *TINY, *options, '--max_iters=11']
    reason = 'error: the last state is not saved, because its loss, or a weight, is not finite (inf or NaN). '
    for interval, latest in (
        (5, 'The latest checkpoint in out continues at iteration 10. Resume from it with a lower --learning_rate'),
        (50, 'This run has saved no checkpoint. Train again with a lower --learning_rate'),
    ):
        result = launch(*run, f'--eval_interval={interval}', nproc=2, check=False)
        assert result.returncode == 2 and result.stderr.count('error: ') == 1 and reason + latest in result.stderr
        assert 'iter 11: ' in result.stdout and log_of('out')['run']['status'] == 'failed'


@pytest.mark.parametrize(
    'weight, says',
    [(2.5, 'All weights are finite, the largest is 2.5e+00'), (math.nan, 'The weights are not finite either')],
)
def test_what_is_said_of_the_weights_of_a_run_that_diverged(weight, says):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    guard = StepGuard('cpu', torch.amp.GradScaler('cpu', enabled=False))
    for _ in range(5):
        guard.step(torch.optim.SGD(model.parameters()), torch.tensor(math.inf))
        loss, norm, skipped = guard.measure(torch.tensor(math.nan), torch.tensor(math.inf))
    with pytest.raises(UserError, match=re.escape(f'5 in all; the learning rate is 1.00e-02. {says}')):
        guard.check(7, 0.01, skipped, model)
    guard.step(torch.optim.SGD(model.parameters()), torch.tensor(1.0))
    guard.measure(torch.tensor(1.0), torch.tensor(1.0))
    guard.check(8, 0.01, skipped, model)  # a good step ends the row


def test_a_rank_without_weights():
    """As with FSDP, if there are more ranks than rows in any parameter."""
    guard = StepGuard('cpu', torch.amp.GradScaler('cpu', enabled=False))
    assert guard.worth_saving(torch.nn.Linear(0, 3, bias=False), None)


def test_a_validation_loss_that_is_not_finite(tmp_path, capsys):
    """An evaluation saves nothing then, and says so."""
    config = dict(out_dir=str(tmp_path), json_log=False, wandb_log=False, max_iters=9, device='cpu')
    report = RunReport(config, {}, None, True, 0, None)
    for val, notes in ((2.0, 0), (math.nan, 1)):
        report.evaluation(3, {'train': 2.0, 'val': val}, 0.1)
        assert capsys.readouterr().out.count('note: a state whose validation loss is not finite is not saved') == notes


def test_a_file_that_cannot_be_read_is_one_message(launch, tmp_path):
    (tmp_path / 'read.py').write_text(
        f'import sys; sys.path.insert(0, {str(NANOGPT)!r})\nimport errors\nopen("/proc/none/x")\n'
    )
    run = launch(tmp_path / 'read.py', check=False)
    message = f'error: /proc/none/x: No such file or directory (in line 3 of {tmp_path}/read.py)\n'
    assert run.returncode == 2 and run.stderr == message


@pytest.mark.parametrize(
    'error, message',
    [
        (
            'RuntimeError("can\'t start new thread")',
            "this process has reached a limit of the system (can't start new thr",
        ),
        (
            'OSError(24, "Too many open files", "x.bin")',
            'this process has reached a limit of the system ([Errno 24] Too',
        ),
        (
            'FileNotFoundError(2, "No usable temporary directory found in [\'/tmp\']")',
            'No usable temporary directory fou',
        ),
    ],
)
def test_limits_of_the_system_are_one_message(launch, tmp_path, error, message):
    (tmp_path / 'limit.py').write_text(
        f'import sys; sys.path.insert(0, {str(NANOGPT)!r})\nimport errors\nraise {error}\n'
    )
    run = launch(tmp_path / 'limit.py', check=False)
    assert run.returncode == 2 and run.stderr.startswith(f'error: {message}') and run.stderr.count('\n') == 1


@pytest.mark.parametrize('ranks', [1, 2])
def test_output_that_nobody_reads(monkeypatch, ranks):
    """
    As after Ctrl-S in a terminal. One process waits for its reader. One rank of several does not, because the others
    would time out.
    """
    monkeypatch.setenv('WORLD_SIZE', str(ranks))
    monkeypatch.setattr(output, 'PATIENCE_S', 0.1)
    read_end, write_end = os.pipe()
    stream = Output(open(write_end, 'w'))
    printing = threading.Thread(target=lambda: [print(f'line {i}', file=stream) for i in range(20_000)], daemon=True)
    printing.start()
    printing.join(1 if ranks == 1 else 30)
    assert printing.is_alive() == (ranks == 1)
    if ranks == 1:
        with open(read_end) as reader:
            assert [reader.readline() for _ in range(20_000)] == [f'line {i}\n' for i in range(20_000)]
    else:
        os.read(read_end, 2**20)
        print('more', file=stream)
        assert os.read(read_end, 2**20).endswith(b'(lines are missing, because nobody read them for a while)\nmore\n')


def test_ctrl_c_is_one_line(tmp_path):
    """The line says where the program was, in case it did not proceed."""
    (tmp_path / 'wait.py').write_text(
        f'import sys; sys.path.insert(0, {str(NANOGPT)!r})\nimport errors, os, signal\n'
        'os.kill(os.getpid(), signal.SIGINT)\n'
    )
    run = subprocess.run([sys.executable, 'wait.py'], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == -signal.SIGINT and run.stderr == f'interrupted in line 3 of {tmp_path}/wait.py\n'
