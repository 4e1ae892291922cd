"""sample.py and bench.py, run as a user runs them."""

import itertools
import os
import pickle
import re
import shutil

import pytest
import torch

from conftest import NANOGPT, TINY, make_letters

TRAIN, SAMPLE, BENCH = (NANOGPT / f'{name}.py' for name in ('train', 'sample', 'bench'))


@pytest.fixture(scope='module')
def made(launch, tmp_path_factory):
    """A folder with the data set and, in out/, a model trained on it."""
    folder = tmp_path_factory.mktemp('sample')
    make_letters(folder)
    launch(TRAIN, *TINY, '--max_iters=300', '--lr_decay_iters=300', '--eval_interval=300', cwd=folder)
    return folder


@pytest.fixture
def trained(made, tmp_path, monkeypatch):
    """A copy of that folder to run in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_samples_look_like_the_data(launch, trained):
    """In the data each character is 1 to 3 further than the last one."""
    out = launch(SAMPLE, '--start=0', '--num_samples=3', '--max_new_tokens=100').stdout
    samples = [text.strip('\n') for text in out.split('number of parameters: 0.03M\n')[1].split('---------------')][:-1]
    assert len(samples) == 3 and len(set(samples)) == 3 and all(len(text) == 101 and text[0] == '0' for text in samples)
    steps = [(ord(b) - ord(a)) % 40 for text in samples for a, b in itertools.pairwise(text)]
    assert sum(step in (1, 2, 3) for step in steps) > 0.9 * len(steps)
    assert launch(SAMPLE, '--start=0', '--num_samples=3', '--max_new_tokens=100').stdout == out  # the seed decides
    assert launch(SAMPLE, '--start=0', '--num_samples=3', '--max_new_tokens=100', '--seed=1').stdout != out


def test_an_alphabet_without_a_newline(launch, trained):
    out = launch(SAMPLE, '--num_samples=2', '--max_new_tokens=5').stdout
    assert "no newline to start from, so samples start with '0' (see --start)" in out
    assert len(re.findall(r'^0.{5}$', out, re.M)) == 2
    ended = launch(SAMPLE, '--start=\n', check=False)
    assert ended.returncode == 2 and "the character '\\n' (U+000A) is not one of the" in ended.stderr


def test_prompt_from_a_file_and_other_checkpoint(launch, trained):
    (trained / 'prompt.txt').write_text('012', encoding='utf-8-sig')  # as editors on Windows do
    out = launch(
        SAMPLE, '--start=FILE:prompt.txt', '--num_samples=1', '--max_new_tokens=5', '--ckpt=ckpt_best.pt'
    ).stdout
    assert re.search(r'^012.{5}$', out, re.M)


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--start=é'], "character 'é'"),
        (['--start='], 'start is empty'),
        (['--start=FILE:nowhere.txt'], 'FILE:nowhere.txt cannot be read: No such file or directory'),
        (['--start=FILE:data'], 'FILE:data cannot be read: Is a directory'),
        (['--start=FILE:/dev/zero'], 'FILE:/dev/zero cannot be read: not a regular file'),
        (['--start=FILE:pipe'], 'FILE:pipe cannot be read: not a regular file'),
        (['--start=FILE:latin-1'], "FILE:latin-1 cannot be read: 'utf-8' codec"),
        (['--start=0', '--max_new_tokens=9223372036854775807'], 'is more than 10**12 tokens'),
        (['--start=0', '--max_new_tokens=10_000_000_000'], 'Sampling needs less with a smaller num_samples'),
        (['--out_dir=nowhere'], 'no checkpoint nowhere/ckpt.pt'),
        (['--start=0', '--dataset=python_gpt2'], 'the model has 40 tokens'),
        (['--init_from=gpt3'], "init_from is 'gpt3'"),
    ],
)
def test_mistakes(launch, trained, flags, message):
    os.mkfifo('pipe')
    (trained / 'latin-1').write_bytes(b'\xe9')
    run = launch(SAMPLE, *flags, check=False)
    assert run.returncode == 2 and message in run.stderr and 'Traceback' not in run.stderr


def test_a_full_disk_behind_stdout(launch, trained):
    with open('/dev/full', 'w') as full:
        assert launch.start(SAMPLE, '--start=0', stdout=full).wait() == 2


def test_gpt2_encoding(launch, work):
    """A model with GPT-2's vocabulary, whose data set is not on this machine, and an upstream checkpoint's names."""
    from model import GPT, GPTConfig

    args = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, bias=False, vocab_size=50304, dropout=0.0)
    os.makedirs('out')
    model = {f'_orig_mod.{k}': v for k, v in GPT(GPTConfig(**args)).state_dict().items()}
    torch.save(
        {'model': model, 'model_args': args, 'iter_num': 1, 'best_val_loss': 9.9, 'config': {'dataset': 'elsewhere'}},
        'out/ckpt.pt',
    )
    out = launch(SAMPLE, '--start=<|endoftext|>Hello world', '--num_samples=1', '--max_new_tokens=20').stdout
    assert '<|endoftext|>Hello world' in out
    os.makedirs('data/bytes')
    with open('data/bytes/meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': 256, 'encoding': 'byte'}, f)
    run = launch(SAMPLE, '--start=a', '--dataset=bytes', check=False)
    assert run.returncode == 2 and 'the model has 50304 tokens, but the encoding of bytes has 256' in run.stderr


def test_bench(launch, work):
    shape = [
        '--n_layer=2',
        '--n_head=2',
        '--n_embd=32',
        '--block_size=16',
        '--batch_size=4',
        '--device=cpu',
        '--warmup=2',
        '--steps=3',
    ]
    for flags in (
        ['--dataset=letters'],
        ['--real_data=False', '--activation_checkpointing=True', '--gradient_accumulation_steps=2'],
    ):
        out = launch(BENCH, *shape, *flags).stdout
        assert re.search(
            r'^time per iteration: [\d.]+ms \(median of 3, .*\), [\d,]+ tokens/s, mfu n/a, peak memory [\d.]+ GiB$',
            out,
            re.M,
        )
    assert 'aten::' in launch(BENCH, *shape, '--real_data=False', '--profile').stdout and os.listdir('bench_log')
    run = launch(BENCH, *shape, '--dataset=nowhere', check=False)
    assert run.returncode == 2 and "no data set 'nowhere'" in run.stderr and '--real_data=False' in run.stderr
