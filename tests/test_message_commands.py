"""
Every command in a message runs as printed: these tests take the commands out of the messages and run them in a shell.

The commands of text_reader.py are in test_text_reader.py.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

import shell
from conftest import ROOT
from errors import UserError
from message_commands import commands_in, run_command

SOURCES = [
    path
    for folder in ('nanoGPT', 'phase1_zero1', 'phase2_triton', 'phase3_fsdp', 'planner')
    for path in (ROOT / folder).rglob('*.py')
    if '__pycache__' not in path.parts and path.name != 'shell.py'
] + [ROOT / 'demo.py', ROOT / 'plan.py']
FAST = '--max_iters=1 --n_layer=1 --n_head=1 --n_embd=16 --batch_size=2 --eval_iters=1'.split()
FAST += ['--device=cpu', '--compile=False']
FAST += ['--gradient_accumulation_steps=1']


def messages_in(path):
    """
    Yields the texts that a source file can print: its string literals without docstrings, f-strings with {} for their
    values.
    """
    tree = ast.parse(path.read_text())
    parts = {id(node) for joined in ast.walk(tree) if isinstance(joined, ast.JoinedStr) for node in joined.values}
    parts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield ''.join(value.value if isinstance(value, ast.Constant) else '{}' for value in node.values)


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_take_their_commands_from_shell_py(path):
    """
    A command written out in a message would name the wrong folder or Python for some users.
    """
    written_out = re.compile(r'\b(pip install|python\d? [\w{./-]|uv (run|pip)) ?')
    assert [text for text in messages_in(path) if written_out.search(text)] == []


def test_first_lines_come_from_first_line():
    """An exception without a message has no first line: str(error).splitlines()[0] raises an IndexError."""
    sources = [*SOURCES, *(ROOT / 'benchmarks').glob('*.py')]
    assert [p for p in sources if re.search(r'str\(\w+\)\.splitlines\(\)\[0\]', p.read_text())] == []


def test_first_line():
    from errors import first_line

    assert first_line(ValueError()) == 'ValueError' and first_line(ValueError('\n')) == 'ValueError'
    assert first_line(ValueError('one\ntwo')) == 'one'


@pytest.mark.parametrize(
    'name', ['plain', 'a b', "it's", '$HOME;`x`', '-flag', '*?[x]', 'ü中', 'tab\tnl\n', '\udcff', '\\']
)
def test_quoted_words_arrive_as_they_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    print_words = tmp_path / name / 'print words.py'
    print_words.parent.mkdir()
    print_words.write_text('import sys; print(ascii(sys.argv[1:]))')
    command = shell.python_command(print_words, name, f'--out={name}', '--flag')
    assert command.isprintable()
    expected = [f'./{name}' if name.startswith('-') else name, f'--out={name}', '--flag']
    assert run_command(command).stdout == f'{expected!a}\n'


def test_the_python_of_commands_is_this_one(tmp_path, monkeypatch):
    for path in (os.environ['PATH'], f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}', '/usr/bin:/bin'):
        monkeypatch.setenv('PATH', path)
        executable = run_command(f'{shell.python()} -c "import sys; print(sys.executable)"').stdout.strip()
        assert executable == sys.executable
    assert shell.python() != 'python'
    command = shell.pip_install('numpy')
    run_command(command.replace('install numpy', 'show numpy' if 'uv' in command else '--version'))


def test_paths_are_relative_where_they_are_near(monkeypatch):
    for here, expected in (
        ('/', 'root/gpt/a.py'),
        ('/root', 'gpt/a.py'),
        ('/root/gpt', 'a.py'),  # two folders up is the whole disk
        ('/root/gpt/data/text', '../../a.py'),
        ('/home/me/gpt', '/root/gpt/a.py'),
    ):
        monkeypatch.setattr(os, 'getcwd', lambda: here)
        assert shell.shortest_path('/root/gpt/a.py') == expected, here


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """A copy of the trainers, in a folder whose name needs quotes, with a phase's link to the data."""
    copy = tmp_path_factory.mktemp('with blank') / "user's copy"
    ignore = shutil.ignore_patterns('*.bin', '*.tmp', 'meta.pkl', 'input.txt', 'out-*', '__pycache__')
    for folder in ('nanoGPT', 'phase1_zero1'):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignore)
    text = ''.join(f'First Citizen: word {i} {"speak " * (i % 5)}\n\n' for i in range(400))
    (copy / 'my play.txt').write_text(text)
    documents = '\n'.join(json.dumps({'text': f'{i} {text[i * 40 : i * 60]}'}) for i in range(200))
    for folder in ('web', 'elsewhere'):
        (copy / folder).mkdir()
    (copy / 'web' / 'documents.jsonl').write_text(documents)
    return copy


PREPARATIONS = {  # name: (folder to run in, folder of the trainer, data set, arguments)
    'python_char': ('.', 'nanoGPT', 'python_char', []),
    'python_char of a phase': ('phase1_zero1', 'phase1_zero1', 'python_char', []),
    'python_gpt2': ('nanoGPT', 'nanoGPT', 'python_gpt2', []),
    'shakespeare_char': ('/', 'nanoGPT', 'shakespeare_char', ['--input', 'my play.txt']),
    'shakespeare': ('nanoGPT/data', 'nanoGPT', 'shakespeare', ['--input', 'my play.txt']),
    'text': ('.', 'nanoGPT', 'text', ['my play.txt', 'web']),
    'text elsewhere': ('elsewhere', 'nanoGPT', 'text', ['my play.txt', '--encoding', 'byte', '--out', 'my data']),
    'little text': ('.', 'nanoGPT', 'text', ['few.txt', '--encoding', 'char', '--out', 'few']),
    'shards of text': (
        '.',
        'nanoGPT',
        'text',
        ['my play.txt', '--shards', '--shard_tokens', '900', '--out', 'my shards'],
    ),
    'fineweb': ('nanoGPT', 'nanoGPT', 'fineweb', ['--input', 'web', '--shard_tokens', '2000']),
    'openwebtext': ('.', 'nanoGPT', 'openwebtext', ['--source', 'web', '--num_proc', '1']),
}


@pytest.mark.parametrize('name', PREPARATIONS)
def test_each_preparation_ends_with_the_command_that_trains(copy, launch, tmp_path, name):
    folder, trainer, dataset, arguments = PREPARATIONS[name]
    (copy / 'few.txt').write_text('Few words. ' * 30)
    files = {'my play.txt', 'web', 'few.txt'}
    arguments = [copy / word if word in files else word for word in arguments]
    script = copy / trainer / 'data' / dataset / 'prepare.py'
    env = os.environ | {'TIKTOKEN_CACHE_DIR': str(tmp_path), 'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_OFFLINE': '1'}
    run = subprocess.run(
        [sys.executable, script, *arguments], cwd=copy / folder, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r'^wrote .*tokens$', run.stdout, re.M), run.stdout
    (command,) = commands_in(run.stdout)
    assert run.stdout.endswith(f'{command}\n')
    at_home = copy / folder if folder != '/' else tmp_path  # an out_dir is made in the working directory
    words = shlex.split(run_command(f'printf "%q " {command}', cwd=copy / folder).stdout)
    assert os.path.samefile(shutil.which(words[0]) or copy / folder / words[0], sys.executable)
    train = os.path.normpath(os.path.join(copy / folder, words[1]))
    assert train == str(copy / trainer / 'train.py')
    run = launch(train, *words[2:], *FAST, cwd=at_home)
    assert 'step 0: train loss' in run.stdout and 'saving checkpoint to out-' in run.stdout


def test_missing_data_names_the_command_that_prepares_it(copy, launch, monkeypatch):
    run = launch(copy / 'nanoGPT' / 'train.py', '--dataset=python_gpt2', *FAST, '--block_size=8', cwd=copy, check=False)
    if run.returncode == 0:  # the test above has prepared it
        shutil.rmtree(copy / 'out')
        (copy / 'nanoGPT' / 'data' / 'python_gpt2' / 'train.bin').unlink()
        run = launch(
            copy / 'nanoGPT' / 'train.py', '--dataset=python_gpt2', *FAST, '--block_size=8', cwd=copy, check=False
        )
    (command,) = commands_in(run.stderr)
    run_command(command, cwd=copy)
    launch(copy / 'nanoGPT' / 'train.py', '--dataset=python_gpt2', *FAST, '--block_size=8', cwd=copy)
    (copy / 'my own').mkdir(exist_ok=True)
    run = launch(copy / 'nanoGPT' / 'train.py', '--dataset=my own', *FAST, cwd=copy, check=False)
    (command,) = commands_in(run.stderr)
    run_command(command.replace('YOUR_FILES', 'web'), cwd=copy)
    launch(copy / 'nanoGPT' / 'train.py', '--dataset=my own', *FAST, '--block_size=8', cwd=copy)


def test_another_text_than_shakespeare(copy):
    script = copy / 'nanoGPT' / 'data' / 'shakespeare_char'
    shutil.copy(copy / 'my play.txt', script / 'input.txt')
    run = subprocess.run([sys.executable, script / 'prepare.py'], cwd=copy, capture_output=True, text=True)
    remove, use = commands_in(run.stderr)
    assert run.returncode == 2
    run_command(use, cwd=copy)
    assert np.fromfile(script / 'train.bin', np.uint16).size > 1000
    run_command(remove, cwd=copy)
    assert not (script / 'input.txt').exists()
    run = subprocess.run(
        [sys.executable, script / 'prepare.py', '--url', 'http://127.0.0.1:9/'],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    (command,) = commands_in(run.stderr)
    run_command(command.replace('FILE', "'my play.txt'"), cwd=copy)


def test_openwebtext_without_a_network(copy, tmp_path):
    pytest.importorskip('datasets')
    env = os.environ | {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    script = copy / 'nanoGPT' / 'data' / 'openwebtext' / 'prepare.py'
    run = subprocess.run([sys.executable, script], env=env, cwd=copy, capture_output=True, text=True)
    revision, source = commands_in(run.stderr)
    assert run.returncode == 2 and '--revision refs/convert/parquet' in revision
    run_command(source.replace('FOLDER', 'web'), cwd=copy, HF_HOME=str(tmp_path), HF_HUB_OFFLINE='1')


def test_a_missing_package_is_installed_by_the_command_that_is_printed(tmp_path, monkeypatch):
    """pip itself is replaced: it would need a network."""
    (tmp_path / 'pip.py').write_text('import sys; print(sys.argv[1:])')
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    import encoding

    with pytest.raises(UserError) as error:
        encoding.gpt2_encoding.__wrapped__()
    (command,) = commands_in(error.value)
    assert run_command(command, PYTHONPATH=str(tmp_path)).stdout == "['install', 'tiktoken']\n"


def test_demo_help():
    run = subprocess.run([sys.executable, ROOT / 'demo.py', '--help'], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.startswith('usage') and not (ROOT / 'out-demo' / 'now').exists()
    run = subprocess.run([sys.executable, ROOT / 'demo.py', '--halp'], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and '--halp' in run.stderr
