"""
Trains with the benchmarks' Trainer (benchmarks/trainer.py) as train.py does in the same process group: same seed, same
batches. Flags: --kind, --dataset, --steps, --micro_steps. Rank 0 prints one loss per line, to the last digit.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / 'benchmarks'), str(ROOT / 'nanoGPT')]
import torch.distributed as dist

from dataset import open_dataset
from token_files import inputs_and_targets
from trainer import Trainer, start_ranks

SHAPE = dict(n_layer=2, n_head=2, n_embd=32)

parser = argparse.ArgumentParser()
parser.add_argument('--kind')
parser.add_argument('--dataset')
parser.add_argument('--steps', type=int)
parser.add_argument('--micro_steps', type=int)
args = parser.parse_args()
start_ranks(cpu=True)
data = open_dataset(args.dataset, 16)
vocab_size = data.meta['vocab_size']
options = dict(vocab_size=vocab_size, dropout=0.0)
trainer = Trainer(args.kind, SHAPE, 'cpu', batch_size=4, block_size=16, compile=False, **options)
trainer.feed(lambda trainer: inputs_and_targets(data.train.sample(trainer.batch_size, vocab_size)))
for split in ('train', 'val'):  # the evaluation before the first iteration draws a batch of each
    data.splits[split].sample(trainer.batch_size, vocab_size)
for _ in range(args.steps):
    loss = trainer.step(args.micro_steps).item()
    if dist.get_rank() == 0:
        print(loss)
