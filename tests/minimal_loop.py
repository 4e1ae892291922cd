"""
The training loop of nanoGPT reduced to its numbers: what is drawn when, and what is computed from it. No checkpoints,
no log, no ranks, no schedule options. train.py must print what this prints, and must not be slower.
"""

import argparse
import math
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'nanoGPT'))
from model import GPT, GPTConfig


def main(
    data_dir,
    vocab_size,
    n_layer,
    n_head,
    n_embd,
    block_size,
    batch_size,
    accumulation,
    dropout,
    bias,
    max_iters,
    eval_interval,
    eval_iters,
    learning_rate,
    min_lr,
    warmup_iters,
    lr_decay_iters,
):
    torch.manual_seed(1337)
    data = {
        split: np.memmap(os.path.join(data_dir, f'{split}.bin'), dtype=np.uint16, mode='r')
        for split in ('train', 'val')
    }

    def batch(split):
        ix = torch.randint(len(data[split]) - block_size, (batch_size,))
        rows = torch.stack([torch.from_numpy(data[split][i : i + block_size + 1].astype(np.int64)) for i in ix])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
    matrices, vectors = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    X, Y = batch('train')
    times = []
    for it in range(max_iters + 1):
        if it < warmup_iters:
            lr = learning_rate * (it + 1) / (warmup_iters + 1)
        elif it > lr_decay_iters:
            lr = min_lr
        else:
            lr = min_lr + 0.5 * (1 + math.cos(math.pi * (it - warmup_iters) / (lr_decay_iters - warmup_iters))) * (
                learning_rate - min_lr
            )
        for group in optimizer.param_groups:
            group['lr'] = lr
        if it % eval_interval == 0:
            model.eval()
            with torch.no_grad():
                mean = {
                    split: torch.tensor([model(*batch(split))[1].item() for _ in range(eval_iters)]).mean()
                    for split in ('train', 'val')
                }
            model.train()
            print(f'step {it}: train loss {mean["train"]:.4f}, val loss {mean["val"]:.4f}')
        started = time.perf_counter()
        total = torch.zeros(())  # in float32 like train.py's: a sum in float64 can round to another last digit
        for _ in range(accumulation):
            loss = model(X, Y)[1] / accumulation
            X, Y = batch('train')
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
        print(f'iter {it}: loss {total:.4f}')
    times = sorted(times[10:] or times)  # without the warm-up
    print(f'median step {1000 * times[len(times) // 2]:.3f} ms, fastest {1000 * times[0]:.3f} ms')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--data_dir')
    for name in (
        'vocab_size',
        'n_layer',
        'n_head',
        'n_embd',
        'block_size',
        'batch_size',
        'accumulation',
        'bias',
        'max_iters',
        'eval_interval',
        'eval_iters',
        'warmup_iters',
        'lr_decay_iters',
    ):
        parser.add_argument(f'--{name}', type=int)
    for name in ('dropout', 'learning_rate', 'min_lr'):
        parser.add_argument(f'--{name}', type=float)
    main(**vars(parser.parse_args()))
