"""
The documents are correct: every link resolves, every named path and flag exists, and the commands run. Commands run in
order in a fresh copy of the repository, as for a reader who has only the document. SHRINK and shrink() change them:
they append flags that make models and runs tiny, and put tests/launcher.py in the place of torchrun, whose flags are
only checked. Commands that need a GPU, a second machine, a network or minutes are checked in the same way and not run:
why_not() says which. The README's run in make test, the other documents' in make test-full.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from conftest import ROOT

sys.path.append(str(ROOT / 'benchmarks'))
from configurator import model_options
from report import documents

COMMANDS = ('python', 'torchrun', 'make', 'diff', 'sbatch', 'jq', 'pip')
FOLDERS = ('nanoGPT', 'phase1_zero1', 'phase2_triton', 'phase3_fsdp')
SHRINK = {  # added to every command that runs this script; the last flag of a name counts
    'train.py': [
        *'--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=3 --warmup_iters=1'.split(),
        *'--eval_interval=2 --eval_iters=1 --log_interval=1 --device=cpu --dataset=python_char'.split(),
        *'--always_save_checkpoint=True --wandb_log=False'.split(),
    ],
    'sample.py': ['--num_samples=1', '--max_new_tokens=5', '--device=cpu'],
    'visualize_training.py': [],
    'prepare.py': [],
    'report.py': ['--check'],
    'bench_trainers.py': ['--plan'],
    'plan.py': [],
    'bench_fsdp.py': ['--dry-run'],
}
# names of files that a run makes, and of the reader's own
MADE = re.compile(
    r'^\.\w+$|^(/|out|OUT_DIR|FILE|FOLDER|YOUR|run_|\.\.\._|ckpt|iter_|__RANK|\.venv|data/<)'
    r'|\.(bin|pkl|distcp|jsonl|parquet)$'
)
ELSEWHERE = ('torch/', 'input.txt', 'slurm.conf', 'torch.')  # names from other projects
SCRIPTS = [ROOT / 'plan.py', *(path for folder in (*FOLDERS, 'benchmarks') for path in (ROOT / folder).rglob('*.py'))]


def flags_of(script):
    """Returns the --names that a script accepts, or None if no flags can be found in its text."""
    text = script.read_text()
    names = set(re.findall(r"add_argument\(\s*'(--[\w-]+)'", text)) | {'--help'}
    names |= {f'--{name}' for name in re.findall(r"^    '(\w+)': \(.*'\),$", text, re.M)}  # plan.py's
    top, configured, _ = text.partition('\nconfig, flags_set = configure(globals())')
    if configured:
        names |= {f'--{node.targets[0].id}' for node in ast.parse(top).body if isinstance(node, ast.Assign)}
        names |= {
            f'--{name}'
            for folder in ('nanoGPT', 'phase2_triton')
            for name in model_options(str(ROOT / folder), str(script))
        }
    return names


TORCHRUN = set(get_args_parser()._option_string_actions)
OF_PYTEST = re.findall(r"addoption\('(--[\w-]+)'", (ROOT / 'tests' / 'conftest.py').read_text())
KNOWN = TORCHRUN.union(OF_PYTEST, *map(flags_of, SCRIPTS))


def code_of(text):
    """
    Returns (lines of code blocks that may be commands, with continued ones joined; contents of `code`; the text without
    either).
    """
    lines, prose = [], []
    fenced = None
    for line in re.sub(r'\\\n\s*', '', text).splitlines():
        if line.lstrip().startswith('```'):  # also in a list
            fenced = line.lstrip()[3:] or 'text' if fenced is None else None
        elif fenced is not None:
            lines += [line.strip().removeprefix('$ ')] if fenced in ('sh', 'text') else []
        elif line.startswith('    ') and line.strip():
            lines.append(line.strip())
        else:
            prose.append(line)
    prose = '\n'.join(prose)
    spans = [span.replace('\n', ' ') for span in re.findall(r'`([^`]+)`', prose)]
    return lines, spans, re.sub(r'`[^`]+`', '`', prose)


def commands_of(text):
    """Returns the commands of a document as lists of words, in order, each once."""
    lines, spans, _ = code_of(text)
    found = [
        shlex.split(line, comments=True)
        for line in lines + spans
        if line.split(' ')[0] in COMMANDS and not line.startswith('make:')
    ]
    found = [words[: words.index('|')] if '|' in words else words for words in found if len(words) > 1]
    return [words for i, words in enumerate(found) if words not in found[:i]]


def script_of(words):
    """Returns the index of the script in the words of a command, or None."""
    return next((i for i, word in enumerate(words) if re.fullmatch(r'[\w./-]+\.(py|sh)', word)), None)


def find(name, folder):
    """Returns the file or folder that a document in `folder` means by this name, or None."""
    name = name.rstrip('/')
    places = [folder, ROOT, ROOT / 'nanoGPT', ROOT / 'nanoGPT' / 'data', ROOT / 'phase2_triton', ROOT / 'tests']
    there = next((place / name for place in places if (place / name).exists()), None)
    if there is None and '/' not in name:
        there = next((path for path in ROOT.rglob(name) if '.venv' not in path.parts), None)
    return there


def slug(heading):
    """Returns GitHub's anchor for a heading."""
    return re.sub(r'[^\w\- ]', '', heading.strip().lower().replace('`', '')).replace(' ', '-')


def problems(path):
    """Returns the names in a document that do not exist."""
    text, folder, found = path.read_text(), path.parent, []
    lines, spans, prose = code_of(text)
    for target in re.findall(r'\]\(([^)\s]+)\)', prose):
        file, _, anchor = target.partition('#')
        there = folder / file if file else path
        if target.startswith(('http://', 'https://')):
            continue
        if not there.exists():
            found.append(f'link {target}')
        elif anchor and anchor not in [slug(h) for h in re.findall(r'^#+ (.*)', there.read_text(), re.M)]:
            found.append(f'anchor {target}')
    commands = commands_of(text)
    for words in commands:
        found += problems_of_command(words, folder)
    for span in spans:
        if span.split(' ')[0] in COMMANDS:
            continue
        found += [f'flag {flag}' for flag in re.findall(r'(?<![\w-])--[a-z][\w-]*', span) if flag not in KNOWN]
        for word in span.split():
            looks = re.fullmatch(r'[\w.*-]*(/[\w.*-]+)*/?', word) and (
                re.search(r'\.(py|md|json|png|sh|toml|txt)$', word) or re.fullmatch(r'(\w+/)+', word)
            )
            if (
                looks
                and not MADE.search(word)
                and not word.startswith(ELSEWHERE)
                and '*' not in word
                and not find(word, folder)
            ):
                found.append(f'path {word}')
    return found


def problems_of_command(words, folder):
    name = ' '.join(words)
    if words[0] == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
        return [f'make target {word}' for word in words[1:] if word not in targets and not word.startswith('-')]
    if words[0] == 'diff':
        return [f'path {word}' for word in words[2:] if not find(word, folder)]
    if words[0] in ('jq', 'pip'):
        return []
    at = script_of(words)
    if 'pytest' in words or at is None:
        flags = [] if 'pytest' in words else [word.split('=')[0] for word in words if word.startswith('--')]
        return [f'path {w}' for w in words if w.endswith('.py') and not find(w, folder)] + [
            f'flag {f} in {name}' for f in flags if f not in KNOWN
        ]
    script = find(words[at], folder)
    if script is None:
        return [f'script {words[at]}']
    if script.suffix == '.sh':  # slurm.sh train.py ...
        return problems_of_command(['python', *words[at + 1 :]], folder)
    of_torchrun = [word.split('=')[0] for word in words[1:at] if word.startswith('--')]
    own = [word.split('=')[0] for word in words[at + 1 :] if word.startswith('--')]
    found = [f'flag {flag} in {name}' for flag in of_torchrun if words[0] == 'torchrun' and flag not in TORCHRUN]
    found += [f'flag {flag} in {name}' for flag in own if flag not in flags_of(script)]
    configs = [word for word in words[at + 1 :] if word.endswith('.py')]
    return found + [f'config {word}' for word in configs if not find(word, folder) and not find(word, script.parent)]


def why_not(words):
    """Returns why a document's command is not run here, or None if it is."""
    at, name = script_of(words), ' '.join(words)
    if words[0] in ('make', 'pip', 'sbatch') or 'pytest' in words:
        return 'installs, or takes minutes, or wants a cluster'
    if words[0] == 'jq':
        return None if shutil.which('jq') else 'jq is not installed'
    if words[0] == 'diff':
        return None
    if '...' in name or 'FILE_OR_FOLDER' in name or at is None:
        return 'is not complete'
    if '--nnodes=2' in words:
        return 'two machines: tests/test_machines.py'
    if '--cuda_graph' in words:
        return 'a GPU'
    if re.search(r'(shakespeare|shakespeare_char|openwebtext|fineweb)/prepare|out-gpt2', name):
        return 'a network'
    script = Path(words[at]).name
    if script == 'sharded_checkpoint.py':
        return 'has a test: tests/test_fsdp.py'
    return None if script in SHRINK and (script != 'report.py' or '--run' not in words) else 'takes minutes'


def run(words, folder, launch, copy):
    """Runs the command in the copy of the repository, with tiny sizes."""
    here = copy if folder == ROOT / 'docs' else copy / folder.relative_to(ROOT)
    if words[0] == 'jq' or 'visualize_training.py' in ' '.join(words):  # these refer to the reader's own logs
        log = next(here.glob('out*/run_*.json'))
        for name in ('', 'out', 'out-reference', 'out-ddp', 'out-zero1', 'out-fsdp', 'out-python-char'):
            (here / name).mkdir(exist_ok=True)
            if not (here / name / 'run_20260102_030405.json').exists():
                shutil.copy(log, here / name / 'run_20260102_030405.json')
    if words[0] in ('diff', 'jq'):
        done = subprocess.run(words, cwd=here, capture_output=True, text=True)
        assert done.returncode <= (words[0] == 'diff') and done.stdout, f'{words}: {done.stderr}'
        return
    at = script_of(words)
    script = (
        copy / find(words[at], folder).resolve().relative_to(ROOT)
        if not (here / words[at]).exists()
        else here / words[at]
    )
    nproc = next((int(word.split('=')[1]) for word in words[:at] if word.startswith('--nproc_per_node=')), 1)
    extra = list(SHRINK[script.name]) if '--help' not in words else []
    if script.name == 'train.py':
        extra += [f'--gradient_accumulation_steps={2 * nproc}']
    launch(script, *words[at + 1 :], *extra, nproc=nproc, cwd=here, timeout=300)  # raises if it fails


@pytest.fixture(scope='module')
def copy(launch, tmp_path_factory):
    """
    A fresh copy of the repository, without generated files except for the data set, which every document presupposes.
    """
    copy = tmp_path_factory.mktemp('copy') / 'repository'
    made = '.git .venv out out-* *.bin meta.pkl __pycache__ .*_cache *.egg-info'.split()
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*made))
    launch(copy / 'nanoGPT/data/python_char/prepare.py')
    return copy


@pytest.mark.parametrize('path', documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_is_there(path):
    assert problems(path) == []


@pytest.mark.parametrize(
    'path',
    [path if path == ROOT / 'README.md' else pytest.param(path, marks=pytest.mark.full) for path in documents()],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_commands_run(path, launch, copy):
    for words in commands_of(path.read_text()):
        if not why_not(words):
            run(words, path.parent, launch, copy)


BAD = """# A bad document
[a file](nanoGPT/trian.py), [a heading](#no-such), [a good one](nanoGPT/train.py), [itself](#a-bad-document)
`phase4_moe/train.py`, `checkpoints.py`, `--learning_rat=1`, `--learning_rate=1`, `benchmarks/results/none.json`

    python nanoGPT/train.py config/train_gtp2.py --max_iter=3     # a comment
    python nanoGPT/train.py config/train_gpt2.py --max_iters=3
    torchrun --standalone --nprocs_per_node=2 phase1_zero1/train.py --use_zero1=False
    torchrun --nproc_per_node=2 nanoGPT/train.py --use_zero1=False

```sh
make tests
diff -u nanoGPT/train.py phase1_zero1/trainer.py
python nanoGPT/sample.py --max_iters=3 --out_dir=nowhere
```
"""


def test_the_checks_can_fail(tmp_path, launch, copy):
    (tmp_path / 'bad.md').write_text(BAD)
    for name in ('nanoGPT', 'phase1_zero1'):
        (tmp_path / name).symlink_to(ROOT / name)
    assert problems(tmp_path / 'bad.md') == [
        'link nanoGPT/trian.py',
        'anchor #no-such',
        'flag --max_iter in python nanoGPT/train.py config/train_gtp2.py --max_iter=3',
        'config config/train_gtp2.py',
        'flag --nprocs_per_node in torchrun --standalone --nprocs_per_node=2 phase1_zero1/train.py --use_zero1=False',
        'flag --use_zero1 in torchrun --nproc_per_node=2 nanoGPT/train.py --use_zero1=False',
        'make target tests',
        'path phase1_zero1/trainer.py',
        'flag --max_iters in python nanoGPT/sample.py --max_iters=3 --out_dir=nowhere',
        'path phase4_moe/train.py',
        'path checkpoints.py',
        'flag --learning_rat',
        'path benchmarks/results/none.json',
    ]
    with pytest.raises(AssertionError, match='nowhere'):
        run(['python', 'nanoGPT/sample.py', '--out_dir=nowhere'], ROOT, launch, copy)
