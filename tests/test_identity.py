"""A run continues only on the data, and samples only with the alphabet, that its checkpoint was trained on."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch

import data_identity
import encoding
from conftest import NANOGPT, TINY, load, losses
from dataset import load_meta, open_dataset
from errors import UserError
from test_shards import headerless, shard, write

TRAIN = NANOGPT / 'train.py'


def meta(chars, as_list=False):
    itos = list(chars) if as_list else dict(enumerate(chars))
    return {'vocab_size': len(chars), 'itos': itos, 'stoi': {char: i for i, char in enumerate(chars)}}


@pytest.fixture
def saved(tmp_path):
    """A set of shards, and its manifest."""
    files = {f'x_train_{i}.bin': shard([i] * (20 + i)) for i in range(3)} | {'x_val_0.bin': shard(range(30))}
    write(tmp_path / 'set', files)
    return open_dataset(str(tmp_path / 'set'), 4).manifest()


def check(saved, folder, message=None):
    data = open_dataset(str(folder), 4)
    if message is None:
        return data_identity.check_same_data(saved, data)
    with pytest.raises(UserError, match='is not the data that the checkpoint was trained on') as error:
        data_identity.check_same_data(saved, data)
    assert message in str(error.value)


def test_the_same_data_in_another_place_is_the_same(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for spelling in ('set', './set/', str(tmp_path / 'set'), 'set/x_*.bin', 'set/x_train_*'):
        check(saved, spelling)
    shutil.copytree('set', 'moved')
    os.rename('moved/x_train_0.bin', 'moved/w_train_0.bin')
    check(saved, 'moved')
    assert capsys.readouterr().out == ''


def test_the_first_difference_is_named(saved, tmp_path):
    folder = tmp_path / 'set'
    (folder / 'x_train_1.bin').write_bytes(shard([1] * 20 + [2]))
    (folder / 'x_train_2.bin').write_bytes(shard([2] * 5))
    check(saved, folder, 'train file x_train_1.bin has other contents (same size)')
    (folder / 'x_train_1.bin').write_bytes(shard([1] * 21))
    check(saved, folder, 'train file x_train_2.bin has 5 tokens instead of 22')
    (folder / 'x_train_2.bin').unlink()
    check(saved, folder, 'train file x_train_2.bin is missing (2 files instead of 3)')
    (folder / 'x_train_2.bin').write_bytes(shard([2] * 22))
    check(saved, folder)
    (folder / 'x_train_1.bin').rename(folder / 'elsewhere')
    check(saved, folder, 'train file x_train_1.bin is missing (2 files instead of 3)')
    (folder / 'elsewhere').rename(folder / 'x_train_1.bin')
    (folder / 'x_train_3.bin').write_bytes(shard([2] * 22))
    check(saved, folder, 'train file x_train_3.bin is new (4 files instead of 3)')
    (folder / 'x_train_3.bin').unlink()
    (folder / 'x_val_0.bin').write_bytes(shard(range(1, 31)))
    check(saved, folder, 'val file x_val_0.bin has other contents')


@pytest.mark.parametrize('place', [0, 1_000_000, 1_999_999])
def test_a_large_file_is_judged_by_samples_from_start_to_end(tmp_path, place):
    ids = np.arange(2_000_000) % 50_000
    folder = write(tmp_path, {'train.bin': headerless(ids), 'val.bin': headerless(range(30))})
    saved = open_dataset(folder, 4).manifest()
    check(saved, folder)
    ids[max(place - 100_000, 0) : place + 100_000] += 1  # samples are 250 KB apart
    write(tmp_path, {'train.bin': headerless(ids)})
    check(saved, folder, 'train file train.bin has other contents (same size)')


def test_a_copy_in_both_splits_is_noticed(launch, work):
    shutil.copy('data/letters/train.bin', 'data/letters/val.bin')
    warning = 'WARNING: train.bin of train and val.bin of val have the same content'
    assert launch(TRAIN, *TINY, '--max_iters=1').stderr.startswith(warning)


def test_a_checkpoint_without_a_manifest_is_accepted(tmp_path, saved, capsys):
    check(None, tmp_path / 'set')
    assert 'does not record its training data' in capsys.readouterr().out


def damaged_manifests():
    entry = {'file': 'x', 'bytes': 1, 'tokens': 1, 'fingerprint': 'f'}
    good = {'encoding': "GPT-2's", 'train': [entry], 'val': [entry]}
    yield from ([], 'manifest', 7, {}, {**good, 'encoding': None}, {**good, 'train': None}, {**good, 'val': [None]})
    for field in entry:
        yield {**good, 'train': [{k: v for k, v in entry.items() if k != field}]}
        yield {**good, 'val': [{**entry, field: None}]}


@pytest.mark.parametrize('manifest', list(damaged_manifests()))
def test_a_damaged_manifest_is_one_message(saved, tmp_path, manifest):
    with pytest.raises(UserError, match='the checkpoint is damaged'):
        check(manifest, tmp_path / 'set')
    with pytest.raises(UserError, match='the checkpoint is damaged'):
        data_identity.check_same_encoding(manifest, {}, 'set')


def test_the_manifest_is_plain(saved):
    assert pickle.loads(pickle.dumps(saved)) == saved
    assert {type(v) for entry in saved['train'] for v in entry.values()} == {str, int}


# encodings


def test_fingerprints_tell_encodings_apart():
    metas = [
        {},
        meta('abc'),
        meta('abd'),
        meta('acb'),
        {'vocab_size': 256, 'encoding': 'byte'},
        {'vocab_size': 128256, 'encoding': 'llama-3'},
        {'vocab_size': 9},
        {'vocab_size': 10},
    ]
    prints = [encoding.encoding_fingerprint(m) for m in metas]
    assert len(set(prints)) == len(prints)
    assert encoding.encoding_fingerprint({'vocab_size': 50257, 'encoding': 'gpt2'}) == prints[0]
    assert encoding.encoding_fingerprint(meta('abc', as_list=True)) == prints[1]
    assert encoding.encoding_fingerprint({**meta('abc'), 'train_tokens': 7, 'dtype': 'uint16'}) == prints[1]


@pytest.mark.parametrize('itos', [['a', 'é', '\n'], ('a', 'é', '\n'), 'aé\n', {0: 'a', 1: 'é', 2: '\n'}])
@pytest.mark.parametrize('with_stoi', [True, False])
def test_itos_may_be_a_list(tmp_path, itos, with_stoi):
    content = {'vocab_size': 3, 'itos': itos} | ({'stoi': {'a': 0, 'é': 1, '\n': 2}} if with_stoi else {})
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(content))
    char = encoding.get_encoding(load_meta(str(tmp_path)))
    assert char.encode('é\na') == [1, 2, 0] and char.decode([1, 2, 0, 3]) == 'é\na\ufffd'
    assert char.byte_lengths() == [1, 2, 1]


@pytest.mark.parametrize('stoi', [{'a': 'x'}, {'a': 3}, {'a': -1}, {'a': True}, {0: 0}, {'a': [0]}])
def test_a_table_of_wrong_ids_decodes_nothing(stoi):
    for tables in ({'itos': ['a', 'b', 'c'], 'stoi': stoi}, {'stoi': stoi}):
        with pytest.raises(UserError, match='not a table of characters and ids below vocab_size'):
            encoding.get_encoding({'vocab_size': 3, **tables})
    with pytest.raises(UserError, match='not a table of characters'):
        encoding.get_encoding({'vocab_size': 2, 'itos': ['a', 'b', 'c']})


@pytest.mark.parametrize('name', ['gpt2', 'byte'])
def test_a_vocabulary_smaller_than_its_encoding(name):
    with pytest.raises(UserError, match=f'vocab_size is 255, but the encoding {name} has'):
        encoding.get_encoding({'vocab_size': 255, 'encoding': name})


def test_one_table_is_enough():
    char = encoding.get_encoding({'vocab_size': 2, 'stoi': {'a': 1, 'b': 0}})
    assert char.encode('ab') == [1, 0] and char.decode([1, 0]) == 'ab'


@pytest.mark.parametrize('itos', [5, [0, 1], {0: b'a'}, {'0': 'a'}, {0: 'a', 'b': 'c'}, {0: ['a'], 1: {}}])
def test_a_table_that_is_none_trains_but_decodes_nothing(itos):
    odd = {'vocab_size': 2, 'itos': itos, 'stoi': 7}
    assert encoding.encoding_fingerprint(odd) != encoding.encoding_fingerprint({**odd, 'stoi': 8})
    with pytest.raises(UserError, match='unknown encoding'):
        encoding.get_encoding(odd)


def test_another_alphabet_is_refused(tmp_path):
    saved = {'encoding': encoding.encoding_fingerprint(meta('abc'))}
    data_identity.check_same_encoding(saved, meta('abc', as_list=True), 'set')
    data_identity.check_same_encoding(None, meta('abd'), 'set')
    with pytest.raises(
        UserError, match='the encoding of set is 3 tokens of its own .*, but the checkpoint was trained'
    ):
        data_identity.check_same_encoding(saved, meta('abd'), 'set')


# in train.py


def test_resume_refuses_other_data_of_the_same_size(launch, work):
    launch(TRAIN, *TINY, '--max_iters=4')
    before = load('out/ckpt.pt')
    folder = work / 'data/letters'
    kept = (folder / 'train.bin').read_bytes()
    for name, content, message in (
        ('meta.pkl', pickle.dumps(meta([chr(ord('A') + i) for i in range(40)])), 'the encoding of data/letters is'),
        ('train.bin', headerless(np.frombuffer(kept, '<u2')[::-1]), 'train file train.bin has other contents'),
        ('val.bin', headerless(np.arange(400) % 40), 'val file val.bin has other contents'),
    ):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        for nproc in (1, 2):
            result = launch(TRAIN, *TINY, '--init_from=resume', nproc=nproc, check=False)
            assert result.returncode == 2 and result.stderr.count('error: ') == 1, result.stderr
            assert message in result.stderr
        (folder / name).write_bytes(good)
    assert load('out/ckpt.pt')['iter_num'] == before['iter_num']


def test_another_spelling_of_the_data_set_resumes_exactly(launch, work):
    whole = losses(launch(TRAIN, *TINY, '--out_dir=whole').stdout)
    launch(TRAIN, *TINY, '--max_iters=9')
    shutil.copytree(work / 'data/letters', work / 'elsewhere')
    result = launch(TRAIN, *TINY, f'--dataset={work}/elsewhere/', '--init_from=resume')
    assert 'new data order' not in result.stdout
    rest = [line for line in losses(result.stdout) if line.startswith('iter')]
    assert rest == [line for line in whole if line.startswith('iter')][10:]


def test_a_checkpoint_of_an_older_version_resumes_with_a_line(launch, work):
    launch(TRAIN, *TINY, '--max_iters=4')
    checkpoint = load('out/ckpt.pt')
    del checkpoint['resume']['data']
    torch.save(checkpoint, 'out/ckpt.pt')
    result = launch(TRAIN, *TINY, '--init_from=resume')
    assert 'does not record its training data' in result.stdout
