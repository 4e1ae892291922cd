"""
shard_writer.py and data/text/prepare.py --shards: the format's bytes, resuming after a kill, and data that must not be
mixed.
"""

import itertools
import json
import os
import re
import runpy
import sys

import numpy as np
import pytest

import prepare_common
import shard_writer
import text_reader
from conftest import ROOT
from encoding import gpt2_encoding
from errors import UserError
from message_commands import commands_in, run_command
from shard_writer import shard_name, write_shards
from text_reader import TextReader

EOT = 50256


@pytest.fixture(autouse=True)
def small_groups(monkeypatch, tmp_path_factory):
    """Groups of 300 characters, so that a few documents are many groups, and tiktoken's files without a network."""
    monkeypatch.setattr(shard_writer, 'GROUP', 300)
    monkeypatch.setattr(text_reader, 'BLOCK', 200)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path_factory.getbasetemp() / 'tiktoken'))
    gpt2_encoding()


def read_as_llm_c_does(path):
    """
    Returns the tokens of a shard, by the rules of llm.c's dataloader.h: header of 256 int32, size = 1024 + 2 * tokens.
    """
    with open(path, 'rb') as f:
        header = np.frombuffer(f.read(1024), np.int32)
        tokens = np.frombuffer(f.read(), np.uint16)
    assert header[0] == 20240520 and header[1] == 1 and header[2] == len(tokens) and not header[3:].any()
    return tokens


def shards(folder, name='text'):
    """Returns (val tokens, train tokens) of all shards in their order."""
    paths = sorted(folder.glob(f'{name}_*_*.bin'), key=lambda path: path.name[-10:])
    assert [path.name for path in paths] == [shard_name(name, i) for i in range(len(paths))]
    parts = [read_as_llm_c_does(path) for path in paths]
    return parts[0], np.concatenate(parts[1:]), parts


@pytest.fixture
def corpus(tmp_path):
    """A folder of documents in three files, and their texts in order."""
    folder = tmp_path / 'corpus'
    folder.mkdir()
    texts = [f'Document {i}: naïve 中文 {"words and " * (i % 7)}{i}' for i in range(60)]
    (folder / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts[:30]))
    (folder / 'b.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts[30:]))
    long = ' '.join(f'line {i} of a long text' for i in range(400))
    (folder / 'c.txt').write_text(long)
    return folder, [*texts, long]


def expected_tokens(texts):
    return [token for text in texts for token in [EOT, *gpt2_encoding().encode_ordinary(text)]]


def test_the_bytes_of_a_shard(tmp_path):
    """Pinned: the bytes that llm.c's dev/data/data_common.py writes for the same tokens."""
    (tmp_path / 'a.txt').write_text('Hello world. Hello world.')
    write_shards(TextReader([str(tmp_path / 'a.txt')]), str(tmp_path / 'out'), 'text', val_fraction=0.5)
    assert sorted(os.listdir(tmp_path / 'out')) == [
        '.prepare.lock',
        'shards.json',
        'text_train_000001.bin',
        'text_val_000000.bin',
    ]
    head = bytes.fromhex('88d834010100000004000000') + bytes(1012)
    tokens = np.array([13, 18435, 995, 13], '<u2').tobytes()
    assert (tmp_path / 'out/text_train_000001.bin').read_bytes() == head + tokens
    val, train, _ = shards(tmp_path / 'out')
    assert [*val, *train] == [EOT, 15496, 995, 13, 18435, 995, 13]


def test_every_token_in_order(corpus, tmp_path, capsys):
    folder, texts = corpus
    reader = TextReader([str(folder)])
    write_shards(reader, str(tmp_path / 'out'), 'text', shard_tokens=500)
    val, train, parts = shards(tmp_path / 'out')
    expected = expected_tokens(texts)
    assert [*val, *train] == expected
    assert {len(part) for part in parts[1:-1]} == {500} and 0 < len(parts[-1]) <= 500
    assert train[0] == EOT and 0.05 < len(val) / len(expected) < 0.2  # whole documents, about a tenth
    printed = capsys.readouterr().out
    characters = sum(map(len, texts))
    assert f'wrote {len(texts)} documents, {characters:,} characters, {len(expected):,} tokens' in printed
    write_shards(reader, str(tmp_path / 'out'), 'text', shard_tokens=500)  # nothing to do
    again = capsys.readouterr().out
    assert 'shards are complete' in again and again.splitlines()[1:] == printed.splitlines()


def test_n_shards_at_a_time(corpus, tmp_path, capsys):
    folder, texts = corpus
    for n in (1, 2, 2, 5, None):
        write_shards(TextReader([str(folder)]), str(tmp_path / 'out'), 'text', shard_tokens=400, num_shards=n)
        val, train, parts = shards(tmp_path / 'out')
        assert n is None or (len(parts) == n + 1 and len(train) == 400 * n)
        written = [*val.tolist(), *train.tolist()]
        assert written == expected_tokens(texts)[: len(written)]
        text = gpt2_encoding().decode_bytes([token for token in written if token != EOT]).decode(errors='ignore')
        documents, characters = written.count(EOT), len(text)
        found = re.search(r'wrote (\d+) documents, ([\d,]+) characters', capsys.readouterr().out)
        assert int(found[1]) == documents and abs(int(found[2].replace(',', '')) - characters) <= 1  # one may be cut
    assert written == expected_tokens(texts)


def dying(replace, kill, after):
    """Returns an os.replace that kills the process before or after its call number `kill`."""
    steps = itertools.count()

    def die(*args):
        step = next(steps)
        if step == kill and not after:
            os._exit(9)
        replace(*args)
        if step == kill and after:
            os._exit(9)

    return die


@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
@pytest.mark.parametrize('after', [False, True])
def test_killed_at_any_moment_and_resumed_twice(corpus, tmp_path, monkeypatch, after):
    """Killed before or after its k-th rename, then again, a preparation ends with the very same bytes."""
    folder, texts = corpus
    arguments = dict(name='text', shard_tokens=700)
    write_shards(TextReader([str(folder)]), str(tmp_path / 'whole'), **arguments)
    whole = {path.name: path.read_bytes() for path in (tmp_path / 'whole').iterdir()}
    for k in range(3):
        out = tmp_path / f'killed{k}'
        for kill in (k, k + 1, None):
            pid = os.fork()
            if pid == 0:
                try:
                    monkeypatch.setattr(os, 'replace', dying(os.replace, kill, after))
                    write_shards(TextReader([str(folder)]), str(out), **arguments)
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (9 if kill is not None else 0)
            for path in out.glob('*.bin'):
                assert path.read_bytes() == whole[path.name]  # a file with its final name is complete
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


@pytest.mark.parametrize('fraction, documents', [(0.1, [1000]), (0.3, [900, 10]), (0.1, [10, 900]), (0.5, [5] * 20)])
def test_validation_is_the_first_tokens(tmp_path, fraction, documents):
    texts = [' '.join(f'w{i}' for i in range(n)) for n in documents]
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    write_shards(TextReader([str(tmp_path / 'a.jsonl')]), str(tmp_path / 'out'), 'text', val_fraction=fraction)
    val, train, _ = shards(tmp_path / 'out')
    assert fraction / 2 <= len(val) / (len(val) + len(train)) <= 2.2 * fraction
    if len(documents) > 2:
        assert train[0] == EOT


def test_other_data_is_not_mixed_in(corpus, tmp_path):
    folder, _ = corpus
    out = str(tmp_path / 'my out')

    def write(**options):
        write_shards(
            TextReader([str(folder)], **{k: options.pop(k) for k in ('field',) if k in options}), out, **options
        )

    write(name='text', shard_tokens=500)
    before = {path.name: path.read_bytes() for path in (tmp_path / 'my out').iterdir()}
    for options, message in (
        (dict(name='other', shard_tokens=500), "name was 'text' and is 'other'"),
        (dict(name='text', shard_tokens=600), 'shard_tokens was 500 and is 600'),
        (dict(name='text', shard_tokens=500, field='body'), "field was 'text' and is 'body'"),
    ):
        with pytest.raises(UserError, match=f'come from another preparation: {message}'):
            write(**options)
    with pytest.raises(UserError, match='is a shard of another data set') as error:
        with prepare_common.DatasetWriter(out):
            pass
    text = (folder / 'c.txt').read_text()
    (folder / 'c.txt').write_text(text.replace('line 399', 'line 999'))  # the same size
    with pytest.raises(UserError, match='contents was'):
        write(name='text', shard_tokens=500)
    (folder / 'c.txt').write_text(text)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'my out').iterdir()} == before
    run_command(*commands_in(error.value), cwd=ROOT)
    assert os.listdir(tmp_path / 'my out') == ['.prepare.lock']
    (tmp_path / 'my out' / 'train.bin').write_bytes(b'1234')
    with pytest.raises(UserError, match='train.bin was not made by this preparation') as error:
        write(name='text', shard_tokens=500)
    run_command(*commands_in(error.value), cwd=ROOT)
    write(name='text', shard_tokens=500)
    state = tmp_path / 'my out' / 'shards.json'
    intact = state.read_text()
    fields = json.loads(intact)
    for key in fields:
        for damage in ({key: None}, {key: 'x'}, {key: []}, {key: -1}, {}):
            state.write_text(json.dumps({k: v for k, v in fields.items() if k != key} | damage))
            with pytest.raises(UserError, match='is damaged|come from another preparation'):
                write(name='text', shard_tokens=500)
    state.write_text(intact)
    (tmp_path / 'my out' / 'text_train_000001.bin').write_bytes(b'')
    with pytest.raises(UserError, match='text_train_000001.bin is not a complete shard(.|\n)*Choose another folder'):
        write(name='text', shard_tokens=500)
    (tmp_path / 'my out' / 'text_train_000001.bin').unlink()
    with pytest.raises(UserError, match='text_train_000001.bin is missing'):
        write(name='text', shard_tokens=500)


def test_two_preparations_at_once_and_a_full_disk(corpus, tmp_path, monkeypatch):
    folder, texts = corpus
    reader, out = TextReader([str(folder)]), str(tmp_path / 'out')
    with prepare_common.DatasetWriter(out), pytest.raises(UserError, match='another process is preparing'):
        write_shards(reader, out, 'text')  # also if the other one writes train.bin and val.bin
    fsync, calls = os.fsync, itertools.count()

    def full(descriptor):
        if next(calls) == 4:
            raise OSError(28, 'No space left on device')
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left on device. The complete shards are kept'):
        write_shards(reader, out, 'text', shard_tokens=500)
    assert len(list((tmp_path / 'out').glob('*.bin'))) == 2 and not list((tmp_path / 'out').glob('*.tmp'))
    write_shards(reader, out, 'text', shard_tokens=500)
    val, train, _ = shards(tmp_path / 'out')
    assert [*val, *train] == expected_tokens(texts)


def test_text_prepare(corpus, tmp_path, monkeypatch, capsys):
    """The command line refuses encodings that the format cannot hold."""
    folder, texts = corpus
    script = str(ROOT / 'nanoGPT' / 'data' / 'text' / 'prepare.py')

    def prepare(*args):
        monkeypatch.setattr(sys, 'argv', [script, str(folder), '--shards', '--out', str(tmp_path / 'out'), *args])
        runpy.run_path(script, run_name='__main__')

    for args, message in (
        (['--encoding', 'char'], '--shards writes GPT-2 tokens, but the encoding is char'),
        (['--shard_tokens', '1'], '--shard_tokens 1 is not between'),
        (['--val_fraction', '1'], '--val_fraction 1.0 is not between'),
    ):
        with pytest.raises(UserError, match=message):
            prepare(*args)
    prepare('--shard_tokens', '900', '--val_fraction', '0.2')
    val, train, _ = shards(tmp_path / 'out')
    assert [*val, *train] == expected_tokens(texts) and 0.1 < len(val) / len(train) < 0.5
    assert len(commands_in(capsys.readouterr().out)) == 1


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    (tmp_path / 'training').mkdir()
    (tmp_path / 'training' / 'ids.bin').write_bytes(b'12')
    (tmp_path / 'a.jsonl').write_text('{"text": "some text"}')
    write_shards(TextReader([str(tmp_path / 'a.jsonl')]), str(tmp_path / 'training'), 'text')
    assert len(shards(tmp_path / 'training')[2]) == 2


def test_too_little_text(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": ""}')
    with pytest.raises(UserError, match='the text is too short'):
        write_shards(TextReader([str(tmp_path / 'a.jsonl')]), str(tmp_path / 'out'), 'text')
    assert not list((tmp_path / 'out').glob('*.bin'))
    (tmp_path / 'a.jsonl').write_text('{"text": "now there is some"}')  # and the folder can still be used
    write_shards(TextReader([str(tmp_path / 'a.jsonl')]), str(tmp_path / 'out'), 'text')
    assert len(shards(tmp_path / 'out')[2]) == 2
