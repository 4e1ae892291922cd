"""
`make demo`: prepares the embedded data set, trains a small GPT on all GPUs (on a CPU: 2 processes), samples from it, runs the
same 60 iterations with each phase and compares them, and says where everything is. About 5 minutes on 2 CPU cores.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent
NANOGPT = ROOT / 'nanoGPT'
DATA = NANOGPT / 'data' / 'python_char'
OUT = ROOT / 'out-demo'
PHASES = ['nanoGPT', 'phase1_zero1', 'phase2_triton', 'phase3_fsdp']


def run(*command, **env):
    """Runs python with these arguments where the user sees it; ends the demo, with its status, if it fails."""
    print(f'\n$ python {" ".join(str(part) for part in command)}', flush=True)
    status = subprocess.run([sys.executable, *command], env=dict(os.environ, PYTHONUNBUFFERED='1', **env)).returncode
    if status:
        sys.exit(status)


def newest_log(folder):
    return max(folder.glob('run_*.json'), key=lambda path: path.stat().st_mtime)


def main():
    gpus = torch.cuda.device_count()
    processes = gpus or 2
    threads = max(1, (os.cpu_count() or 1) // processes)  # more would only take turns
    run(DATA / 'prepare.py')
    flags = [f'--gradient_accumulation_steps={processes}', f'--batch_size={max(1, 16 // processes)}', '--log_interval=50']
    flags += ['--max_iters=1000', '--lr_decay_iters=1000']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    run(*torchrun, NANOGPT / 'train.py', NANOGPT / 'config' / 'train_python_char.py', f'--out_dir={OUT}', *flags, OMP_NUM_THREADS=str(threads))
    run(NANOGPT / 'sample.py', f'--out_dir={OUT}', '--ckpt=ckpt_best.pt', '--start=def ', '--num_samples=2', '--max_new_tokens=400')
    log = newest_log(OUT)
    run(NANOGPT / 'visualize_training.py', log)

    for phase in PHASES:
        short = [f'--out_dir={OUT / phase}', '--max_iters=60', '--eval_interval=60', '--eval_iters=5', '--log_interval=5', '--warmup_iters=10']
        run(*torchrun, ROOT / phase / 'train.py', NANOGPT / 'config' / 'train_python_char.py', *flags, *short, OMP_NUM_THREADS=str(threads))
    comparison = OUT / 'comparison.png'
    run(NANOGPT / 'visualize_training.py', *[newest_log(OUT / phase) for phase in PHASES], f'--output={comparison}')

    entropy = pickle.loads((DATA / 'meta.pkl').read_bytes())['unigram_entropy']  # just written by us
    val_loss = json.loads(log.read_text())['summary']['best_val_loss']
    print(f"""
The model above learnt from the sources of Python's standard library, one character at a time. Its best validation loss is
{val_loss:.3f} nats per character; knowing only how frequent each character is would give {entropy:.3f}.

  checkpoints   {OUT / 'ckpt.pt'} (latest), {OUT / 'ckpt_best.pt'} (best)
  log           {log}
  picture       {log.with_name(log.stem + '_analysis.png')}
  comparison    {comparison}: the same 60 iterations with each phase
  more samples  .venv/bin/python nanoGPT/sample.py --out_dir={OUT.name} --start="class "
  train on      .venv/bin/python nanoGPT/train.py nanoGPT/config/train_python_char.py --out_dir={OUT.name} --init_from=resume --max_iters=4000""")
    if not val_loss < 0.75 * entropy:
        sys.exit('the validation loss is not clearly below that: something is wrong')


if __name__ == '__main__':
    main()
