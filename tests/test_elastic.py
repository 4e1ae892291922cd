"""
torchrun --max-restarts: a rank is killed at a random moment, and the run recovers by itself. Every printed line, and
the final weights, equal those of an undisturbed run.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import NANOGPT, PROGRAMS, ROOT, TINY, TORCHRUN, losses
from test_train import assert_same_state, load

FLAGS = [*TINY, '--max_iters=400', '--lr_decay_iters=400', '--eval_interval=20', '--dropout=0.1']


def workers(agent, seen):
    """
    Waits for torchrun to start both ranks and returns their processes, without those in seen; [] once torchrun has
    ended.
    """
    while agent.poll() is None:
        with open(f'/proc/{agent.pid}/task/{agent.pid}/children') as f:
            new = [int(pid) for pid in f.read().split() if int(pid) not in seen]
        if len(new) == 2:
            return new
        time.sleep(0.01)
    return []


def train_and_kill(launch, script, rng, out_dir, kills):
    """Runs to the end and kills one rank up to `kills` times. Returns (lines with losses, number of kills)."""
    done, seen = 0, set()
    with open('log', 'w+') as log:
        options = ['--standalone', '--nproc_per_node=2', '--max-restarts=3']
        flags = [*FLAGS, '--init_from=auto', f'--out_dir={out_dir}']
        agent = launch.start(TORCHRUN, *options, script, *flags, stdout=log)
        while done < kills and (pids := workers(agent, seen)):
            seen.update(pids)
            training, begins = rng.random() < 0.8, open('log').read().count('\niter ')
            while training and agent.poll() is None and open('log').read().count('\niter ') == begins:
                time.sleep(0.05)  # most kills come while it trains, some while it starts
            time.sleep(rng.uniform(0, 0.7))  # undisturbed training would take about 2 s
            victim = rng.choice(pids)
            try:
                os.kill(victim, signal.SIGKILL)
                done += 1
            except ProcessLookupError:
                break
        assert agent.wait(timeout=120) == 0, open('log').read()
        log.seek(0)
        return losses(log.read()), done


def survive(launch, script, kills, seed):
    expected = losses(launch(script, *FLAGS, '--out_dir=undisturbed', nproc=2).stdout)
    rng, done, run = random.Random(seed), 0, 0
    while done < kills:
        run += 1
        printed, now = train_and_kill(launch, script, rng, f'out{run}', min(3, kills - done))
        done += now
        # a line printed while its writer is killed may be cut short; all others must be right, also those printed again
        # by a replay
        assert len(set(printed) - set(expected)) <= now and set(printed) >= set(expected)
        assert len(printed) > len(expected) and printed[-1] == expected[-1]  # something was replayed
        assert_same_state(load(f'out{run}/ckpt.pt'), load('undisturbed/ckpt.pt'))


def test_killed_ranks_are_restarted(launch, work):
    survive(launch, NANOGPT / 'train.py', kills=2, seed=0)


@pytest.mark.full
@pytest.mark.parametrize('phase, kills', [('nanoGPT', 20), ('phase1_zero1', 6), ('phase3_fsdp', 6)])
def test_killed_ranks_are_restarted_many_times(launch, work, phase, kills):
    survive(launch, ROOT / phase / 'train.py', kills, seed=1)


def test_a_run_that_a_restart_would_begin_again_says_so(launch, work):
    for init_from in ('scratch', 'auto', 'resume'):
        env, flags = {'TORCHELASTIC_MAX_RESTARTS': '3'}, [*TINY, '--max_iters=1', f'--init_from={init_from}']
        out = launch(NANOGPT / 'train.py', *flags, nproc=2, env=env).stdout
        assert ('a restart by torchrun (--max-restarts) will begin again' in out) == (init_from == 'scratch')


def test_a_finished_run_ends_with_status_0():
    """
    The interpreter must not be torn down while a gloo thread still frees tensors: that aborted one run in five, and
    torchrun restarted the finished training or reported a failure.
    """
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [PROGRAMS / 'finished_run.py', NANOGPT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.count('exit functions have run') == 2, run.stderr


def test_machines_that_do_not_share_a_file_system(launch, work):
    """
    init_from=auto, where only rank 0 sees the checkpoint: one message, instead of ranks that start from different
    states.
    """
    launch(NANOGPT / 'train.py', *TINY, '--max_iters=1', '--out_dir=out')
    flags = [*TINY, f'--dataset={work}/data/letters', '--init_from=auto']
    run = launch(PROGRAMS / 'working_folder_of_its_own.py', NANOGPT / 'train.py', *flags, nproc=2, check=False)
    assert (
        run.returncode == 2 and run.stderr.count('error: ') == 1 and 'a file system that all of them see' in run.stderr
    )


def test_every_group_gives_up_after_dist_timeout(launch):
    """
    The timeout also applies to groups created later, as by hybrid sharding and the writer of sharded checkpoints;
    torch's default is 30 minutes.
    """
    run = launch(PROGRAMS / 'wait_for_a_group.py', NANOGPT, nproc=2, check=False, timeout=60)
    waited = [float(line.split()[0]) for line in run.stdout.splitlines()]
    assert len(waited) == 2 and max(waited) < 10


def test_each_start_has_a_name(launch):
    """
    Each launch decides again which rank reports a failure; each machine counts torchrun's launches independently.
    """
    names = [launch(PROGRAMS / 'print_launch_name.py', NANOGPT, nproc=2).stdout.split() for _ in range(2)]
    assert [len(its) for its in names] == [2, 2] and len({name for its in names for name in its}) == 2
