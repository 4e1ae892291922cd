"""The second torch.save finds no space on the disk."""

import itertools

import torch
from script import run_script

save, saves = torch.save, itertools.count()


def save_once(*args):
    if next(saves):
        raise OSError(28, 'No space left on device')
    save(*args)


torch.save = save_once
run_script()
