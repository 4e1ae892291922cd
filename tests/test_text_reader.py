"""
text_reader.py: the same text gives the same tokens from every kind of file, and nothing is read or skipped silently.
"""

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import text_reader
from conftest import ROOT
from errors import UserError
from message_commands import commands_in, run_command
from text_reader import TextReader, find_files, guess_encoding, read_text

TEXT = 'Straße:\n\tnaïve  中文 😀\n\nend\n'


def documents(path, **options):
    return [''.join(pieces) for _, pieces in TextReader([str(path)], **options).documents()]


def zstd(data):
    return subprocess.run(['zstd', '-q'], input=data, capture_output=True, check=True).stdout


COMPRESSORS = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}
COMPRESSORS |= {'.zst': zstd} if shutil.which('zstd') else {}

# one text, by other line ends and with or without a byte order mark
SPELLINGS = {
    'plain': TEXT,
    'BOM': '\ufeff' + TEXT,
    'two BOMs': '\ufeff\ufeff' + TEXT,
    'CR LF': TEXT.replace('\n', '\r\n'),
    'CR': TEXT.replace('\n', '\r'),
    'BOM and CR': '\ufeff' + TEXT.replace('\n', '\r'),
}


@pytest.mark.parametrize('compression', COMPRESSORS)
@pytest.mark.parametrize('spelling', SPELLINGS)
def test_the_same_text_from_every_kind_of_file(tmp_path, spelling, compression):
    text, compress = SPELLINGS[spelling], COMPRESSORS[compression]
    lines = json.dumps({'text': text}) + '\n' + json.dumps({'text': text}, ensure_ascii=False)
    (tmp_path / f'a.txt{compression}').write_bytes(compress(text.encode()))
    (tmp_path / f'b.jsonl{compression}').write_bytes(compress(lines.encode()))
    (tmp_path / f'c.ndjson{compression}').write_bytes(compress(('\ufeff' + lines.replace('\n', '\r')).encode()))
    assert documents(tmp_path / f'a.txt{compression}') == [TEXT]
    assert read_text(str(tmp_path / f'a.txt{compression}')) == TEXT
    assert documents(tmp_path / f'b.jsonl{compression}') == [TEXT] * 2
    assert documents(tmp_path / f'c.ndjson{compression}') == [TEXT] * 2


def test_line_ends_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_reader, 'BLOCK', 1)
    (tmp_path / 'a.txt').write_bytes(('\ufeff' + TEXT).replace('\n', '\r\n').encode())
    assert documents(tmp_path / 'a.txt') == [TEXT]


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_every_kind_of_column_with_text(tmp_path, spelling):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    texts = [SPELLINGS[spelling], None, '', 'b']
    strings = pa.array(texts)
    binary = pa.array([text and text.encode() for text in texts], pa.binary())
    columns = {
        'string': strings,
        'large_string': strings.cast(pa.large_string()),
        'string_view': strings.cast(pa.string_view()),
        'dictionary': strings.dictionary_encode(),
        'dictionary of large strings': strings.cast(pa.large_string()).dictionary_encode(),
        'binary': binary,
        'large_binary': binary.cast(pa.large_binary()),
        'dictionary of bytes': binary.dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / 'a.parquet')
    (tmp_path / 'b.parquet.gz').write_bytes(gzip.compress((tmp_path / 'a.parquet').read_bytes()))
    for column in columns:
        for name in ('a.parquet', 'b.parquet.gz'):
            reader = TextReader([str(tmp_path / name)], field=column)
            assert [''.join(pieces) for _, pieces in reader.documents()] == [TEXT, 'b'], column
            assert reader.empty == 2


def test_a_column_or_field_that_is_no_text_is_named_with_its_type(tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    columns = {'text': [['a']], 'n': [1], 'map': [{'a': 'b'}], 'raw': pa.array([b'\xff'])}
    columns['wrong'] = pa.StringArray.from_buffers(1, pa.py_buffer(np.int32([0, 1])), pa.py_buffer(b'\xff'))
    pq.write_table(pa.table(columns), tmp_path / 'a.parquet')
    for column, message in (
        ('text', "'text' is of type list<.*string>, not text"),
        ('n', "'n' is of type int64, not text"),
        ('map', "'map' is of type struct<.*>, not text"),
        ('raw', 'a.parquet, row 1: not UTF-8 text: byte 0 is 0xff'),
        ('wrong', 'a.parquet, row 1: not UTF-8 text: byte 0 is 0xff'),
        ('body', "there is no column 'body'; its columns: text, n, map, raw, wrong"),
    ):
        with pytest.raises(UserError, match=message):
            documents(tmp_path / 'a.parquet', field=column)
    pq.write_table(pa.table([['a'], ['b']], ['text', 'text']), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match="there are 2 columns 'text': rename one"):
        documents(tmp_path / 'a.parquet')
    for value, name in ((1, 'int'), (['a'], 'list'), ({'a': 'b'}, 'dict'), (True, 'bool')):
        (tmp_path / 'a.jsonl').write_text(json.dumps({'text': value}))
        with pytest.raises(UserError, match=f"line 1: the field 'text' is of type {name}, not text"):
            documents(tmp_path / 'a.jsonl')


def test_what_a_folder_holds_besides_text_is_named(tmp_path, capsys):
    """Compressed files are read, hidden ones never, and texts about the data only if they are named."""
    for name in ('a.jsonl.gz', 'deep/b.JSONL.GZ'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(json.dumps({'text': name}).encode()))
    for name in ('LICENSE.txt', 'deep/README.txt', 'c.txt', 'd.csv', 'info.json', 'e.tar.gz', '.hidden.txt', '._c.txt'):
        (tmp_path / name).write_text(name)
    for folder in ('.git', 'deep/.cache'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'secret.txt').write_text('secret')
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'again.txt').symlink_to('c.txt')
    (tmp_path / 'lost.txt').symlink_to('nowhere.txt')
    os.mkfifo(tmp_path / 'pipe.txt')
    reader = TextReader([str(tmp_path)])
    assert sorted(''.join(pieces) for _, pieces in reader.documents()) == ['a.jsonl.gz', 'c.txt', 'deep/b.JSONL.GZ']
    reader.report()
    printed = capsys.readouterr().out
    assert 'reading 3 files' in printed and '2 .jsonl.gz (a.jsonl.gz, b.JSONL.GZ), 1 .txt' in printed
    for name, reason in {
        'LICENSE.txt': 'about the data',
        'deep/README.txt': 'about the data',
        'd.csv': 'not .txt, .jsonl or .parquet',
        'e.tar.gz': 'not .txt, .jsonl or .parquet',
        'info.json': 'rename it to .jsonl',
        '.hidden.txt': 'hidden',
        '._c.txt': 'hidden',
        '.git': 'hidden',
        'deep/.cache': 'hidden',
        'empty.txt': 'empty',
        'lost.txt': 'a link to a file that does not exist',
        'pipe.txt': 'not a regular file',
    }.items():
        line = next(line for line in printed.splitlines() if f'{tmp_path / name}' in line)
        assert line.startswith('skipped') and reason in line
    assert 'the same file as another' in printed
    assert documents(tmp_path / 'LICENSE.txt') == ['LICENSE.txt']
    for name, message in (
        ('.hidden.txt', 'a hidden file'),
        ('pipe.txt', 'not a regular file'),
        ('d.csv', 'is not a .txt'),
    ):
        with pytest.raises(UserError, match=message):
            find_files([str(tmp_path / name)])
    with pytest.raises(UserError, match='a hidden file'):
        read_text(str(tmp_path / '.hidden.txt'))
    (tmp_path / 'only').mkdir()
    (tmp_path / 'only' / 'LICENSE.txt').write_text('text')
    with pytest.raises(UserError, match='there are no .txt.*\n.*LICENSE.txt: about the data'):
        find_files([str(tmp_path / 'only')])


def test_documents_in_a_txt_file(tmp_path, monkeypatch, capsys):
    stories = [f'story {i}\n\nwith  blanks{" and words" * i}' for i in range(30)]
    text = '\n<|endoftext|>\n'.join(['', *stories, ''])
    (tmp_path / 'a.txt').write_text(text)
    for block in (1 << 20, 7):
        monkeypatch.setattr(text_reader, 'BLOCK', block)
        assert documents(tmp_path / 'a.txt', separator='<|endoftext|>') == stories
    monkeypatch.setattr(text_reader, 'BLOCK', 1 << 20)
    reader = TextReader([str(tmp_path / 'a.txt')])
    assert [''.join(pieces) for _, pieces in reader.documents()] == [text]  # by default it is text
    reader.report_documents()
    assert "a.txt: <|endoftext|> was read as text; to separate documents at it, pass --separator '<|endoftext|>'" in (
        capsys.readouterr().out
    )
    (tmp_path / 'b.txt').write_text('one\ntwo')
    paths = [str(tmp_path / name) for name in ('a.txt', 'b.txt')]
    hint = "; bash writes a line end as $'\\n'"
    # the second separator is as typed in quotes: a backslash and an n
    for separator, number, whole, more in (('<|endoftext|>', 31, paths[1:], ''), ('\\n', 2, paths, hint)):
        reader = TextReader(paths, separator=separator)
        assert len(list(reader.documents())) == number
        reader.report_documents()
        note = (
            f'{", ".join(whole)}: read as one document each, because the separator {separator!r} does not occur{more}'
        )
        assert f'note: {note}\n' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['a.txt.gz', 'a.jsonl.bz2', 'a.txt.xz', *['a.jsonl.zst'] * ('.zst' in COMPRESSORS)])
def test_damaged_compressed_files(tmp_path, name):
    lines = b''.join(b'{"text": "%d"}\n' % i for i in range(100_000))
    whole = COMPRESSORS[name[name.rindex('.') :]](lines)
    # parallel compressors and `cat` write several streams
    for damaged in (whole[: len(whole) // 2], whole + whole[: len(whole) // 2], whole + b'??' + whole):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f'{name} is damaged or incomplete: .*. Get the file again'):
            documents(tmp_path / name)


@pytest.mark.parametrize('ending', COMPRESSORS)
def test_several_compressed_streams(tmp_path, ending):
    parts = range(0), range(100_000), range(100_000, 100_003)
    lines = [b''.join(b'{"text": "%d"}\n' % i for i in part) for part in parts]
    padding = b'\0' * 8 if ending in ('.xz', '.gz') else b''  # which these two formats allow
    streams = [COMPRESSORS[ending](part) + padding for part in lines]
    (tmp_path / f'a.jsonl{ending}').write_bytes(b''.join(streams))
    assert documents(tmp_path / f'a.jsonl{ending}') == list(map(str, range(100_003)))


GERMAN, RUSSIAN = 'Größe, Maß und Öl – „Zitat“\n' * 9, 'Война и мир\n' * 9
ENCODED = {
    'utf-16': (GERMAN, 'UTF-16'),
    'utf-16-le': (GERMAN, 'UTF-16LE'),
    'utf-16-be': (RUSSIAN + GERMAN * 9, 'UTF-16BE'),
    'utf-32': (GERMAN, 'UTF-32'),
    'utf-32-le': (GERMAN, 'UTF-32LE'),
    'utf-32-be': (GERMAN, 'UTF-32BE'),
    'latin-1': ('Größe, Maß und Öl\n' * 9, 'ISO-8859-1'),
    'cp1252': (GERMAN, 'WINDOWS-1252'),
}


@pytest.mark.skipif(not shutil.which('iconv'), reason='needs iconv')
@pytest.mark.parametrize('compression', ['', '.gz'])
@pytest.mark.parametrize('encoding', ENCODED)
def test_the_command_that_converts_another_encoding(tmp_path, encoding, compression):
    """
    It runs as printed, also for names that need quotes; the original is kept, and the same call succeeds afterwards.
    """
    text, name = ENCODED[encoding]
    path = tmp_path / f"it's a $HOME;\n file.txt{compression}"
    content = COMPRESSORS[compression](text.encode(encoding))
    path.write_bytes(content)
    with pytest.raises(UserError, match=f'is not UTF-8 text: byte .*It looks like {name}') as error:
        documents(path)
    (command,) = commands_in(error.value)
    if encoding == 'utf-16':
        assert 'byte 0 is 0xff' in str(error.value)
    run_command(command, cwd=tmp_path)
    assert documents(path) == [text] and path.with_name(path.name + '.orig').read_bytes() == content


@pytest.mark.parametrize('damage', [b'\xff', b'\0'])
def test_the_command_that_repairs_damaged_utf8(tmp_path, damage):
    path, text = tmp_path / 'a.txt', 'Größe – 中文 '.encode() * 99
    path.write_bytes(text[:600] + damage + text[600:])
    with pytest.raises(UserError, match='byte 600 is 0x') as error:
        documents(path)
    run_command(*commands_in(error.value))
    assert documents(path) == [text.decode()]


def test_an_encoding_is_found_behind_a_long_start(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(b'{"text": "x"}\n' * 9 + b'{"text": "Gr\xf6\xdfe"}')
    with pytest.raises(
        UserError, match='line 10: not UTF-8 text: byte 12 of the line is 0xf6. It looks like ISO-8859-1'
    ):
        documents(tmp_path / 'a.jsonl')
    # iconv refuses it as WINDOWS-1252
    assert guess_encoding('Größe'.encode('cp1252') + b'\x81')[0].startswith('ISO-8859-1')


def test_shakespeare_reads_like_text(tmp_path):
    """The scripts for a text and for many files agree on its characters."""
    copy = tmp_path / 'nanoGPT'
    shutil.copytree(ROOT / 'nanoGPT', copy, ignore=shutil.ignore_patterns('*.bin', 'meta.pkl', 'out-*', '__pycache__'))
    text = 'To be, or not to be: that is the question.\n' * 20
    (tmp_path / 'play.txt').write_bytes(('\ufeff' + text).replace('\n', '\r').encode())
    vocabularies = []
    for script in (['shakespeare_char', '--input', 'play.txt'], ['text', 'play.txt', '--encoding', 'char']):
        command = [sys.executable, copy / 'data' / script[0] / 'prepare.py', *script[1:]]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        vocabularies.append((copy / 'data' / script[0] / 'meta.pkl').read_bytes().count(b'\xef\xbb\xbf'))
        tokens = (copy / 'data' / script[0] / 'train.bin').read_bytes()
        vocabularies.append(len(set(tokens[::2])))
    assert vocabularies == [0, len(set(text)), 0, len(set(text))]
    with pytest.raises(UserError, match='holds documents, not one text') as error:
        read_text(str(tmp_path / 'a.jsonl'))
    (command,) = commands_in(error.value)
    (tmp_path / 'a.jsonl').write_text(json.dumps({'text': text}))
    run_command(f'{command} --encoding byte --out {tmp_path / "out"}')
    assert (tmp_path / 'out' / 'train.bin').exists()
