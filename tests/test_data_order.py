"""--data_order=sequential: every token once per epoch, and a position that survives any number of resumes."""

import glob
import itertools
import json
import os

import numpy as np
import pytest
import torch

from conftest import NANOGPT, PROGRAMS, TINY, load, log_of, make_letters
from data_order import SequentialOrder
from dataset import open_dataset
from errors import UserError
from test_shards import headerless, shard, write
from token_files import inputs_and_targets

TRAIN = NANOGPT / 'train.py'
LENGTHS = [50, 5, 33, 8, 2, 1]  # tokens in each training shard; with block_size 8, one of them ends with a whole row


@pytest.fixture
def tokens(tmp_path):
    """Training shards whose tokens are all different: 0 to 98."""
    files = {'x_val_0.bin': shard(range(20))}
    for i, end in enumerate(itertools.accumulate(LENGTHS)):
        files[f'x_train_{i}.bin'] = shard(range(end - LENGTHS[i], end))
    return open_dataset(write(tmp_path, files), block_size=8).train


@pytest.mark.parametrize('order', ['sequential', 'random'])
def test_a_batch_that_no_memory_can_hold(launch, work, order):
    """It ends the run at once, instead of filling the memory with a list of its rows."""
    flags = [*TINY, f'--data_order={order}', f'--batch_size={2**63 - 1}']
    run = launch(TRAIN, *flags, nproc=2, check=False, timeout=30)
    assert run.returncode == 2 and run.stderr.count('error: ') == 1 and 'ran out of memory' in run.stderr


def first_tokens(orders, steps):
    """
    Returns the first tokens of the rows that the orders of all ranks return in so many steps, in the order of the
    position.
    """
    return [row[0].item() for _ in range(steps) for order in orders for row in order.next(1000)]


def ranks(tokens, batch_size, world_size, state=None):
    return [SequentialOrder(tokens, batch_size, rank, world_size, state) for rank in range(world_size)]


@pytest.mark.parametrize('batch_size, world_size', [(1, 1), (4, 1), (3, 2), (2, 5)])
def test_every_token_is_read_once_per_epoch(tokens, batch_size, world_size):
    """A global batch that does not divide the epoch continues with the next epoch."""
    orders = ranks(tokens, batch_size, world_size)
    rows = []
    while len(rows) < 2 * tokens.rows:
        rows += [row for order in orders for row in order.next(1000)]
    starts = [0, *itertools.accumulate(LENGTHS)]
    for epoch in (rows[: tokens.rows], rows[tokens.rows : 2 * tokens.rows]):
        x, y = inputs_and_targets(torch.stack(epoch))
        real = y >= 0
        assert torch.equal(y[real], x[real] + 1)  # the target is the next token of the same shard
        # a shard's first token has none before it, and its last none after it
        assert sorted(y[real].tolist()) == [i for i in range(starts[-1]) if i not in starts]
        assert sorted(x[real].tolist()) == [i for i in range(starts[-1]) if i + 1 not in starts]


def test_the_position_holds_at_any_world_size_and_batch_size(tokens):
    everything = first_tokens(ranks(tokens, 1, 1), 60)
    assert first_tokens(ranks(tokens, 3, 4), 5) == everything
    # two resumes in a row, each with other ranks; a batch that was drawn but not trained on comes again
    orders = ranks(tokens, 2, 3)
    seen = first_tokens(orders, 3)
    first_tokens(orders, 1)
    assert len({str(order.state()) for order in orders}) == 1
    orders = ranks(tokens, 4, 1, orders[0].state())
    seen += first_tokens(orders, 2)
    first_tokens(orders, 1)
    orders = ranks(tokens, 1, 2, orders[0].state())
    assert orders[0].state() == {'row': 26, 'block_size': 8}  # nothing was drawn since
    seen += first_tokens(orders, 17)
    assert seen == everything


def test_a_smaller_block_size_repeats_less_than_a_block(tokens):
    order = SequentialOrder(tokens, 4)
    order.next(1000)
    next_token = order.next(1000)[0, 0].item()
    cropped = type(tokens)(tokens.files, block_size=5)
    for epochs in (0, 1):
        state = {'row': order.state()['row'] + epochs * tokens.rows, 'block_size': 8}
        again = SequentialOrder(cropped, 1, state=state)
        assert next_token - 5 < again.next(1000)[0, 0].item() <= next_token
        assert again.drawn // cropped.rows == epochs


@pytest.mark.parametrize('state', [{'row': 1}, {'row': -1, 'block_size': 8}, {'row': '1', 'block_size': 8}, [1], 7])
def test_a_damaged_position_is_refused(tokens, state):
    with pytest.raises(UserError, match='position in the data'):
        SequentialOrder(tokens, 4, state=state)


def test_a_block_larger_than_all_data_needs_no_memory(tokens):
    order = SequentialOrder(tokens, 1, state={'row': 2, 'block_size': 2**62})
    assert order.next(1000)[0, 0] == 55  # the start of the third shard


# in train.py

SEQUENTIAL = [*TINY, '--data_order=sequential', '--dataset=web', '--dropout=0.1', '--eval_interval=4']


@pytest.fixture
def web(work):
    """Three shards of letters: 39 rows of 16, so that 20 iterations of 8 rows are four epochs."""
    ids = np.fromfile(work / 'data/letters/train.bin', np.uint16)
    files = {f'web_train_{i}.bin': shard(ids[200 * i : 200 * i + 200 + i]) for i in range(3)}
    files |= {'web_val_0.bin': shard(ids[800:1200]), 'meta.pkl': (work / 'data/letters/meta.pkl').read_bytes()}
    return write(work / 'data/web', files)


def run_losses(out_dir):
    return {record['iter']: record['loss'] for record in log_of(out_dir)['iterations']}


@pytest.mark.parametrize('nproc', [1, 2])
def test_resume_where_the_next_batch_has_the_end_of_a_shard(launch, web, nproc):
    """Row 25 is the last of shard 1, so the batch that was drawn for iteration 3 has targets that are ignored."""
    launch(TRAIN, *SEQUENTIAL, '--out_dir=whole', nproc=nproc)
    launch(TRAIN, *SEQUENTIAL, '--max_iters=2', nproc=nproc)
    assert any((rank['Y'] == -1).any() for rank in load('out/ckpt.pt')['resume']['ranks'])
    launch(TRAIN, *SEQUENTIAL, '--init_from=resume', nproc=nproc)
    expected, got = run_losses('whole'), run_losses('out')
    assert got == {i: expected[i] for i in range(3, 21)}


@pytest.mark.parametrize('nproc', [1, 2])
def test_two_resumes_give_the_losses_of_an_undisturbed_run(launch, web, nproc):
    launch(TRAIN, *SEQUENTIAL, '--out_dir=whole', nproc=nproc)
    expected = run_losses('whole')
    assert len(expected) == 21
    got = {}
    for max_iters in (9, 13, 20):
        launch(TRAIN, *SEQUENTIAL, '--out_dir=parts', '--init_from=auto', f'--max_iters={max_iters}', nproc=nproc)
        got |= run_losses('parts')
    assert got == expected  # in every digit


@pytest.mark.parametrize('nproc', [1, 2])
def test_sigkill_and_two_resumes(launch, web, nproc):
    """A killed run continues exactly, whenever the kill comes."""
    flags = [*SEQUENTIAL, '--max_iters=120', '--lr_decay_iters=120', '--eval_iters=1']
    launch(TRAIN, *flags, '--out_dir=whole', nproc=nproc)
    launch(TRAIN, *flags, nproc=nproc, kill_after=1, check=False)
    for max_iters in (60, 120):
        launch(TRAIN, *flags, '--init_from=auto', f'--max_iters={max_iters}', nproc=nproc)
    expected = run_losses('whole')
    for log in glob.glob('out/run_*.json'):
        with open(log) as f:
            for record in json.load(f)['iterations']:
                assert record['loss'] == expected[record['iter']]  # in every digit
    assert load('out/ckpt.pt')['resume']['order'] == load('whole/ckpt.pt')['resume']['order']


def test_resume_at_another_world_size_continues_at_the_next_token(launch, web):
    """
    Without dropout, the windows of an iteration do not depend on the number of ranks, so the losses do not either.
    """
    flags = [*SEQUENTIAL, '--dropout=0.0']
    launch(TRAIN, *flags, '--out_dir=whole')
    for nproc, max_iters in ((2, 6), (1, 11), (2, 20)):
        result = launch(TRAIN, *flags, '--init_from=auto', f'--max_iters={max_iters}', nproc=nproc)
        assert 'new data order' not in result.stdout
    expected, got = run_losses('whole'), run_losses('out')
    # the sums of gradients differ in their order: rounding of 6e-8, which 20 steps amplify
    assert got == pytest.approx({i: expected[i] for i in got}, rel=1e-5)
    assert load('out/ckpt.pt')['resume']['order'] == load('whole/ckpt.pt')['resume']['order']


def test_an_unknown_order_is_refused(launch, work):
    result = launch(TRAIN, *TINY, '--data_order=shuffled', check=False)
    assert result.returncode == 2 and 'data_order=shuffled' in result.stderr


# a token outside the vocabulary ends the run after a save


def spoil(path, position, token):
    """Overwrites one token of a shard, and returns the one that was there."""
    tokens = np.memmap(path, np.uint16, 'r+', offset=1024)
    before, tokens[position] = int(tokens[position]), token
    return before


@pytest.mark.parametrize('nproc, row', [(1, 32), (2, 37)])
def test_a_bad_token_that_is_drawn_saves_first(launch, web, nproc, row):
    """
    Iteration 4 would begin with rows 32 to 35, and on a second rank with rows 36 to 39, which are drawn at the end of
    iteration 3.
    """
    # one batch of random windows, which does not meet the token
    flags = [*SEQUENTIAL, '--eval_iters=1', '--eval_interval=1000']
    launch(TRAIN, *flags, '--out_dir=whole', nproc=nproc)
    path, position = f'{web}/web_train_2.bin', (row - 26) * 16 + 5  # shards 0 and 1 have 13 rows each
    before = spoil(path, position, 99)
    result = launch(PROGRAMS / 'without_scan.py', TRAIN, *flags, nproc=nproc, check=False)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert result.stderr.count('error: ') == 1
    assert (
        f'token 99 at position {position} of {path.replace(web, "data/web")} is outside the vocabulary of 40'
        in result.stderr
    )
    assert load('out/ckpt.pt')['iter_num'] == 4
    assert set(run_losses('out')) == {0, 1, 2, 3}
    # once the file is repaired, the run continues exactly
    spoil(path, position, before)
    launch(TRAIN, *flags, '--init_from=resume', nproc=nproc)
    assert run_losses('out') == {i: loss for i, loss in run_losses('whole').items() if i in run_losses('out')}
    assert max(run_losses('out')) == 20


@pytest.mark.parametrize('nproc', [1, 2])
def test_data_that_is_deleted_while_it_is_read_costs_no_work(launch, work, nproc):
    """Open files can still be read, and the checkpoint of their run has no fingerprint of them."""
    flags = [*TINY, '--eval_interval=1000', '--max_iters=60']
    launch(PROGRAMS / 'deleted_data.py', TRAIN, *flags, nproc=nproc)
    checkpoint = load('out/ckpt.pt')
    assert checkpoint['iter_num'] == 61
    make_letters(work / 'copy')
    result = launch(TRAIN, *flags, '--max_iters=61', '--init_from=resume', '--dataset=copy/data/letters', nproc=nproc)
    assert 'new data order' not in result.stdout


@pytest.mark.parametrize('flag', ['--eval_iters=1', '--val_tokens=300'])
def test_an_evaluation_without_its_data_is_no_best_one(launch, work, flag):
    flags = [*TINY, '--eval_interval=5', '--batch_size=32', '--eval_iters=1', flag]
    result = launch(PROGRAMS / 'deleted_data.py', TRAIN, *flags, env={'CUT': '1'}, check=False)
    assert result.returncode == 2 and 'val.bin can no longer be read' in result.stderr
    assert 'step 0:' in result.stdout and 'step 5:' not in result.stdout
    assert load('out/ckpt.pt')['iter_num'] == 5 and not os.path.exists('out/ckpt_best.pt')


@pytest.mark.parametrize(
    'split, nproc, env', [('train', 1, {}), ('val', 1, {'LOCAL_RANK': '3'}), ('train', 2, {}), ('val', 2, {})]
)
def test_the_scan_finds_a_bad_token_on_every_rank(launch, work, split, nproc, env):
    """One of 200,000 tokens is bad, which random draws would take long to hit."""
    ids = np.tile(np.arange(40), 5000)
    ids[150_000] = 40
    write(work / 'data/letters', {f'{split}.bin': headerless(ids)})
    flags = ['--max_iters=100000', '--eval_interval=100000', '--log_interval=1000', '--eval_iters=1']
    result = launch(TRAIN, *TINY, *flags, nproc=nproc, env=env, check=False, timeout=60)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert result.stderr.count('error: ') == 1
    assert f'token 40 at position 150,000 of data/letters/{split}.bin is outside the vocabulary of 40' in result.stderr
