"""
data/fineweb/prepare.py as a user runs it, with a Hugging Face Hub that is a folder on this machine: nothing here needs
a network.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from encoding import gpt2_encoding
from message_commands import commands_in, run_command
from shard_writer import header

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')
SCRIPT = ROOT / 'nanoGPT' / 'data' / 'fineweb' / 'prepare.py'
EOT = 50256
TEXTS = [f'Web page {i} about {"many words and things " * (i % 9 * 100)}.' for i in range(300)]  # 2.5 MB

# the part of huggingface_hub that the script uses, on the folder HUB; it counts downloads and can fail at one
FAKE_HUB = """
import os, shutil
from types import SimpleNamespace

HUB = os.environ.get('HUB')


def connect():
    if not HUB:
        raise ConnectionError()  # without a message


class HfApi:
    def dataset_info(self, repo_id):
        connect()
        return SimpleNamespace(sha='1234')

    def list_repo_tree(self, repo_id, path_in_repo, *, repo_type, revision):
        assert repo_type == 'dataset' and revision == '1234'
        yield SimpleNamespace(path=path_in_repo + '/folder')
        folder = os.path.join(HUB, repo_id, path_in_repo)
        for name in sorted(os.listdir(folder), reverse=True):
            yield SimpleNamespace(path=f'{path_in_repo}/{name}', size=os.path.getsize(os.path.join(folder, name)))


def hf_hub_download(repo_id, filename, *, repo_type, local_dir, revision='1234'):
    connect()
    with open(os.path.join(HUB, 'downloaded'), 'a') as f:
        f.write(filename + '\\n')
    if filename.endswith(os.environ.get('FAIL_AT', 'never')):
        raise OSError('the connection broke')
    path = os.path.join(local_dir, filename)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copy(os.path.join(HUB, repo_id, filename), path)
    return path
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with three parquet files of FineWeb-Edu's sample, and with ready-made shards of FineWeb."""
    (tmp_path / 'python' / 'huggingface_hub').mkdir(parents=True)
    (tmp_path / 'python' / 'huggingface_hub' / '__init__.py').write_text(FAKE_HUB)
    sample = tmp_path / 'hub' / 'HuggingFaceFW' / 'fineweb-edu' / 'sample' / '10BT'
    sample.mkdir(parents=True)
    for i in range(3):
        table = pa.table({'text': TEXTS[i * 100 : (i + 1) * 100], 'id': range(100)})
        pq.write_table(table, sample / f'00{i}_00000.parquet')
    ready = tmp_path / 'hub' / 'kjj0' / 'fineweb10B-gpt2'
    ready.mkdir(parents=True)
    for name, n in (('val_000000', 300), ('train_000001', 2000), ('train_000002', 2000), ('train_000003', 7)):
        (ready / f'fineweb_{name}.bin').write_bytes(header(n) + np.arange(n, dtype='<u2').tobytes())
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'python'))
    monkeypatch.setenv('HUB', str(tmp_path / 'hub'))
    return tmp_path / 'hub'


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(*args) runs the script with --out=out; returns the finished process."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'tiktoken'))

    def run(*args, check=True, **env):
        command = [sys.executable, SCRIPT, '--out', 'out', *map(str, args)]
        process = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True)
        assert process.returncode == 0 or not check, process.stderr
        return process

    return run


def tokens(folder, name='edu_fineweb'):
    paths = sorted(folder.glob(f'{name}_*.bin'), key=lambda path: path.name[-10:])
    return np.concatenate([np.fromfile(path, np.uint16, offset=1024) for path in paths]).tolist()


EXPECTED = [token for text in TEXTS for token in [EOT, *gpt2_encoding().encode_ordinary(text)]]


def test_a_sample_n_shards_at_a_time(hub, prepare, tmp_path):
    run = prepare('--shard_tokens', 60_000, '--num_shards', 1)
    assert 'reading 3 .parquet files' in run.stdout and len(list((tmp_path / 'out').glob('*.bin'))) == 2
    assert tokens(tmp_path / 'out') == EXPECTED[: len(tokens(tmp_path / 'out'))]
    run = prepare('--shard_tokens', 60_000)
    assert '2 shards are complete, continuing after them' in run.stdout
    assert tokens(tmp_path / 'out') == EXPECTED
    assert f'wrote 300 documents, {sum(map(len, TEXTS)):,} characters, {len(EXPECTED):,} tokens' in run.stdout
    assert not list((tmp_path / 'out' / 'downloads').rglob('*.parquet'))  # removed when they were encoded
    (command,) = commands_in(run.stdout)
    assert run.stdout.endswith(f'{command}\n') and '--dataset=out' in command


def test_a_download_that_breaks_off(hub, prepare, tmp_path):
    run = prepare('--shard_tokens', 60_000, check=False, FAIL_AT='002_00000.parquet')
    assert run.returncode == 2 and 'cannot load HuggingFaceFW/fineweb-edu: the connection broke' in run.stderr
    assert len(list((tmp_path / 'out').glob('*.bin'))) > 2
    assert 'continuing after them' in prepare('--shard_tokens', 60_000).stdout and tokens(tmp_path / 'out') == EXPECTED


def test_without_a_network(prepare, hub, tmp_path):
    run = prepare(check=False, HUB='')
    assert run.returncode == 2 and 'Traceback' not in run.stderr
    assert 'cannot load HuggingFaceFW/fineweb-edu: ConnectionError' in run.stderr
    (command,) = commands_in(run.stderr)
    folder = hub / 'HuggingFaceFW' / 'fineweb-edu' / 'sample' / '10BT'
    run_command(command.replace('FOLDER', str(folder)) + ' --out by_hand', cwd=tmp_path)
    assert tokens(tmp_path / 'by_hand') == EXPECTED
    run = prepare('--ready-made', '--kind', 'fineweb', check=False, HUB='')
    assert run.returncode == 2 and 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2' in run.stderr
    (tmp_path / 'python' / 'huggingface_hub' / '__init__.py').write_text('raise ImportError')
    run = prepare(check=False)
    assert run.returncode == 2 and 'FineWeb needs the package huggingface_hub' in run.stderr
    assert commands_in(run.stderr)[0].endswith('pip install huggingface_hub pyarrow')


def test_ready_made_shards(hub, prepare, tmp_path):
    arguments = ['--ready-made', '--kind', 'fineweb', '--num_shards']
    run = prepare(*arguments, 1)
    assert 'wrote 2,300 tokens' in run.stdout and len(commands_in(run.stdout)) == 1
    run = prepare(*arguments, 2)
    names = [f'fineweb_{name}.bin' for name in ('train_000001', 'train_000002', 'val_000000')]
    assert sorted(os.listdir(tmp_path / 'out')) == names
    assert sorted((hub / 'downloaded').read_text().split()) == sorted(names)  # each once
    source = hub / 'kjj0' / 'fineweb10B-gpt2'
    assert all((tmp_path / 'out' / name).read_bytes() == (source / name).read_bytes() for name in names)
    (source / 'fineweb_train_000003.bin').write_bytes(b'version https://git-lfs.github.com/spec/v1')
    run = prepare(*arguments, 3, check=False)
    assert run.returncode == 2 and 'fineweb_train_000003.bin is not a complete shard' in run.stderr
    assert 'Remove it, and run the same command again' in run.stderr
    run = prepare('--ready-made', '--kind', 'edu', check=False)
    assert run.returncode == 2 and 'belongs to another data set' in run.stderr
    run = prepare('--ready-made', '--sample', '350BT', check=False)
    assert run.returncode == 2 and 'there are no ready-made shards' in run.stderr


def test_local_files(prepare, tmp_path):
    """Parquet, jsonl with gzip and zstd, and text, in one call; also without huggingface_hub."""
    pq.write_table(pa.table({'body': TEXTS[:100]}), tmp_path / 'a.parquet')
    for name, part in (('b.jsonl', TEXTS[100:150]), ('c.jsonl', TEXTS[150:200])):
        (tmp_path / name).write_text('\n'.join(json.dumps({'body': text}) for text in part))
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress((tmp_path / 'b.jsonl').read_bytes()))
    if shutil.which('zstd'):
        subprocess.run(['zstd', '-q', '--rm', tmp_path / 'c.jsonl'], check=True)
    (tmp_path / 'd.txt').write_text('<|endoftext|>'.join(TEXTS[200:]))
    files = ['a.parquet', 'b.jsonl.gz', 'c.jsonl.zst' if shutil.which('zstd') else 'c.jsonl', 'd.txt']
    run = prepare('--input', *files, '--field', 'body', '--separator', '<|endoftext|>', '--shard_tokens', 100_000)
    assert 'reading 4 files' in run.stdout and tokens(tmp_path / 'out') == EXPECTED


def test_contradictions(prepare):
    for arguments, message in (
        (['--num_shards', 0], '--num_shards 0 is not a positive number'),
        (['--shard_tokens', 1], '--shard_tokens 1 is not between'),
        (['--ready-made', '--input', 'a.txt'], 'leave out one of the two'),
        (['--input', 'nowhere.txt'], 'nowhere.txt does not exist'),
    ):
        run = prepare(*arguments, check=False)
        assert run.returncode == 2 and message in run.stderr and run.stderr.count('error: ') == 1
