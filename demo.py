"""
`make demo`: prepares the embedded data set, trains a small GPT on all GPUs (on a CPU: 2 processes), samples from it, then runs the
same 60 iterations with the reference, each phase, and two phases together, compares them in one picture and one table, and says
where everything is. About 6 minutes on 2 CPU cores.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
NANOGPT = ROOT / 'nanoGPT'
sys.path.insert(0, str(NANOGPT))
DATA = NANOGPT / 'data' / 'python_char'
OUT = ROOT / 'out-demo'
TRITON = '--model_dir=../phase2_triton'
EACH_BLOCK = '--fsdp_min_num_params=1'  # by default all of so small a model would be one unit

from run_logs import load_runs, summarize
from shell import python, python_command, quote

RUNS = {  # name: (folder of the trainer, further flags)
    'reference': ('nanoGPT', []),
    'phase 1': ('phase1_zero1', []),
    'phase 2': ('phase2_triton', []),
    'phase 3': ('phase3_fsdp', [EACH_BLOCK]),
    'phases 1 + 2': ('phase1_zero1', [TRITON]),
    'phases 2 + 3': ('phase3_fsdp', [TRITON, EACH_BLOCK]),
}


def run(*command, **env):
    """Runs python with these arguments where the user sees it; ends the demo, with its status, if it fails. Returns what it printed."""
    print(f'\n$ {python()} {" ".join(quote(str(part)) for part in command)}', flush=True)
    env = dict(os.environ, PYTHONUNBUFFERED='1', **env)
    with subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, text=True) as process:
        printed = []
        for line in process.stdout:
            print(line, end='', flush=True)
            printed.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return ''.join(printed)


def newest_log(folder):
    return max(folder.glob('run_*.json'), key=lambda path: path.stat().st_mtime)


def table_row(name, summary, printed):
    """One line of the table. Whether LayerNorm ran on Triton is known only to the model, which printed it."""
    kernels = [line for line in printed.splitlines() if 'Triton-accelerated LayerNorm' in line]
    layer_norm = 'PyTorch' if not kernels or kernels[0].startswith('not') else 'Triton'
    speed, memory = summary['tokens_per_sec_median'], summary['peak_memory_bytes']
    speed, memory = f'{speed:,.0f}' if speed else 'n/a', f'{memory / 2**20:,.0f} MiB' if memory else 'n/a'
    return f'{name:<14}{summary["final_val_loss"]:>10.4f}{speed:>12}{memory:>14}  {layer_norm}'


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    gpus = torch.cuda.device_count()
    processes = gpus or 2
    threads = max(1, (os.cpu_count() or 1) // processes)  # more would only take turns
    run(DATA / 'prepare.py')
    flags = [f'--gradient_accumulation_steps={processes}', f'--batch_size={max(1, 16 // processes)}']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    config = NANOGPT / 'config' / 'train_python_char.py'
    long = ['--log_interval=5', '--max_iters=1000', '--lr_decay_iters=1000']
    run(*torchrun, NANOGPT / 'train.py', config, f'--out_dir={OUT}', *flags, *long, OMP_NUM_THREADS=str(threads))
    run(
        NANOGPT / 'sample.py',
        f'--out_dir={OUT}',
        '--ckpt=ckpt_best.pt',
        '--start=def ',
        '--num_samples=2',
        '--max_new_tokens=400',
    )
    log = newest_log(OUT)
    run(NANOGPT / 'visualize_training.py', log)

    short = [
        '--max_iters=60',
        '--lr_decay_iters=1000',
        '--eval_interval=60',
        '--eval_iters=5',
        '--log_interval=5',
        '--warmup_iters=10',
    ]
    logs, printed = {}, {}
    for name, (folder, options) in RUNS.items():
        out_dir = OUT / name.replace(' ', '')
        printed[name] = run(
            *torchrun,
            ROOT / folder / 'train.py',
            config,
            *flags,
            *short,
            *options,
            f'--out_dir={out_dir}',
            OMP_NUM_THREADS=str(threads),
        )
        logs[name] = newest_log(out_dir)
    comparison = OUT / 'comparison.png'
    run(NANOGPT / 'visualize_training.py', *logs.values(), f'--output={comparison}')

    print(f"""
{processes} processes, {torch.cuda.get_device_name() if gpus else 'CPU'}, the same 60 iterations:

{'':<14}{'val loss':>10}{'tokens/s':>12}{'peak memory':>14}  LayerNorm by""")
    for name, summary in zip(RUNS, summarize(load_runs([str(logs[name]) for name in RUNS])), strict=True):
        print(table_row(name, summary, printed[name]))
    print(
        f'Memory is that of rank 0: {"tensors on its GPU" if gpus else "its resident set, most of which is Python and PyTorch"}.'
    )
    if not gpus:
        print(
            'Triton kernels need a GPU: without one, phase 2 is the reference, and a model this small shows no savings. Speeds vary with the load.'
        )

    entropy = pickle.loads((DATA / 'meta.pkl').read_bytes())['unigram_entropy']  # just written by us
    val_loss = json.loads(log.read_text())['summary']['best_val_loss']
    print(f"""
The model above learnt from the sources of Python's standard library, one character at a time. Its best validation loss is
{val_loss:.3f} nats per character; knowing only how frequent each character is would give {entropy:.3f}.

  checkpoints   {OUT / 'ckpt.pt'} (latest), {OUT / 'ckpt_best.pt'} (best)
  log           {log}
  picture       {log.with_name(log.stem + '_analysis.png')}
  comparison    {comparison}: the same 60 iterations with each
  more samples  {python_command(NANOGPT / 'sample.py', f'--out_dir={OUT}', '--start=class ')}
  train on      {python_command(NANOGPT / 'train.py', config, f'--out_dir={OUT}', '--init_from=resume', '--max_iters=4000')}""")
    if not val_loss < 0.75 * entropy:
        sys.exit('the validation loss is not clearly below that: something is wrong')


if __name__ == '__main__':
    main()
