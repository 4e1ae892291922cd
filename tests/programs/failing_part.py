"""
In the second sharded save, rank RANK_THAT_FAILS cannot make its writer (PART=writer) or read its part back (PART=own),
or rank 0 cannot check the whole (PART=whole). The losses of the evaluations are 9, 3, 2, 2.5, 2.5, ...
"""

import inspect
import itertools
import os

from script import run_script

import distributed
import sharded_checkpoint

name = {'writer': 'Writer', 'own': 'crc32_of_chunks', 'whole': 'open_sharded'}[os.environ['PART']]
save, check, mean = sharded_checkpoint.write_sharded, getattr(sharded_checkpoint, name), distributed.mean_over_ranks
saves, numbers = itertools.count(1), itertools.chain([9, 9, 3, 3, 2, 2], itertools.repeat(2.5))


def failing_check(*args, **kwargs):
    raise OSError(5, 'Input/output error')


def failing_save(*args, **kwargs):
    fails = next(saves) == 2 and os.environ['RANK'] == os.environ['RANK_THAT_FAILS']
    setattr(sharded_checkpoint, name, failing_check if fails else check)
    return save(*args, **kwargs)


def mean_over_ranks(x):
    evaluating = inspect.stack()[1].function == 'estimate_loss'
    return mean(x) * 0 + next(numbers) if evaluating else mean(x)


sharded_checkpoint.write_sharded, distributed.mean_over_ranks = failing_save, mean_over_ranks
run_script()
