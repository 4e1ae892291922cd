"""--val_tokens: the loss over exactly the first N tokens, the same number at every world size and batch size."""

import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import evaluation
from conftest import NANOGPT, ROOT, TINY, log_of
from dataset import open_dataset
from errors import UserError
from model import GPT, GPTConfig
from test_shards import headerless, shard, write

TRAIN = NANOGPT / 'train.py'
LENGTHS = [100, 7, 1, 60]  # tokens in each validation shard: 99 + 6 + 0 + 59 predictions


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    files = {f'x_val_{i}.bin': shard(rng.integers(0, 40, n).tolist()) for i, n in enumerate(LENGTHS)}
    return open_dataset(write(tmp_path, files | {'x_train_0.bin': shard(range(40))}), block_size=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=40, dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # a confident model, so that losses differ
    return model.train()


def reference(model, data, num_tokens):
    """Returns the mean of the losses of single tokens, each predicted from the tokens before it in its block of 16."""
    losses = []
    model.eval()
    for k, file in enumerate(data.val.files):
        ids = torch.tensor(data.val.read(k, 0, file.tokens).tolist())
        for start in range(0, len(ids) - 1, 16):
            x, y = ids[start : start + 16][: len(ids) - 1 - start], ids[start + 1 : start + 17]
            logits = model(x[None], y[None])[0][0]
            losses += torch.nn.functional.cross_entropy(logits.double(), y, reduction='none').tolist()
    model.train()
    return np.mean(losses[:num_tokens])


@pytest.mark.parametrize('num_tokens', [1, 16, 17, 99, 101, 164, 168])
def test_mean_loss_is_the_mean_over_the_first_tokens(model, data, num_tokens):
    expected = reference(model, data, num_tokens)
    for batch_size in (1, 3, 64):
        got = evaluation.mean_loss(model, data.val, num_tokens, 16, batch_size, 'cpu', nullcontext())
        assert got == pytest.approx(expected, rel=1e-6)  # the model computes in float32: 6e-8 for each loss
    assert model.training


def test_mean_loss_in_another_block_size_than_the_data_was_opened_with(model, data):
    whole = open_dataset(data.name, 16).val
    assert evaluation.mean_loss(
        model, open_dataset(data.name, 4).val, 99, 16, 4, 'cpu', nullcontext()
    ) == evaluation.mean_loss(model, whole, 99, 16, 4, 'cpu', nullcontext())


def test_more_tokens_than_there_are_is_an_error(model, data):
    assert evaluation.count_predictions(data.val, 168) == 164
    with pytest.raises(UserError, match='--val_tokens=169, but the validation split has only 168 tokens'):
        evaluation.mean_loss(model, data.val, 169, 16, 4, 'cpu', nullcontext())


def test_mean_loss_stops_where_it_is_asked_to(model, data):
    answers = iter([False, True])
    stop = lambda: next(answers)
    assert evaluation.mean_loss(model, data.val, 164, 16, 1, 'cpu', nullcontext(), stop) is None
    assert model.training


def test_train_prints_the_same_number_at_every_world_size_and_batch_size(launch, work):
    flags = [*TINY, '--val_tokens=301', '--gradient_accumulation_steps=6', '--eval_only']
    found = []
    for nproc, batch_size in ((1, 4), (1, 7), (2, 4), (3, 1), (3, 16)):
        result = launch(TRAIN, *flags, f'--batch_size={batch_size}', f'--out_dir=o{nproc}{batch_size}', nproc=nproc)
        found.append(log_of(f'o{nproc}{batch_size}')['evaluations'][0]['val_loss'])
        bits = found[-1] / math.log(2)  # each letter is a byte
        assert f'val loss {found[-1]:.4f}, val {bits:.4f} bits per byte' in result.stdout
    # float32 rounding, which depends on the shapes of the matrix products, averages out
    assert max(found) - min(found) < 1e-6 * found[0]


@pytest.mark.parametrize('phase', ['phase1_zero1', 'phase3_fsdp'])
def test_every_trainer_gives_the_same_number(launch, work, phase):
    """Works even if a rank has no tokens to evaluate: 60 tokens are one batch."""
    flags = [*TINY, '--val_tokens=60', '--data_order=sequential', '--max_iters=1', '--eval_interval=1']
    launch(TRAIN, *flags, '--out_dir=one')
    launch(ROOT / phase / 'train.py', *flags, '--out_dir=two', nproc=2)
    one, two = ([e['val_loss'] for e in log_of(out)['evaluations']] for out in ('one', 'two'))
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-6)  # float32 rounding, also of the step between them


def test_too_many_val_tokens_are_noticed_before_training(launch, work):
    result = launch(TRAIN, *TINY, '--val_tokens=401', nproc=2, check=False)
    assert result.returncode == 2 and result.stderr.count('error: ') == 1
    assert 'only 400 tokens' in result.stderr


# bits per byte


def with_meta(tmp_path, meta, ids):
    pair = {f'{split}.bin': headerless(ids) for split in ('train', 'val')}
    return open_dataset(write(tmp_path, pair | ({'meta.pkl': pickle.dumps(meta)} if meta else {})), 2)


def test_bytes_per_token_of_characters_and_bytes(tmp_path):
    chars = ['a', 'é', '€']
    meta = {'vocab_size': 3, 'itos': chars, 'stoi': {char: i for i, char in enumerate(chars)}}
    data = with_meta(tmp_path / 'char', meta, [2, 0, 1, 2, 2])
    assert evaluation.mean_bytes_per_token(data, 3) == (1 + 2 + 3) / 3  # the first token is no target
    assert evaluation.mean_bytes_per_token(data, 5) == (1 + 2 + 3 + 3) / 4
    data = with_meta(tmp_path / 'byte', {'vocab_size': 256, 'encoding': 'byte'}, [200, 1, 2, 3])
    assert evaluation.mean_bytes_per_token(data, 3) == 1
    data = with_meta(tmp_path / 'unknown', {'vocab_size': 9}, [1, 2, 3])
    assert evaluation.mean_bytes_per_token(data, 2) is None and evaluation.bits_per_byte(1.0, None) is None


def test_bytes_per_token_of_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'tiktoken'))
    # <|endoftext|>Hello world<|endoftext|>.
    data = with_meta(tmp_path / 'gpt2', None, [50256, 15496, 995, 50256, 13, 50300])
    assert evaluation.mean_bytes_per_token(data, 5) == (5 + 6 + 0 + 1 + 0) / 5
    assert evaluation.bits_per_byte(math.log(2) * 4, 2.0) == pytest.approx(2.0)


def test_bytes_per_token_over_several_shards(tmp_path):
    meta = {'vocab_size': 2, 'itos': ['a', 'é'], 'stoi': {'a': 0, 'é': 1}}
    files = {f'x_{split}_{i}.bin': shard([1, 0, 1, 1]) for split in ('train', 'val') for i in range(2)}
    data = open_dataset(write(tmp_path, files | {'meta.pkl': pickle.dumps(meta)}), 2)
    assert evaluation.mean_bytes_per_token(data, 8) == (1 + 2 + 2) * 2 / 6
    assert evaluation.mean_bytes_per_token(data, 4) == (1 + 2 + 2 + 1) / 4
