"""
Trains a tiny model for a given time and disturbs it: SIGTERM or SIGKILL to one rank, or a full disk, at random moments
of runs that save every few steps. Each run continues where the last one ended (--init_from=auto), sometimes at another
world size and with the next trainer. After each fault every file that a user relies on must be readable. Within a chain
of runs at one world size, every line must equal that of an undisturbed run.

    python tests/soak.py --minutes=120 --seed=1

Exit status 1 if anything was lost or differed, or if nothing was tested. It needs no root: the full disk is a limit on
the size of files (RLIMIT_FSIZE).
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import conftest
from launcher import Launcher

PHASES = ('nanoGPT', 'phase1_zero1', 'phase2_triton', 'phase3_fsdp')
FLAGS = [
    *conftest.TINY,
    '--gradient_accumulation_steps=6',
    '--dropout=0.1',
    '--eval_interval=4',
    '--eval_iters=1',
    '--decay_lr=False',
]
FLAGS += ['--learning_rate=1e-3', '--fsdp_min_num_params=1']
WARM_UP_S = 3
# Growth of a trainer's memory after the warm-up. Seen: 0.4 to 1.4 MiB, all of it early, as allocators round to
# pages and arenas. A leak of what is saved, 0.3 MiB every 4 steps, would pass this after 60 steps.
GROWTH_MIB = 4


def numbers(stdout):
    """Returns {'iter 7': 'loss 3.1', ...} for the lines of a run, without a last one that a kill has cut short."""
    lines = conftest.losses(stdout[: stdout.rfind('\n') + 1])
    return dict(line.split(': ', 1) for line in lines)


def same(a, b, phase, nproc):
    """
    Whether two values of numbers() are equal. With 3 ranks and more DDP sums the first gradients of a run in another
    order than all later ones (it reorders its buckets), which changes the last bit: there the last digit printed may
    differ by one.
    """
    if a == b or b is None or nproc < 3 or phase == 'phase3_fsdp':
        return a == b
    x, y = ([float(word.strip(',')) for word in text.split() if word[0].isdigit()] for text in (a, b))
    return len(x) == len(y) and all(abs(one - other) < 1.5e-4 for one, other in zip(x, y))


class Soak:
    def __init__(self, seed, phases, say=print):
        self.rng, self.phases, self.say, self.report = random.Random(seed), phases, say, Counter()
        self.launch = Launcher()

    def train(self, phase, nproc, fault, *flags, delay=0.0, early=False):
        for name in ('started', 'memory'):
            Path(name).unlink(missing_ok=True)
        script = conftest.ROOT / phase / 'train.py'
        env = dict(FAULT=fault, DELAY=str(delay), EARLY=str(int(early)), FREED=self.rng.choice('01'))
        env['VICTIM'] = str(self.rng.randrange(nproc)) if fault != 'disk' else '0'  # who writes
        rest = [flag for flag in FLAGS if phase == 'phase3_fsdp' or 'fsdp' not in flag]
        disturbed = conftest.PROGRAMS / 'disturbed.py'
        return self.launch(disturbed, script, *rest, *flags, nproc=nproc, env=env, check=False, timeout=120)

    def wrong(self, what, detail):
        self.report[what] += 1
        self.say(f'{what}: {detail}')

    def read_files(self):
        """Reads everything that must be readable. Returns the iteration of the latest checkpoint."""
        reached = 0
        logs = sorted(Path('out').glob('run_*.json'), key=os.path.getmtime)
        for path in [Path('out/ckpt_best.pt'), Path('out/ckpt.pt'), *logs[-1:]]:
            if not path.exists():
                continue
            self.report['files read'] += 1
            try:
                if path.suffix == '.json':
                    json.loads(path.read_text(), parse_constant=lambda word: 1 / 0)  # NaN and Infinity are no JSON
                else:
                    saved = torch.load(path, weights_only=True)
                    assert all(torch.isfinite(v).all() for v in saved['model'].values())
                    reached = saved['iter_num']
            except Exception as e:
                self.wrong('files unreadable', f'{path}: {e!r}')
        return reached

    def chain(self, phase, nproc):
        """Makes disturbed runs at one world size, then the same steps at once, from the same checkpoint."""
        shutil.rmtree('before', ignore_errors=True)
        os.makedirs('before')
        if os.path.exists('out/ckpt.pt'):
            shutil.copyfile('out/ckpt.pt', 'before/ckpt.pt')
        printed, reached = {}, self.read_files()
        for _ in range(self.rng.randint(2, 4)):
            fault = self.rng.choice(['term', 'kill', 'disk'])
            early = self.rng.random() < 0.2
            run = self.train(
                phase,
                nproc,
                fault,
                '--init_from=auto',
                '--max_iters=1000000',
                delay=self.rng.uniform(0, 0.7),
                early=early,
            )
            self.report[f'faults: {fault}'] += 1
            self.report['resumes'] += 'Resuming training' in run.stdout
            if 'Traceback' in run.stderr or (fault == 'term' and not early and run.returncode != 0):
                self.wrong('bad ends', f'{fault} at {nproc} ranks of {phase}: status {run.returncode}\n{run.stderr}')
            for key, value in numbers(run.stdout).items():
                self.report['losses printed again'] += key in printed
                if not same(value, printed.setdefault(key, value), phase, nproc):
                    self.wrong(
                        'losses different', f'{key}: {value}, before the fault {printed[key]} ({phase}, {nproc} ranks)'
                    )
            if (now := self.read_files()) < reached:
                self.wrong('steps lost', f'{reached} before a {fault}, {now} after it')
            reached = now
        if reached and printed:
            last = max(int(key.split()[1]) for key in printed)
            once = self.train(phase, nproc, 'none', '--init_from=auto', '--out_dir=before', f'--max_iters={last}')
            if once.returncode:
                self.wrong('bad ends', once.stderr)
            undisturbed = numbers(once.stdout)
            for key, value in printed.items():
                self.report['losses compared'] += 1
                if not same(value, undisturbed.get(key), phase, nproc):
                    self.wrong(
                        'losses different',
                        f'{key}: {value}, undisturbed {undisturbed.get(key)} ({phase}, {nproc} ranks)',
                    )

    def memory(self, phase, nproc, seconds):
        """Makes one long run without a fault, and compares rank 0's resident memory after warm-up and at the end."""
        self.train(phase, nproc, 'term', '--out_dir=long', '--max_iters=1000000', delay=seconds)
        points = [[float(x) for x in line.split()] for line in open('memory')]
        ends = points[-1][0]
        started = points[0][0] + WARM_UP_S
        first = max(m for t, m in points if started <= t < started + (ends - started) / 4)
        last = max(m for t, m in points if t > ends - (ends - started) / 4)
        grown = (last - first) / 2**20
        steps = torch.load('long/ckpt.pt', weights_only=True)['iter_num']
        self.report['memory: runs'] += 1
        self.report['memory: steps'] += steps
        self.report['memory: most growth, KiB'] = max(self.report['memory: most growth, KiB'], round(grown * 1024))
        if grown > GROWTH_MIB:
            self.wrong('memory grown', f'{grown:.1f} MiB in {steps} steps of {phase}')
        shutil.rmtree('long')

    def run(self, minutes):
        """
        Chains for so many minutes, and on until all of SEEN has been seen: a slow machine needs more of them than a
        fast one.
        """
        deadline, turn = time.time() + 60 * minutes, 0
        while time.time() < deadline or (turn < 20 and not all(self.report[name] for name in SEEN)):
            phase = self.phases[turn % len(self.phases)]
            nproc = self.rng.choice([1, 2, 2, 3])
            if turn % 8 == 1:
                self.memory(phase, 2, min(60, WARM_UP_S + 6 * minutes))
            self.chain(phase, nproc)
            for log in sorted(Path('out').glob('run_*.json'), key=os.path.getmtime)[:-5]:
                log.unlink()
            turn += 1
        self.launch.close()
        self.report['chains'] = turn
        return self.report


SEEN = (
    'faults: term',
    'faults: kill',
    'faults: disk',
    'resumes',
    'losses printed again',
    'losses compared',
    'memory: steps',
)
BAD = ('files unreadable', 'losses different', 'steps lost', 'bad ends', 'memory grown')


def main(argv=None):
    parser = argparse.ArgumentParser(description='Disturbs training runs, and reports what was lost.')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--minutes', type=float, default=2)
    parser.add_argument('--phase', choices=PHASES, help='default: all in turn')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        conftest.make_letters(Path(folder))
        report = Soak(args.seed, [args.phase] if args.phase else PHASES).run(args.minutes)
        os.chdir('/')
    for name in sorted({*report, *BAD}):
        print(f'{name:<28}{report[name]:>10,}')
    return int(any(report[name] for name in BAD) or not all(report[name] for name in SEEN))


if __name__ == '__main__':
    sys.exit(main())
