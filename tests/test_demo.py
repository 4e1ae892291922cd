"""
`make demo`, and what it shows of each trainer: the memory that a rank keeps from step to step, and progress on a
terminal.
"""

import os
import pty
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import hardware
from conftest import NANOGPT, PROGRAMS, ROOT, TINY, load, log_of
from errors import UserError

sys.path.append(str(ROOT))
import demo

PARTS = ('parameters', 'gradients', 'optimizer')


@pytest.mark.parametrize(
    'folder, bytes_per_parameter', [('nanoGPT', (4, 4, 8)), ('phase1_zero1', (4, 4, 4)), ('phase3_fsdp', (2, 2, 4))]
)
def test_state_of_two_ranks(launch, work, folder, bytes_per_parameter):
    """
    16, 12 and 8 bytes per parameter: float32 parameters and gradients, and AdamW's two moments, with what each trainer
    shards.
    """
    launch(ROOT / folder / 'train.py', *TINY, '--max_iters=1', '--out_dir=out', nproc=2)
    weights = load('out/ckpt.pt')['model']
    parameters = sum(tensor.numel() for name, tensor in weights.items() if name != 'lm_head.weight')  # it is wte's
    state = log_of('out')['run']['state_bytes']
    # ZeRO-1 leaves vectors whole, and the two ranks take turns: one may have a vector of 32 elements more, of 8 bytes
    # each
    tolerance = {'phase1_zero1': 8 * 32}.get(folder, 0)
    for part, expected in zip(PARTS, bytes_per_parameter, strict=True):
        assert abs(state[part] - expected * parameters) <= tolerance


def row(parameters, gradients, optimizer, peak=None):
    state = dict(zip(PARTS, (parameters, gradients, optimizer)))
    return dict(
        final_val_loss=1.5,
        tokens_per_sec_median=1234.5,
        peak_memory_bytes=peak,
        state_bytes=state,
        state_bytes_total=sum(state.values()),
    )


def test_table():
    n = 2**20
    rows = {'DDP': row(4 * n, 4 * n, 8 * n), 'ZeRO-1': row(4 * n, 4 * n, 4 * n), 'FSDP': row(2 * n, 2 * n, 4 * n)}
    header, *lines = demo.table(rows, n, peaks=False)
    assert [line.split()[-2:] for line in lines] == [
        ['PPPPGGGGOOOOOOOO', '16.0'],
        ['PPPPGGGGOOOO', '12.0'],
        ['PPGGOOOO', '8.0'],
    ]
    assert lines[0].split()[:5] == ['DDP', '1.5000', '1,234', '16.0', 'MiB'] and 'peak' not in header
    header, line = demo.table({'DDP': row(4 * n, 4 * n, 8 * n, peak=2**25)}, n, peaks=True)
    assert '32.0 MiB' in line and 'peak' in header


def test_plan_and_time_left(capsys):
    parts = demo.Demo([('prepare', 10), ('train', 100), ('draw', 10)])
    parts.print_plan()
    assert '   2. train' in capsys.readouterr().out and parts.left() == 120
    parts.run('-c', 'print("iter 3: loss 1")', iterations=4)
    assert 'iter 3: loss 1\n' in capsys.readouterr().out
    assert parts.left() < 110  # it took less than the 10 s it should
    assert parts.left(done=0.5) < parts.left()
    with pytest.raises(SystemExit) as ended:
        parts.run('-c', 'import sys; sys.exit(3)')
    assert ended.value.code == 3


def test_ctrl_c_lets_torchrun_finish(tmp_path):
    """A signal would make torchrun print a traceback. Training saves and ends when nobody reads its output."""
    (tmp_path / 'rank.py').write_text(
        """
import os, sys, time
try:
    while True:
        print('iter 1: loss 4', flush=True)
        time.sleep(0.01)
except BrokenPipeError:
    print('saved', file=sys.stderr)
    os._exit(0)
"""
    )
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import demo
demo.TORCHRUN = 'rank'
demo.Demo([('train', 1)]).run('-m', 'rank')
"""
    command = [sys.executable, '-c', code]
    options = dict(cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **options) as process:
        while 'iter 1' not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)
    assert 'training saves a checkpoint first' in out and err.startswith('saved\ninterrupted in line')


def on_terminal(*command, lines, columns=100, stop_at=None, **env):
    """
    Runs a command on a pseudo-terminal. Returns (its exit status, what it wrote); stop_at: text at which it gets
    SIGTERM.
    """
    leader, follower = pty.openpty()
    env = dict(os.environ, COLUMNS=str(columns), LINES=str(lines), **env)
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=env) as process:
        os.close(follower)
        written = b''
        while True:
            try:
                read = os.read(leader, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            written += read
            if not read:
                break
            if stop_at and stop_at.encode() in written:
                process.send_signal(signal.SIGTERM)
                stop_at = None
        os.close(leader)
    return process.returncode, written.decode()


def test_lines_of_iterations_replace_each_other_on_a_terminal():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import demo
demo.show('step 0: train loss 4\\n')
demo.show('iter 1: loss 4.0, time 9ms, mfu n/a, 99 tokens/s, 1 s left\\n', 100)
demo.show('iter 2: loss 3.9, time 9ms, mfu n/a, 99 tokens/s, 1 s left\\n', 99)
demo.show('end\\n')
"""
    _, written = on_terminal(sys.executable, '-c', code, lines=24)
    assert written.endswith(
        '\r\033[Kiter 1: loss 4.0, time 9ms; 2 min left in all\r\033[Kiter 2: loss 3.9, time 9ms; 2 min left in all'
        '\r\033[Kend\r\n'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        'step 0: train loss 4',
        'iter 1: loss 4.0, time 9ms, mfu n/a, 99 tokens/s, 1 s left',
        'iter 2: loss 3.9, time 9ms, mfu n/a, 99 tokens/s, 1 s left',
        'end',
    ]


SLOW = [PROGRAMS / 'slow_evaluation.py', NANOGPT / 'train.py', *TINY, '--max_iters=1', '--eval_iters=30']


@pytest.mark.parametrize('flags', [(), ('--val_tokens=396', '--batch_size=1')])
def test_a_long_evaluation_shows_progress_on_a_terminal(work, flags):
    status, written = on_terminal(sys.executable, *SLOW, *flags, lines=24)
    assert status == 0
    shown = re.findall(r'\revaluating (train|val): (\d+)/(?:30|25), ([^\r]+) left ', written)
    assert {split for split, *_ in shown} == {'train', 'val'}
    assert [int(done) for split, done, _ in shown if split == 'val'] == sorted(
        int(d) for s, d, _ in shown if s == 'val'
    )
    assert re.search(r'\r\033\[Kstep 0: train loss [\d.]+, val loss [\d.]+[^\r]*\r\n', written)  # on a line of its own


def test_a_long_evaluation_is_silent_in_a_pipe(launch, work):
    printed = launch(*SLOW).stdout
    assert 'evaluating' not in printed and '\r' not in printed and 'step 0: train loss' in printed


def test_sigterm_ends_a_long_evaluation_between_batches(work):
    started = time.monotonic()
    status, written = on_terminal(sys.executable, *SLOW, '--eval_iters=100000', lines=24, stop_at='evaluating train: ')
    assert status == 0 and 'step 0' not in written
    assert time.monotonic() - started < 60  # all of it would take hours


def test_windows_is_told_to_use_wsl(work):
    """A Python for Windows has neither of these modules, no select.poll and no SIGHUP."""
    run = subprocess.run(
        [sys.executable, PROGRAMS / 'like_windows.py', NANOGPT / 'train.py', *TINY], capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stderr.startswith('error: ') and 'WSL' in run.stderr, run.stderr
    assert 'Traceback' not in run.stderr and run.stdout == ''


@pytest.mark.parametrize('gpus', [0, 1, 4])
def test_each_technique_runs_where_it_can(monkeypatch, capsys, tmp_path, gpus):
    """
    Without a GPU, there are no kernels; on one GPU, two processes share it over gloo, and one alone trains for long.
    """
    commands = []

    def run(self, *command, **options):
        commands.append([str(part) for part in command])
        self.next += 1
        return ''

    monkeypatch.setitem(
        sys.modules, 'torch', types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: gpus))
    )
    monkeypatch.setattr(sys, 'argv', ['demo.py'])
    monkeypatch.setattr(demo.Demo, 'run', run)
    monkeypatch.setattr(demo, 'newest_log', lambda folder: folder / 'run.json')
    monkeypatch.setattr(demo, 'load_runs', lambda logs: logs)
    monkeypatch.setattr(demo, 'summarize', lambda logs: [row(4, 4, 8, peak=1) for _ in logs])
    monkeypatch.setattr(demo, 'DATA', tmp_path)
    with pytest.raises(FileNotFoundError):  # the data set, which nothing has prepared
        demo.main()
    printed = capsys.readouterr().out
    techniques = [name for name in demo.TECHNIQUES if gpus or 'Triton' not in name]
    assert len(commands) == 5 + len(techniques)
    short = [command for command in commands if '--max_iters=60' in command]
    assert len(short) == len(techniques) == len({' '.join(command) for command in short})
    for command in short:
        assert f'--nproc_per_node={max(2, gpus)}' in command
        assert ('--backend=gloo' in command, '--device=cpu' in command) == (gpus == 1, gpus == 0)
    assert (commands[1][0] == '-m') == (gpus != 1)
    assert ('need a GPU' in printed) == (gpus == 0) and all(f'{name}: 60 iterations' in printed for name in techniques)


def test_processes_share_a_gpu_over_gloo_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setenv('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')  # or resolve_auto would set it for good
    for rank in range(2):
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
        assert hardware.resolve_auto('auto', 'float32', False, 'gloo')[0] == 'cuda:0'
        with pytest.raises(UserError, match='--backend=gloo'):
            hardware.resolve_auto('auto', 'float32', False, 'auto')


@pytest.mark.full
def test_demo(monkeypatch, capfd, tmp_path):
    """All parts of the demo on this machine, shortened so much that the model learns little."""
    monkeypatch.setattr(demo, 'ITERATIONS', 20)
    monkeypatch.setattr(demo, 'OUT', tmp_path / 'out')
    monkeypatch.setattr(sys, 'argv', ['demo.py'])
    with pytest.raises(SystemExit, match='something is wrong'):
        demo.main()
    printed = capfd.readouterr().out
    assert re.search(r'^DDP .* PPPPGGGGOOOOOOOO 16\.0$', printed, re.M) or 'GPUs' in printed
    assert (tmp_path / 'out' / 'comparison.png').exists()


def test_several_processes_on_a_mac_use_the_cpu(monkeypatch):
    """gloo sends no tensors of Apple's GPUs."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert hardware.resolve_auto('auto', 'auto', False, 'auto')[0] == 'mps'
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert hardware.resolve_auto('auto', 'auto', False, 'auto')[0] == 'cpu'
    with pytest.raises(UserError, match='one process only'):
        hardware.resolve_auto('mps', 'auto', False, 'auto')
