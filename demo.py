"""
`make demo`: makes a data set of Python's own sources, trains a small GPT on it and samples from the GPT. Then it trains
60 iterations with each technique and compares them in one picture and one table. It uses all GPUs. If there is only one
GPU, two processes share it; without a GPU, two processes run on the CPU.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NANOGPT = ROOT / 'nanoGPT'
sys.path.insert(0, str(NANOGPT))
DATA = NANOGPT / 'data' / 'python_char'
CONFIG = NANOGPT / 'config' / 'train_python_char.py'
OUT = ROOT / 'out-demo'
COMPARISON = OUT / 'comparison.png'
ITERATIONS, SHORT = 1000, 60

import errors  # noqa: F401  reports a missing package
from run_logs import load_runs, summarize
from shell import python, python_command, quote

TORCHRUN = 'torch.distributed.run'
TRITON = '--model_dir=../phase2_triton'
EACH_BLOCK = '--fsdp_min_num_params=1'  # by default, the whole of such a small model would be one unit
TECHNIQUES = {  # name: (folder of the trainer, further flags)
    'DDP': ('nanoGPT', []),
    'ZeRO-1': ('phase1_zero1', []),
    'FSDP': ('phase3_fsdp', [EACH_BLOCK]),
    'Triton': ('nanoGPT', [TRITON]),
    'ZeRO-1 + Triton': ('phase1_zero1', [TRITON]),
    'FSDP + Triton': ('phase3_fsdp', [TRITON, EACH_BLOCK]),
}
# seconds of each part: measured on 2 cores of a server CPU, and on an H200 of a busy machine
SECONDS = {
    'cpu': dict(data=3, train=140, sample=10, draw=6, short=20),
    'cuda': dict(data=3, train=70, sample=10, draw=3, short=20),
}
LETTERS = {'parameters': 'P', 'gradients': 'G', 'optimizer': 'O'}  # a letter for each byte per parameter


class Demo:
    """
    Runs the parts of the demo, one for each call of run(), and estimates the time left. parts: [(title, expected
    seconds)].
    """

    def __init__(self, parts):
        self.parts, self.next = parts, 0
        self.spent = self.planned = 0.0  # seconds of the finished parts, measured and expected

    def print_plan(self):
        for number, (title, seconds) in enumerate(self.parts, 1):
            print(f'{number:>4}. {title:<62} {duration(seconds):>6}')
        print(f'About {duration(self.left())}, if the machine has nothing else to do.', flush=True)

    def left(self, done=0.0):
        """Returns the expected seconds until the end, when a fraction `done` of the next part is finished."""
        slower = (self.spent + 20) / (self.planned + 20)  # than expected; the 20 s dampen the effect of short parts
        return slower * (sum(seconds for _, seconds in self.parts[self.next :]) - done * self.parts[self.next][1])

    def run(self, *command, iterations=0, **env):
        """
        Runs Python with these arguments, shows its output and returns it. On a terminal, the lines of its iterations
        replace each other and end with the time left in all. If it fails, the demo exits with its status.

        The command has a process group of its own, so a terminal's Ctrl-C reaches the demo only: torchrun would answer
        with a traceback. Training saves and ends once nobody reads its output.
        """
        title, seconds = self.parts[self.next]
        print(f'\n{self.next + 1} of {len(self.parts)}: {title} (about {duration(self.left())} left in all)')
        print(f'$ {python()} {" ".join(quote(str(part)) for part in command)}', flush=True)
        started, printed = time.monotonic(), []
        env = dict(os.environ, PYTHONUNBUFFERED='1', **env)
        options = dict(env=env, stdout=subprocess.PIPE, text=True, process_group=0)
        with subprocess.Popen([sys.executable, *command], **options) as process:
            try:
                for line in process.stdout:
                    printed.append(line)
                    iteration = re.match(r'iter (\d+):', line) if iterations else None
                    show(line, self.left(int(iteration[1]) / iterations) if iteration else None)
            except KeyboardInterrupt:
                process.stdout.close()
                if TORCHRUN in command:
                    print('\nInterrupted: training saves a checkpoint first.', flush=True)
                else:
                    process.terminate()
                process.wait()
                raise
        if process.returncode:
            sys.exit(process.returncode)
        self.spent += time.monotonic() - started
        self.planned += seconds
        self.next += 1
        return ''.join(printed)


def show(line, left=None):
    """Prints a line of output. left: seconds left in all, for a line that the next one replaces on a terminal."""
    if not sys.stdout.isatty():
        print(line, end='', flush=True)
    elif left is None:
        print(f'\r\033[K{line}', end='', flush=True)
    else:
        line = f'{line.split(", mfu")[0].rstrip()}; {duration(left)} left in all'
        print(f'\r\033[K{line[: shutil.get_terminal_size().columns - 1]}', end='', flush=True)


def duration(seconds):
    return f'{seconds:.0f} s' if seconds < 90 else f'{seconds / 60:.0f} min'


def train_longer():
    """Returns the command that continues the training of the GPT."""
    return python_command(NANOGPT / 'train.py', CONFIG, f'--out_dir={OUT}', '--init_from=resume')


def newest_log(folder):
    return max(folder.glob('run_*.json'), key=lambda path: path.stat().st_mtime)


def table(rows, parameters, peaks):
    """
    Yields the lines of the table. rows: {technique: its row from run_logs.summarize()}. parameters: their number in the
    model. peaks: whether to show peak memory.
    """
    peak_title = f'{"peak":>12}' if peaks else ''
    yield f'{"":<16}{"val loss":>9}{"tokens/s":>10}{peak_title}{"state":>10}   bytes per parameter'
    for name, row in rows.items():
        speed, peak, state = row['tokens_per_sec_median'], row['peak_memory_bytes'], row['state_bytes']
        speed = f'{speed:,.0f}' if speed else 'n/a'
        peak = f'{f"{peak / 2**20:,.1f} MiB" if peak else "n/a":>12}' if peaks else ''
        total = row['state_bytes_total']
        bar = ''.join(letter * round(state[part] / parameters) for part, letter in LETTERS.items())
        yield (
            f'{name:<16}{row["final_val_loss"]:>9.4f}{speed:>10}{peak}{total / 2**20:>6.1f} MiB   '
            f'{bar} {total / parameters:.1f}'
        )


class Machine:
    """How the demo uses a machine with this number of GPUs."""

    def __init__(self, gpus):
        self.gpus, self.processes = gpus, max(2, gpus)
        self.where = {0: 'two processes on the CPU', 1: 'one GPU, shared by two processes'}.get(gpus, f'{gpus} GPUs')
        self.techniques = [name for name in TECHNIQUES if gpus or 'Triton' not in name]
        self.seconds = SECONDS['cuda' if gpus else 'cpu']
        self.device = [] if gpus else ['--device=cpu']
        self.env = {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // self.processes))}
        self.batch = [f'--gradient_accumulation_steps={self.processes}', f'--batch_size={max(1, 16 // self.processes)}']

    def parts(self):
        """Returns the parts of the demo for class Demo."""
        return [
            ("write the data set: the sources of Python's standard library", self.seconds['data']),
            (f'train a GPT of 0.8 million parameters for {ITERATIONS:,} iterations', self.seconds['train']),
            ('sample from it', self.seconds['sample']),
            ('draw its losses', self.seconds['draw']),
            *((f'{name}: {SHORT} iterations', self.seconds['short']) for name in self.techniques),
            ('compare these in a picture', self.seconds['draw']),
        ]

    def in_all_processes(self, folder):
        """Returns the arguments of Python that start a folder's train.py in all processes."""
        torchrun = ['-m', TORCHRUN, '--standalone', f'--nproc_per_node={self.processes}']
        over_gloo = ['--backend=gloo'] * (self.gpus == 1)  # NCCL takes one process per GPU
        return [*torchrun, ROOT / folder / 'train.py', CONFIG, *self.batch, *self.device, *over_gloo]

    def print_notes(self):
        print(f'The demo uses {self.where}.')
        if not self.gpus:
            print('It leaves out the Triton kernels, which need a GPU.')
        if self.gpus == 1:
            print('ZeRO-1 and FSDP divide state among processes. Two processes on one GPU show how much memory that')
            print('saves, but not how fast it is.')


def train_a_gpt(demo, machine):
    """Runs the first four parts: prepares the data, trains a GPT, samples from it and draws it. Returns its log."""
    demo.run(DATA / 'prepare.py')
    one_gpu = [NANOGPT / 'train.py', CONFIG, *machine.batch]  # needs no second process
    train = one_gpu if machine.gpus == 1 else machine.in_all_processes('nanoGPT')
    flags = ['--log_interval=5', f'--max_iters={ITERATIONS}', f'--lr_decay_iters={ITERATIONS}', f'--out_dir={OUT}']
    demo.run(*train, *flags, iterations=ITERATIONS, **machine.env)
    sample = ['--ckpt=ckpt_best.pt', '--start=def ', '--num_samples=2', '--max_new_tokens=400', *machine.device]
    # threads that wait for each other on a busy CPU would make so small a model 20 times as slow
    demo.run(NANOGPT / 'sample.py', f'--out_dir={OUT}', *sample, OMP_NUM_THREADS='1')
    log = newest_log(OUT)
    demo.run(NANOGPT / 'visualize_training.py', log)
    return log


def train_with_each_technique(demo, machine):
    """Runs the other parts: trains briefly with each technique and draws the comparison. Returns {technique: log}."""
    short = [f'--max_iters={SHORT}', f'--eval_interval={SHORT}', '--warmup_iters=10']
    short += [f'--lr_decay_iters={SHORT}', '--min_lr=3e-3']  # the config's learning_rate, from the warmup on
    short += ['--eval_iters=5', '--log_interval=5', '--compile=False']
    logs = {}
    for name in machine.techniques:
        folder, flags = TECHNIQUES[name]
        out_dir = OUT / name.lower().replace(' ', '')
        train = [*machine.in_all_processes(folder), *short, *flags, f'--out_dir={out_dir}']
        demo.run(*train, iterations=SHORT, **machine.env)
        logs[name] = str(newest_log(out_dir))
    demo.run(NANOGPT / 'visualize_training.py', *logs.values(), f'--output={COMPARISON}')
    return logs


def print_comparison(logs, machine):
    rows = dict(zip(logs, summarize(load_runs(list(logs.values()))), strict=True))
    print(f"""
The same {SHORT} iterations with each technique ({machine.where}). State is the memory that each process keeps from step
to step, with one letter for each byte per parameter: P for parameters, G for gradients, O for the optimizer.
""")
    for line in table(rows, rows['DDP']['state_bytes']['parameters'] / 4, peaks=bool(machine.gpus)):
        print(line)
    if machine.gpus:
        print("Peak is the largest memory of one process's tensors on its GPU.")
    print('The speed of such a small model says little; see benchmarks/README.md.')


def print_result(log):
    """Prints the losses and the files of the GPT. Exits with status 1 if it has not learned."""
    entropy = pickle.loads((DATA / 'meta.pkl').read_bytes())['unigram_entropy']  # prepare.py has just written it
    val_loss = json.loads(log.read_text())['summary']['best_val_loss']
    print(f"""
The GPT learned from the sources of Python's standard library, one character at a time. Its best validation loss is
{val_loss:.3f} nats per character. A model that knows only how frequent each character is would reach {entropy:.3f}.

  checkpoints   {OUT / 'ckpt.pt'} (latest), {OUT / 'ckpt_best.pt'} (best)
  log           {log}
  picture       {log.with_name(log.stem + '_analysis.png')}
  comparison    {COMPARISON}
  more samples  {python_command(NANOGPT / 'sample.py', f'--out_dir={OUT}', '--start=class ')}
  train longer  {train_longer()}""")
    if not val_loss < 0.75 * entropy:
        sys.exit(f'the validation loss is not clearly below {entropy:.3f}: something is wrong')


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.stdout.reconfigure(errors='backslashreplace')  # the name of this folder may not be printable
    import torch

    machine = Machine(torch.cuda.device_count())
    demo = Demo(machine.parts())
    machine.print_notes()
    demo.print_plan()
    log = train_a_gpt(demo, machine)
    logs = train_with_each_technique(demo, machine)
    print_comparison(logs, machine)
    print_result(log)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        if (OUT / 'ckpt.pt').exists():
            print(f'\n{OUT / "ckpt.pt"} is the latest checkpoint. To train its GPT longer, run:\n  {train_longer()}')
        else:
            print('\nThe demo was interrupted before it saved a checkpoint.')
        sys.exit(130)
