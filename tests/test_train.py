"""The reference trainer, run as a user runs it: its numbers, its lines, its stops and starts."""

import fcntl
import json
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from checkpoint import write_checkpoint
from conftest import NANOGPT, PROGRAMS, TINY, TORCHRUN, assert_same, load, log_of, losses

TRAIN = NANOGPT / 'train.py'


def assert_same_state(a, b):
    """Asserts equality in every bit: weights, optimizer state, and the next batch."""
    assert_same(a, b, but=('config', 'log'))


@pytest.mark.parametrize(
    'dropout, bias, accumulation', [(0.0, False, 1), (0.2, True, 3), (0.1, False, 2), (0.0, True, 2)]
)
def test_prints_the_numbers_of_the_minimal_loop(launch, work, dropout, bias, accumulation):
    """
    Random numbers are drawn, and losses computed, in upstream's order: to the last printed digit, so no tolerance.
    """
    run = launch(
        TRAIN, *TINY, f'--dropout={dropout}', f'--bias={bias}', f'--gradient_accumulation_steps={accumulation}'
    )
    shape = '--data_dir=data/letters --vocab_size=40 --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4'
    rest = '--max_iters=20 --eval_interval=10 --eval_iters=3 --learning_rate=1e-2 --min_lr=1e-3 --warmup_iters=5'
    rest += ' --lr_decay_iters=20'
    options = [f'--dropout={dropout}', f'--bias={int(bias)}', f'--accumulation={accumulation}']
    minimal = launch(NANOGPT.parent / 'tests' / 'minimal_loop.py', *shape.split(), *rest.split(), *options)
    assert losses(run.stdout) == losses(minimal.stdout)


def test_lines_keep_upstreams_form(launch, work):
    out = launch(TRAIN, *TINY, '--peak_tflops=1').stdout
    assert re.search(r'^tokens per iteration will be: 128$', out, re.M)
    assert re.search(r'^number of parameters: 0\.03M$', out, re.M)
    assert re.search(r'^step 10: train loss \d\.\d{4}, val loss \d\.\d{4}$', out, re.M)
    assert re.search(
        r'^iter 20: loss \d\.\d{4}, time \d+\.\d\dms, mfu \d+\.\d\d%, [\d,]+ tokens/s, \d+ s left$', out, re.M
    )
    assert re.search(r'^saving checkpoint to out$', out, re.M)
    assert re.search(r'^device cpu, dtype float32, compile False, processes 1$', out, re.M)
    # the peak of this CPU is unknown and not guessed
    assert 'mfu n/a' in launch(TRAIN, *TINY, '--max_iters=6').stdout


def test_learns(launch, work):
    """The data's entropy is log(3) = 1.0986 nats: the loss must come near it and cannot fall below it on new data."""
    out = launch(
        TRAIN,
        *TINY,
        '--max_iters=500',
        '--lr_decay_iters=500',
        '--eval_interval=500',
        '--eval_iters=20',
        '--gradient_accumulation_steps=4',
    ).stdout
    val = float(re.search(r'step 500: .* val loss (\S+)', out)[1])
    assert 1.06 < val < 1.16  # 20 batches of 64 tokens: a standard error of about 0.01


def test_resume_at_an_evaluation_repeats_it_exactly(launch, work):
    once = launch(TRAIN, *TINY, '--out_dir=once')
    launch(TRAIN, *TINY, '--max_iters=9', '--out_dir=twice')
    second = launch(TRAIN, *TINY, '--init_from=resume', '--out_dir=twice')
    assert losses(second.stdout) == losses(once.stdout)[-len(losses(second.stdout)) :]
    assert losses(second.stdout)[0].startswith('step 10:')


def test_resume_elsewhere_continues_with_new_data(launch, work):
    """
    From 1 process to 2, from 2 to 1, from a checkpoint without our key `resume`: the same weights, another data order.
    """
    launch(TRAIN, *TINY, '--max_iters=9', nproc=1)
    ours = load('out/ckpt.pt')
    upstream = {k: v for k, v in ours.items() if k != 'resume'}
    os.makedirs('upstream')
    torch.save(upstream, 'upstream/ckpt.pt')
    shutil.copytree('out', 'two')
    runs = [
        launch(TRAIN, *TINY, '--init_from=resume', f'--out_dir={folder}', nproc=n)
        for folder, n in (('out', 1), ('two', 2), ('upstream', 1))
    ]
    firsts = [float(re.search(r'iter 10: loss (\S+?),', run.stdout)[1]) for run in runs]
    assert len(set(firsts)) == 3  # the exact one and two new data orders
    assert ['a new data order' in run.stdout for run in runs] == [False, True, True]
    assert max(firsts) - min(firsts) < 0.5  # the same model, whose loss began at 3.7
    saved = load('two/ckpt.pt')
    assert saved['iter_num'] == 21 and len(saved['resume']['ranks']) == 2
    assert launch(TRAIN, *TINY, '--init_from=resume', '--out_dir=two', '--max_iters=24').stdout.count('\niter ') == 4


def test_checkpoint_has_upstreams_form(launch, work):
    launch(TRAIN, *TINY, '--max_iters=10')
    checkpoint = load('out/ckpt.pt')
    assert list(checkpoint) == ['model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'resume']
    assert set(checkpoint['model_args']) == {
        'n_layer',
        'n_head',
        'n_embd',
        'block_size',
        'bias',
        'vocab_size',
        'dropout',
    }
    assert type(checkpoint['best_val_loss']) is float and type(checkpoint['iter_num']) is int
    assert 'transformer.h.0.attn.c_attn.weight' in checkpoint['model'] and 'lm_head.weight' in checkpoint['model']
    params = [i for group in checkpoint['optimizer']['param_groups'] for i in group['params']]
    assert params == list(range(len(params))) and set(checkpoint['optimizer']['state'][0]) == {
        'step',
        'exp_avg',
        'exp_avg_sq',
    }
    assert checkpoint['config']['n_embd'] == 32 and checkpoint['config']['dataset'] == 'letters'


def test_a_name_left_by_a_killed_run_is_not_written_to(work):
    """Killed between the two renames of a save: ckpt.pt.tmp is another name of ckpt_best.pt."""
    os.makedirs('out')
    write_checkpoint({'iter_num': 1}, 'out', best=True, required=True)
    os.link('out/ckpt_best.pt', 'out/ckpt.pt.tmp')
    write_checkpoint({'iter_num': 2}, 'out', best=False, required=True)
    assert load('out/ckpt_best.pt')['iter_num'] == 1 and load('out/ckpt.pt')['iter_num'] == 2


def test_warns_of_another_run_in_the_same_folder(launch, work):
    assert launch(TRAIN, *TINY, '--max_iters=1').stderr == ''
    fcntl.flock(os.open('out', os.O_RDONLY), fcntl.LOCK_EX)
    assert 'another run is using out_dir=out' in launch(TRAIN, *TINY, '--max_iters=1').stderr


def test_warmup_may_end_where_the_decay_does(launch, work):
    launch(TRAIN, *TINY, '--max_iters=7', '--warmup_iters=5', '--lr_decay_iters=5')
    assert [record['lr'] for record in log_of('out')['iterations']][4:] == [
        pytest.approx(1e-2 * 5 / 6),
        1e-3,
        1e-3,
        1e-3,
    ]


def test_help_into_a_closed_pipe(work):
    run = subprocess.run(f'{sys.executable} {TRAIN} --help | head -n 1', shell=True, capture_output=True, text=True)
    assert run.stdout.count('\n') == 1 and run.stderr == ''


def test_a_new_run_keeps_what_another_has_saved(launch, work):
    """A forgotten --init_from=resume loses nothing, and neither does a resume after it."""
    launch(TRAIN, *TINY, '--max_iters=10')
    first = [open(f'out/{name}.pt', 'rb').read() for name in ('ckpt', 'ckpt_best')]
    os.makedirs('out/ckpt_sharded/iter_0')
    assert 'another run' not in launch(TRAIN, *TINY, '--init_from=resume', '--max_iters=11').stdout
    second = open('out/ckpt.pt', 'rb').read()
    out = launch(TRAIN, *TINY, '--n_layer=1', '--max_iters=10').stdout
    assert out.count('belongs to another run') == 3 and load('out/ckpt.pt')['model_args']['n_layer'] == 1
    assert (
        open('out/ckpt_before.pt', 'rb').read() == second and open('out/ckpt_best_before.pt', 'rb').read() == first[1]
    )
    assert os.path.isdir('out/ckpt_sharded_before/iter_0') and not os.path.exists('out/ckpt_sharded')
    assert 'iter 11:' in launch(TRAIN, *TINY, '--n_layer=1', '--init_from=auto', '--max_iters=11').stdout
    assert open('out/ckpt_before.pt', 'rb').read() == second


def test_best_that_a_resumed_run_finds_at_once(launch, work):
    """The first run saves iteration 10 without evaluating it, and afterwards the model is ruined."""
    launch(TRAIN, *TINY, '--max_iters=9')
    assert not os.path.exists('out/ckpt_best.pt')
    launch(TRAIN, *TINY, '--init_from=resume', '--learning_rate=3', '--min_lr=3')
    assert load('out/ckpt_best.pt')['iter_num'] == 10 and load('out/ckpt.pt')['iter_num'] == 21


def test_ranks_that_see_different_checkpoints(launch, work):
    """As on two machines without a common file system."""
    for rank, max_iters in enumerate((5, 10)):
        launch(TRAIN, *TINY, f'--max_iters={max_iters}', f'--out_dir=out{rank}')
    run = launch(PROGRAMS / 'folder_of_its_own.py', TRAIN, *TINY, '--init_from=resume', nproc=2, check=False)
    assert run.returncode == 2 and 'is 6 on one rank and 11 on another' in run.stderr and 'Traceback' not in run.stderr


@pytest.mark.parametrize('init', ['scratch', 'resume'])
def test_eval_only_trains_and_saves_nothing(launch, work, init):
    launch(TRAIN, *TINY, '--max_iters=12')
    before = open('out/ckpt.pt', 'rb').read()
    out = launch(TRAIN, *TINY, '--eval_only', f'--init_from={init}').stdout
    assert len(losses(out)) == 1 and losses(out)[0].startswith('step 13:' if init == 'resume' else 'step 0:')
    assert open('out/ckpt.pt', 'rb').read() == before


def test_evaluates_on_all_ranks(launch, work):
    """The printed loss is the mean over the ranks, each with batches of its own."""
    two = losses(launch(TRAIN, *TINY, '--eval_only', '--eval_iters=40', nproc=2).stdout)[0]
    one = losses(launch(TRAIN, *TINY, '--eval_only', '--eval_iters=40').stdout)[0]
    values = [[float(x) for x in re.findall(r'\d\.\d{4}', line)] for line in (one, two)]
    assert one != two and all(abs(a - b) < 0.02 for a, b in zip(*values, strict=True))  # one model, other batches


def test_init_from_auto(launch, work):
    assert 'from scratch' in launch(TRAIN, *TINY, '--init_from=auto', '--max_iters=3').stdout
    assert 'Resuming' in launch(TRAIN, *TINY, '--init_from=auto', '--max_iters=5').stdout


def test_a_finished_run_resumed_does_nothing(launch, work):
    launch(TRAIN, *TINY, '--max_iters=5')
    before = load('out/ckpt.pt')
    out = launch(TRAIN, *TINY, '--max_iters=5', '--init_from=resume').stdout
    assert losses(out) == [] and 'nothing is left to do' in out
    assert_same_state(before, load('out/ckpt.pt'))


def test_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(launch, work):
    launch(TRAIN, *TINY, '--max_iters=10')
    before = open('out/ckpt.pt', 'rb').read()
    for nproc in (1, 2):
        run = launch(
            TRAIN,
            *TINY,
            '--init_from=resume',
            '--learning_rate=1e30',
            '--decay_lr=False',
            '--max_iters=40',
            nproc=nproc,
            check=False,
        )
        assert (
            run.returncode == 2
            and run.stderr.count('training diverged') == 1
            and 'learning rate is 1.00e+30' in run.stderr
        )
        assert 'Traceback' not in run.stderr
        log = json.load(
            open(max((f'out/{name}' for name in os.listdir('out') if name.endswith('.json')), key=os.path.getmtime))
        )
        assert log['iterations'][-1]['skipped_steps'] == 5  # the step that ended the run
        # a run that ends by itself right after it broke must not save either
        run = launch(
            TRAIN,
            *TINY,
            '--init_from=resume',
            '--learning_rate=1e30',
            '--decay_lr=False',
            '--max_iters=13',
            nproc=nproc,
            check=False,
        )
        assert run.returncode == 2 and '2 steps skipped' in run.stdout and log_of('out')['run']['status'] == 'failed'
        assert run.stderr.count('The latest checkpoint in out continues at iteration 11. Resume from it with') == 1
        assert open('out/ckpt.pt', 'rb').read() == before
    log = json.load(open(sorted(p for p in os.listdir('out') if p.endswith('.json'))[-1].join(['out/', ''])))
    assert None in [record['loss'] for record in log['iterations']]  # strict JSON has no NaN


def test_sigterm_saves_the_current_step(launch, work):
    """Under torchrun. The stopped and resumed run equals one that was never stopped."""
    flags = [*TINY, '--max_iters=1000000', '--eval_interval=1000000', '--lr_decay_iters=100']

    def torchrun(*more):
        return launch.start(TORCHRUN, '--standalone', '--nproc_per_node=2', TRAIN, *flags, *more)

    run, printed = torchrun(), []
    for line in run.stdout:
        printed.append(line)
        if line.startswith('iter 20:'):
            asked = time.time()
            run.send_signal(signal.SIGTERM)
    run.wait()
    assert time.time() - asked < 25  # torchrun kills after 30 s
    assert printed[-1] == 'saving checkpoint to out\n'
    stopped = load('out/ckpt.pt')
    assert stopped['iter_num'] == int(losses(''.join(printed))[-1].split()[1].rstrip(':')) + 1
    last = f'--max_iters={stopped["iter_num"] + 9}'
    resumed = losses(torchrun(last, '--init_from=resume').stdout.read())
    straight = launch(TRAIN, *flags, last, '--out_dir=straight', nproc=2)
    assert len(resumed) == 10
    assert losses(straight.stdout) == losses(''.join(printed)) + resumed
    assert_same_state(load('out/ckpt.pt'), load('straight/ckpt.pt'))


@pytest.mark.parametrize(
    'number',
    [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU],
    ids=['Ctrl-C', 'closed terminal', 'time limit', 'time limit (LSF)', 'limit of CPU time'],
)
def test_signals_in_one_process_save_too(launch, work, number):
    run = launch.start(TRAIN, *TINY, '--max_iters=1000000', '--eval_interval=1000000')
    for line in run.stdout:
        if line.startswith('iter 5:'):
            run.send_signal(number)
    assert run.wait() == 0 and load('out/ckpt.pt')['iter_num'] > 5


def test_a_reader_that_does_not_read_costs_no_work(launch, work):
    """As in `train.py | less`, whose pipe is full: a signal ends the run with a save."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end), os.fdopen(write_end, 'w') as stdout:
        run = launch.start(TRAIN, *TINY, '--max_iters=1000000', '--eval_interval=1000000', stdout=stdout)
        full = select.poll()
        full.register(stdout, select.POLLOUT)
        while full.poll(0):
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        assert run.wait(30) == 0 and load('out/ckpt.pt')['iter_num'] > 5


def test_a_reader_that_goes_away_stops_the_run(work):
    """
    A broken pipe, as when Ctrl-C ends `tee`, must not cost the checkpoint. Nor must a name that the terminal cannot
    show.
    """
    env = dict(os.environ, PYTHONUNBUFFERED='1', PYTHONIOENCODING='ascii')
    flags = [*TINY, '--max_iters=1000000', '--eval_interval=1000000', '--out_dir=ö']
    run = subprocess.Popen(
        [sys.executable, TRAIN, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert any(line.startswith('iter 5:') for line in iter(run.stdout.readline, ''))
        run.stdout.close()
        assert run.wait(60) == 0 and run.stderr.read() == '' and load('ö/ckpt.pt')['iter_num'] > 5
    finally:
        run.kill()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full, which Linux has')
def test_a_log_on_a_full_disk_does_not_stop_the_run(work):
    with open('/dev/full', 'w') as full:
        run = subprocess.run(
            [sys.executable, TRAIN, *TINY, '--lr_decay_iters=15'],
            stdout=full,
            stderr=full,
            env=dict(os.environ, PYTHONUNBUFFERED='1'),
        )
    assert run.returncode == 0 and load('out/ckpt.pt')['iter_num'] == 21


def test_resume_without_the_flags_of_the_model(launch, work):
    """
    The log records the checkpoint's model. Only block_size must be given; it is not cropped to a default.
    """
    val = work / 'data' / 'letters' / 'val.bin'
    val.write_bytes(val.read_bytes() * 3)  # enough for a block of 1024
    launch(TRAIN, *TINY, '--max_iters=3')
    flags = [
        *(flag for flag in TINY if not flag.startswith(('--n_', '--block_size'))),
        '--init_from=resume',
        '--max_iters=5',
    ]
    run = launch(TRAIN, *flags, check=False)
    assert run.returncode == 2 and 'trained with block_size=16, but here it is 1024: give --block_size=16' in run.stderr
    launch(TRAIN, *flags, '--block_size=16')
    config = log_of('out')['config']
    assert [config[k] for k in ('n_layer', 'n_head', 'n_embd', 'block_size')] == [2, 2, 32, 16]
    run = launch(TRAIN, *flags, '--block_size=8', '--eval_only=True')
    assert 'cropped from block_size=16 to 8, and the next save replaces the checkpoint' in run.stdout


def test_works_from_anywhere(launch, work):
    """From the root with paths as a user types them; out_dir is relative to the working directory."""
    flags = ['--dataset=data/letters', *TINY[1:], '--max_iters=1']
    launch(TRAIN, NANOGPT / 'config' / 'train_python_char.py', *flags, '--out_dir=a')
    launch(TRAIN, 'config/train_python_char.py', *flags, '--out_dir=b')
    os.symlink(TRAIN, 'link.py')
    subprocess.run(
        [sys.executable, 'link.py', 'config/train_python_char.py', *flags, '--out_dir=c'],
        check=True,
        capture_output=True,
    )
    assert all(os.path.exists(f'{out_dir}/ckpt.pt') for out_dir in 'abc')


def test_json_log(launch, work):
    launch(TRAIN, *TINY, '--max_iters=9')
    launch(TRAIN, *TINY, '--init_from=resume', nproc=2)
    first, second = (
        json.load(open(f'out/{name}')) for name in sorted(f for f in os.listdir('out') if f.endswith('.json'))
    )
    assert [record['iter'] for record in first['iterations']] == list(range(10)) and first['run'][
        'status'
    ] == 'completed'
    assert [record['iter'] for record in second['iterations']] == list(range(10, 21)) and second['run'][
        'world_size'
    ] == 2
    assert [record['iter'] for record in second['evaluations']] == [10, 20]
    assert [record['iter'] for record in second['checkpoints']] == [10, 20, 21] and second['checkpoints'][0][
        'bytes'
    ] > 100_000
    assert first['config']['n_embd'] == 32 and first['run']['phase'] == 'nanoGPT'
    record = first['iterations'][-1]
    assert (
        record['loss'] > 0
        and record['lr'] > 0
        and record['time_ms'] > 0
        and record['tokens_per_sec'] > 0
        and record['grad_norm'] > 0
    )
    assert record['mfu'] is None and record['peak_memory_bytes'] > 10**7
    launch(TRAIN, *TINY, '--json_log=False', '--out_dir=silent', '--max_iters=1')
    assert os.listdir('silent') == ['ckpt.pt']
    # the chain continues after a run without a log
    launch(TRAIN, *TINY, '--init_from=resume', '--json_log=False', '--max_iters=22')
    assert load('out/ckpt.pt')['resume']['log'] == max(name for name in os.listdir('out') if name.endswith('.json'))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    'options',
    [
        ['--compile=False', '--cuda_graph=False'],
        ['--compile=False', '--dtype=float16', '--cuda_graph=False'],
        ['--compile', '--cuda_graph=False'],
        ['--compile'],
        ['--compile=False', '--dtype=float32', '--dropout=0.05'],
        ['--compile=False', '--dtype=float16', '--activation_checkpointing'],
        ['--compile=False', '--activation_checkpointing', '--dropout=0.05'],
        ['--model_dir=../phase2_triton'],
        ['--model_dir=../phase2_triton', '--cuda_graph=False'],
        ['--model_dir=../phase2_triton', '--dtype=float16', '--dropout=0.05'],
    ],
)
def test_on_a_gpu(work, options):
    """Learns, resumes to the printed digit where the arithmetic is deterministic enough for that, and stays finite."""
    flags = [arg for arg in TINY if not arg.startswith('--device')] + [
        '--max_iters=60',
        '--lr_decay_iters=60',
        *options,
    ]
    once = subprocess.run(
        [sys.executable, TRAIN, *flags, '--out_dir=once'], capture_output=True, text=True, check=True
    ).stdout
    subprocess.run(
        [sys.executable, TRAIN, *flags, '--out_dir=twice', '--max_iters=29'], check=True, capture_output=True
    )
    second = subprocess.run(
        [sys.executable, TRAIN, *flags, '--out_dir=twice', '--init_from=resume'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 'compile False' in once or 'compile True' in once
    a, b = (
        [float(re.search(r'loss (\d\.\d+)$', line)[1]) for line in losses(text) if line.startswith('iter')]
        for text in (once, second)
    )
    # atomics in the embedding's backward leave rounding noise, which 30 steps let grow
    assert len(b) == 31 and max(abs(x - y) for x, y in zip(a[30:], b, strict=True)) < 0.02
    assert a[-1] < 2.2 < 3.5 < a[0]
    redraws_dropout = {'--activation_checkpointing', '--dropout=0.05'} <= set(options)
    captured = '--cuda_graph=False' not in options and not redraws_dropout
    assert log_of('once')['config']['cuda_graph'] is captured


@pytest.mark.gpu
@pytest.mark.parametrize('folder', ['nanoGPT', 'phase1_zero1', 'phase3_fsdp'])
@pytest.mark.parametrize(
    'options',
    [
        ['--compile=False', '--gradient_accumulation_steps=2'],
        ['--compile', '--gradient_accumulation_steps=8'],
        ['--model_dir=../phase2_triton', '--gradient_accumulation_steps=4'],
        ['--compile=False', '--gradient_accumulation_steps=8', '--dtype=float16'],
    ],
    ids=['one micro-step', 'compiled', 'triton', 'float16'],
)
def test_graphs_on_two_gpus(launch, work, folder, options):
    """
    By default all micro-steps are replayed, communication included; the losses are those without graphs. An evaluation
    releases the graphs.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip('needs 2 CUDA GPUs')
    flags = [arg for arg in TINY if not arg.startswith('--device')] + ['--max_iters=40', '--eval_interval=15', *options]

    def run(*more):
        out = launch(NANOGPT.parent / folder / 'train.py', *flags, *more, nproc=2).stdout
        return [float(re.search(r'loss (\d\.\d+)$', line)[1]) for line in losses(out) if line.startswith('iter')]

    ours, theirs = run('--out_dir=graph'), run('--cuda_graph=False', '--out_dir=launched')
    norms = [
        [record['grad_norm'] for record in log_of(out_dir)['iterations'][12:]] for out_dir in ('graph', 'launched')
    ]
    assert log_of('graph')['config']['cuda_graph'] is True
    # the losses alone would hide a gradient of the wrong scale, which clipping and AdamW undo
    assert 0.9 < statistics.median(a / b for a, b in zip(*norms, strict=True)) < 1.1
    # tolerance as in test_on_a_gpu
    assert len(ours) == 41 and ours[0] > 3.5 and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.02


@pytest.mark.gpu
@gpu
def test_skips_a_step_on_the_gpu(work):
    launch_flags = [arg for arg in TINY if not arg.startswith('--device')] + [
        '--learning_rate=1e30',
        '--decay_lr=False',
        '--max_iters=40',
        '--compile=False',
    ]
    run = subprocess.run([sys.executable, TRAIN, *launch_flags], capture_output=True, text=True)
    assert run.returncode == 2 and 'training diverged' in run.stderr


def test_a_float16_run_that_has_made_no_step_yet_resumes(launch, work):
    """One token to a batch: its gradients overflow at the loss scales of the first steps, and AdamW has no state."""
    flags = [*TINY, '--dtype=float16', '--batch_size=1', '--block_size=1', '--n_embd=64', '--eval_interval=100']
    flags += ['--gradient_accumulation_steps=1']
    launch(TRAIN, *flags, '--max_iters=1')
    assert load('out/ckpt.pt')['optimizer']['state'] == {}
    resumed = launch(TRAIN, *flags, '--max_iters=9', '--init_from=resume').stdout
    assert losses(resumed) == losses(launch(TRAIN, *flags, '--max_iters=9', '--out_dir=whole').stdout)[-8:]
    assert load('out/ckpt.pt')['optimizer']['state']
