"""The command line: conversions, config files, and messages about mistakes."""

import os
import re
import subprocess
import sys

import pytest

from configurator import configure, flag_elsewhere
from conftest import NANOGPT, ROOT, TINY
from errors import UserError


@pytest.fixture
def script(tmp_path, monkeypatch):
    """configure() on the command line of a small script with its own model.py."""
    (tmp_path / 'model.py').write_text(
        'class GPTConfig:\n    n_layer: int = 2\n    use_magic: bool = True # a spell\n'
        '    rows: int = 0 # rows at a time; needs use_magic\n'
    )
    source = "out_dir = 'out' # where to write\nmax_iters = 100 # how long\n"
    source += "learning_rate = 6e-4\nname = 'gpt'\neval_only = False\n"
    source += "compile = 'auto'\nmodel_dir = ''\ndevice = 'auto'\n"
    (tmp_path / 'script.py').write_text(source)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        namespace = {'__file__': str(tmp_path / 'script.py'), '__doc__': 'A script.'}
        exec(source, namespace)
        monkeypatch.setattr(sys, 'argv', ['script.py', *args])
        config, flags_set = configure(namespace)
        assert all(namespace[k] == v for k, v in config.items())
        return config, flags_set

    return run


@pytest.mark.parametrize(
    'argument, value',
    [
        ('--learning_rate=1', 1.0),
        ('--max_iters=1e3', 1000),
        ('--max_iters=1_000', 1000),
        ('--max_iters=9007199254740993', 9007199254740993),
        ('--learning_rate=.5e-3', 5e-4),
        ('--eval_only=true', True),
        ('--eval_only', True),
        ('--eval_only=0', False),
        ('--name=a=b', 'a=b'),
        ('--name=', ''),
        ('--name=True', 'True'),
        ('--out_dir=2024', '2024'),
        ('--out_dir=~/out', os.path.expanduser('~/out')),
        ('--out_dir=~', '~'),
        ('--compile=false', False),
        ('--compile', True),
        ('--device=1', '1'),
        ('--device=false', 'false'),
        ('--use_magic=False', False),
    ],
)
def test_values_have_the_type_of_their_default(script, argument, value):
    config, flags_set = script(argument)
    key = argument[2:].split('=')[0]
    assert config[key] == value and type(config[key]) is type(value) and flags_set == {key}


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--learnin_rate=1'], 'no flag learnin_rate; did you mean learning_rate?'),
        (['--lr=1'], 'no flag lr; did you mean learning_rate?'),
        (['--learn=1'], 'no flag learn; did you mean learning_rate?'),
        (['--nproc_per_node=2'], "no flag nproc_per_node; it is torchrun's: write it before the name of the script"),
        (['--max_iters=1.5'], 'max_iters must be a whole number'),
        (['--max_iters=many'], 'max_iters must be a whole number'),
        (['--max_iters=inf'], 'max_iters must be a whole number'),
        (['--max_iters=-1'], 'max_iters=-1, but it must be at least 0'),
        (['--learning_rate=nan'], 'learning_rate=nan, but it must be at least 0'),
        (['--learning_rate=fast'], 'learning_rate must be a number'),
        (['--eval_only=maybe'], 'eval_only must be true or false'),
        (['--max_iters'], 'needs a value: --max_iters=...'),
        (['missing.py'], 'missing.py: no such config file'),
        (['--n_layer=3'], 'no flag n_layer'),  # a field of the model, but architecture: this script has no such flag
        (['--model_dir=nowhere'], 'there is no nowhere/model.py'),
        (['--max_iters=99999999999999999999'], 'max_iters must be a whole number below 2**63'),
        (['--max_iters=1e30'], 'max_iters must be a whole number below 2**63'),
        (['--learning_rate=inf'], 'learning_rate=inf, but it must be below 1e34'),
        (['--learning_rate=1e308'], 'learning_rate=1e+308, but it must be below 1e34'),
        (['--rows=-1'], 'rows=-1, but it must be at least 0'),  # a number of the model's own
        (['--device'], '--device needs a value'),
    ],
)
def test_mistakes(script, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        script(*arguments)


@pytest.mark.parametrize(
    'path, flag, message',
    [
        ('nanoGPT/train.py', 'fp8', '; the model in phase2_triton has it: --model_dir=../phase2_triton'),
        ('nanoGPT/evaluate.py', 'half_residual', '; the model in phase2_triton has it: --model_dir=../phase2_triton'),
        ('nanoGPT/train.py', 'use_zero1', '; phase1_zero1/train.py has it'),
        ('phase1_zero1/train.py', 'fsdp_reshard', '; phase3_fsdp/train.py has it'),
        ('nanoGPT/sample.py', 'max_iters', ''),
        ('nanoGPT/train.py', 'resume', ''),  # a variable of train.py, not a flag
    ],
)
def test_flags_of_another_trainer_or_model(path, flag, message):
    assert flag_elsewhere(flag, ROOT / path) == message


def test_neighbouring_folders_that_are_not_ours(tmp_path):
    """A mistyped flag must still be answered."""
    for name, code in (
        ('a', 'class GPTConfig:\n    x: int = = 3'),
        ('b', 'class GPTConfig:\n    x: int'),
        ('c', 'class GPTConfig:\n    x: float = math.inf'),
        ('d', 'class GPTConfig:\n    x: dict = {[]: 1}'),
        ('e', 'class GPTConfig:\n    max_len: int = 9'),
        ('own', 'class GPTConfig:\n    y: int = 1'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'model.py').write_text(code)
        (tmp_path / name / 'train.py').write_text('max_iters = 3  # of another program')
    assert flag_elsewhere('max_iters', tmp_path / 'own' / 'train.py') == ''
    assert flag_elsewhere('max_len', tmp_path / 'own' / 'train.py') == '; the model in e has it: --model_dir=../e'


@pytest.mark.parametrize(
    'line, message',
    [
        ('out_dir = None', 'out_dir = None in a.py: out_dir must be text, in quotes'),  # not a folder named None
        ('out_dir = True', 'out_dir must be text, in quotes'),
        ("out_dir = ['out']", 'out_dir must be text, in quotes'),
        ('max_iters = 10**400', 'max_iters must be a whole number below 2**63'),
        ('learning_rate = 10**5000', 'learning_rate = (int) in a.py: learning_rate must be a number below 2**63'),
        ('learning_rate = [1e-3]', 'learning_rate must be a number'),
        ('eval_only = None', 'eval_only must be true or false'),
    ],
)
def test_wrong_types_in_a_config_file(script, tmp_path, line, message):
    (tmp_path / 'a.py').write_text(line)
    with pytest.raises(UserError, match=re.escape(message)):
        script('a.py')


def test_a_path_in_a_config_file(script, tmp_path):
    (tmp_path / 'a.py').write_text("from pathlib import Path as _Path\nout_dir = _Path('a') / 'b'")
    assert script('a.py')[0]['out_dir'] == 'a/b'


def test_config_files_and_flags_apply_from_left_to_right(script, tmp_path):
    (tmp_path / 'a.py').write_text(
        'import math\nmax_iters = 10 * max_iters\n_helper = 3\nlearning_rate = 1\ndef f(): pass\n'
    )
    assert script('--max_iters=5', 'a.py')[0]['max_iters'] == 50
    config, flags_set = script('a.py', '--max_iters=5')
    assert config['max_iters'] == 5 and config['learning_rate'] == 1.0 and flags_set == {'max_iters', 'learning_rate'}


def test_only_what_a_config_file_assigns_is_given(script, tmp_path):
    # with the byte order mark that Windows writes
    text = '\ufeffdef f():\n    max_iters = 1\n[max_iters for max_iters in (2, 3)]\nout_dir = __file__\n'
    (tmp_path / 'a.py').write_text(text, encoding='utf-8')
    config, flags_set = script('a.py')
    assert flags_set == {'out_dir'} and config['max_iters'] == 100 and config['out_dir'] == str(tmp_path / 'a.py')


@pytest.mark.parametrize(
    'text, message',
    [
        ('learning_rte = 1', 'no flag learning_rte; did you mean learning_rate? A helper variable'),
        ('max_iters = 10\nmax_iters = = 3', 'line 2: SyntaxError'),
        ('max_iters = 10\n\nmax_iters /= 0', 'line 3: ZeroDivisionError'),
        ("max_iters = 'ten'", 'max_iters must be a whole number'),
        ('max_iters = 10\nexit()', 'line 2: SystemExit'),
        ('raise GeneratorExit', 'line 1: GeneratorExit'),
        ("out_dir = ''", 'out_dir is empty'),
        ("model_dir = 'x'", 'works on the command line only'),
        ("out_dir = 'a\\0b'", 'out_dir holds a zero byte'),
    ],
)
def test_mistakes_in_a_config_file(script, tmp_path, text, message):
    (tmp_path / 'a.py').write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        script('a.py')


def test_a_config_file_may_change_the_working_folder(script, tmp_path):
    (tmp_path / 'a.py').write_text("import os\nos.chdir('/')\nmax_iters = 5")
    script('a.py')
    assert os.getcwd() == str(tmp_path)  # otherwise out_dir would be elsewhere


@pytest.mark.parametrize(
    'text, message',
    [
        ('def f(:', 'model.py is not Python: invalid syntax (model.py, line 1)'),
        ('class GPTConfig:\n    wide: int = 4 * 8', 'model.py, line 2: wide needs a plain default'),
        ('class GPTConfig:\n    wide: int', 'model.py, line 2: wide needs a plain default'),
    ],
)
def test_a_model_file_that_cannot_be_parsed(script, tmp_path, text, message):
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'model.py').write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        script('--model_dir=other')


@pytest.mark.parametrize(
    'text, message',
    [
        ('import math\nmath.sqroot(2)', 'model.py, line 2: AttributeError: '),
        ('class GPT: pass', "cannot import name 'GPTConfig' from 'model'"),
        ('class GPT: pass\nclass GPTConfig: pass', "lacks the interface of nanoGPT's: type object 'GPTConfig'"),
        (
            'import dataclasses\nclass GPT: pass\n@dataclasses.dataclass\nclass GPTConfig:\n    width: int = 3',
            "got an unexpected keyword argument 'n_layer'",
        ),
    ],
)
def test_a_model_file_that_does_not_work_is_one_message(launch, work, text, message):
    (work / 'other').mkdir()
    (work / 'other' / 'model.py').write_text(text)
    result = launch(NANOGPT / 'train.py', *TINY, '--model_dir=other', check=False)
    assert result.returncode == 2 and message in result.stderr and 'Traceback' not in result.stderr


def test_model_dir_brings_the_flags_of_its_model(script, tmp_path):
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'model.py').write_text('class GPTConfig:\n    fast: bool = False\n')
    assert script('--fast', '--model_dir=other')[0]['fast'] is True
    with pytest.raises(UserError, match='no flag use_magic'):
        script('--use_magic=False', '--model_dir=other')
    (tmp_path / 'other' / 'model.py').write_text('class GPTConfig:\n    theta: float = None\n')
    with pytest.raises(UserError, match='--theta=3: theta is None in model.py, which no flag can change'):
        script('--theta=3', '--model_dir=other')


def test_help_lists_every_flag(script, capsys):
    with pytest.raises(SystemExit) as exit:
        script('--help')
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert 'A script.' in out
    for line in (
        '--out_dir=out +where to write',
        '--max_iters=100 +how long',
        '--use_magic=True +a spell',
        '--learning_rate=0.0006$',
    ):
        assert re.search(line, out, re.M)


@pytest.mark.parametrize('name', ['train', 'sample', 'bench'])
def test_help_explains_every_flag_of_the_real_scripts(name):
    out = subprocess.run(
        [sys.executable, NANOGPT / f'{name}.py', '--help'], capture_output=True, text=True, check=True
    ).stdout
    flags = [line for line in out.splitlines() if line.startswith('  --')]
    assert len(flags) >= 15 and all(re.match(r'  --\w+=\S* +\S+', line) for line in flags)


@pytest.mark.parametrize('path', sorted((NANOGPT / 'config').glob('*.py')), ids=lambda p: p.name)
def test_our_config_files_hold_known_flags_only(path, monkeypatch):
    script = (ROOT / 'phase3_fsdp' if path.name.startswith('gpt3') else NANOGPT) / 'train.py'  # those are for FSDP
    namespace = {'__file__': str(script)}
    source = script.read_text()
    exec(source[source.index('out_dir = ') : source.index('config, flags_set = configure')], namespace)
    monkeypatch.setattr(sys, 'argv', ['train.py', str(path)])
    config, flags_set = configure(namespace)
    assert flags_set


@pytest.mark.parametrize(
    'text',
    [
        'from base import *',
        'from base import batch_size',
        "exec(open('base.py').read())",
        'globals().update(batch_size=3)',
    ],
)
def test_flags_that_a_config_file_takes_from_elsewhere(launch, work, text):
    (work / 'base.py').write_text('batch_size = 3\n')
    (work / 'config.py').write_text(f"import sys\nsys.path.insert(0, '.')\n{text}\n")
    assert (
        'tokens per iteration will be: 96\n' in launch(NANOGPT / 'train.py', *TINY, '--max_iters=0', 'config.py').stdout
    )


def test_upstreams_style_of_config_file_works(launch, work):
    """Like nanoGPT's config files: an import, an f-string, comments, an int for a float flag."""
    (work / 'config.py').write_text(
        "import time\nwandb_run_name = f'run-{time.time()}'\nlearning_rate = 1 # fast\nmax_iters = 2\n"
    )
    assert 'iter 2:' in launch(NANOGPT / 'train.py', *TINY, 'config.py').stdout


@pytest.mark.parametrize(
    'text, message',
    [
        ('max_iters: 5\nlearning_rate: 1e-3\n', 'a.py, line 1 sets no flag'),  # YAML is valid Python: annotations
        ('max_iters = 5\nlearning_rate: 1e-3\n', 'a.py, line 2 sets no flag'),
        ('max_iters == 5\n', 'a.py, line 1 sets no flag'),
        ('{"max_iters": 5}', 'a.py sets no flag'),  # JSON
        ('', 'a.py sets no flag'),
        ('# max_iters = 5\nimport math\n_helper = 3\ndef f(): pass\n', 'a.py sets no flag'),
        ('for i in range(3):\n    max_iters = i\n', 'there is no flag i. A helper variable needs an underscore: _i'),
        ('steps_per_day = 9\nmax_iters = 7 * steps_per_day', 'A helper variable needs an underscore: _steps_per_day'),
    ],
)
def test_a_config_file_without_an_effect(script, tmp_path, text, message):
    (tmp_path / 'a.py').write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        script('a.py')


def test_helper_variables_of_a_config_file(script, tmp_path):
    (tmp_path / 'a.py').write_text('_days = 2\nfor _i in range(3):\n    max_iters = _i * _days\n')
    config, flags_set = script('a.py')
    assert config['max_iters'] == 4 and flags_set == {'max_iters'}


def test_a_flag_that_needs_another_is_noted(script, capsys):
    """Notes appear only for flags that were given and differ from the default."""
    for arguments, note in (
        (['--rows=4', '--use_magic=False'], 'note: rows: no effect with use_magic=False\n'),
        (['--rows=4'], ''),
        (['--rows=0', '--use_magic=False'], ''),
        (['--use_magic=False'], ''),
    ):
        script(*arguments)
        assert capsys.readouterr().out == note


TRAIN_FLAGS = ('--warmup_iters=10', '--max_iters=100', '--lr_decay_iters=100', '--learning_rate=1e-3', '--min_lr=1e-4')


@pytest.mark.parametrize(
    'flags, notes',
    [
        ([], []),
        (['--min_lr=1e-3'], []),
        (
            ['--max_iters=5'],
            ['before the end of the warmup, warmup_iters=10: the learning rate reaches 5.45e-04, not 1.00e-03'],
        ),
        (['--max_iters=50'], ['ends at 6.28e-04, not 1.00e-04: max_iters=50 is before lr_decay_iters=100']),
        (['--max_iters=200'], ['stays at 1.00e-04 from lr_decay_iters=100 to max_iters=200']),
        (['--lr_decay_iters=10'], ['not after the warmup, warmup_iters=10: the learning rate drops from 1.00e-03']),
        (['--decay_lr=False'], ['warmup_iters, lr_decay_iters, min_lr: no effect with decay_lr=False']),
        # it never rises to min_lr
        (
            ['--learning_rate=1e-5', '--max_iters=5'],
            ['before the end of the warmup', 'learning_rate=1e-05 is below min_lr=0.0001'],
        ),
        (['--learning_rate=1e-5'], 'learning_rate=1e-05 is below min_lr=0.0001, .* --min_lr=1e-06'),
        (['--min_lr=1'], 'learning_rate=0.001 is below min_lr=1.0'),
        (['--min_lr=1', '--decay_lr=False'], ['min_lr: no effect']),
        (['--tracker=trackio', '--wandb_log'], 'wandb_log=True and tracker=trackio select two trackers'),
    ],
)
def test_flags_of_train_that_contradict_each_other(monkeypatch, capsys, flags, notes):
    """notes: a piece of each printed note, none if the flags agree; a str is the message of an error."""
    namespace = {'__file__': str(NANOGPT / 'train.py')}
    source = (NANOGPT / 'train.py').read_text()
    exec(source[source.index('out_dir = ') : source.index('config, flags_set = configure')], namespace)
    monkeypatch.setattr(sys, 'argv', ['train.py', *TRAIN_FLAGS, *flags])
    if isinstance(notes, str):
        with pytest.raises(UserError, match=notes):
            configure(namespace)
        return
    configure(namespace)
    out = capsys.readouterr().out
    assert all(note in out for note in notes) and out.count('note: ') == len(notes)


def test_defaults_do_not_contradict_each_other(monkeypatch, capsys):
    namespace = {'__file__': str(NANOGPT / 'train.py')}
    source = (NANOGPT / 'train.py').read_text()
    exec(source[source.index('out_dir = ') : source.index('config, flags_set = configure')], namespace)
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    assert configure(namespace)[1] == set() and capsys.readouterr().out == ''


@pytest.mark.parametrize('folder', ['nanoGPT', 'phase1_zero1', 'phase2_triton', 'phase3_fsdp'])
@pytest.mark.parametrize('name', ['train', 'sample', 'bench'])
def test_what_a_flag_needs_exists(folder, name):
    """A help text's `needs X` would otherwise have no effect itself."""
    out = subprocess.run(
        [sys.executable, ROOT / folder / f'{name}.py', '--help'], capture_output=True, text=True, check=True
    ).stdout
    flags = set(re.findall(r'^  --(\w+)=', out, re.M))
    assert re.findall(r'^  --\S+$', out, re.M) == []  # without a help text
    needed = re.findall(r'\b(?:needs|unused with) (\w+)(?:=\w+)?(?: or (\w+))?$', out, re.M)
    assert needed and {other for pair in needed for other in pair if other} <= flags


def test_an_evaluation_of_an_untrained_model_is_noted(launch, work):
    assert (
        'note: eval_only=True evaluates an untrained model' in launch(NANOGPT / 'train.py', *TINY, '--eval_only').stdout
    )
