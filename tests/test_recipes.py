"""
The recipes, as far as a machine without their services can run them: the files parse, their scripts train and continue,
and the notebook runs from top to bottom. Clouds, clusters and Docker engines are not part of these tests.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import types

import pytest
import yaml

from conftest import PROGRAMS, ROOT, TINY, make_letters

RECIPES = ROOT / 'recipes'
SMALL = (
    '--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=1 --eval_interval=1 --eval_iters=1'
)


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the trainers, without data."""
    clone = tmp_path_factory.mktemp('clone')
    ignore = shutil.ignore_patterns('*.bin', '*.tmp', 'meta.pkl', 'out', 'out-*', '__pycache__')
    for folder in ('nanoGPT', 'phase1_zero1', 'phase2_triton', 'phase3_fsdp'):
        shutil.copytree(ROOT / folder, clone / folder, symlinks=True, ignore=ignore)
    make_letters(clone)
    return clone


def bash(script, cwd, **env):
    """Runs a script where `torchrun` forks its ranks and `python` is this one; returns what it printed."""
    path = f'{PROGRAMS / "slurm"}:{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'
    env = dict(os.environ, PATH=path, PYTHON=sys.executable, **env)
    run = subprocess.run(['bash', '-euc', script], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f'{script}\n{run.stdout}\n{run.stderr}'
    return run.stdout


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return str(server.getsockname()[1])


def trains_and_continues(run, train):
    """
    run(flags) runs a recipe's script with its training replaced by a tiny one: first from scratch, then from the
    checkpoint.
    """
    trainer, config, *flags = train.split()
    assert (ROOT / trainer).exists() and (ROOT / config).exists() and flags == ['--gradient_accumulation_steps=16']
    tiny = shlex.join([trainer, *TINY, '--max_iters=2'])
    assert 'Initializing a new model' in run(tiny)
    continued = run(tiny.replace('--max_iters=2', '--max_iters=4'))
    assert 'Resuming training from' in continued and '\niter 4:' in continued and '\niter 1:' not in continued


def test_skypilot(clone, tmp_path):
    recipe = yaml.safe_load((RECIPES / 'skypilot.yaml').read_text())
    assert recipe['resources']['accelerators'].endswith(':8') and recipe['num_nodes'] == 2
    assert recipe['envs']['out'].startswith(f'{next(iter(recipe["file_mounts"]))}/')
    machine = dict(
        SKYPILOT_NODE_IPS='127.0.0.1\n127.0.0.2',
        SKYPILOT_NUM_NODES='1',
        SKYPILOT_NUM_GPUS_PER_NODE='2',
        SKYPILOT_NODE_RANK='0',
    )
    script = recipe['run'].replace('--master_port=29500', f'--master_port={free_port()}')
    assert script != recipe['run']
    trains_and_continues(
        lambda train: bash(script, clone, train=train, out=str(tmp_path / 'gpt'), **machine), recipe['envs']['train']
    )


def test_kubeflow(clone, tmp_path):
    recipe = yaml.safe_load((RECIPES / 'kubeflow-trainjob.yaml').read_text())
    assert (recipe['apiVersion'], recipe['kind']) == ('trainer.kubeflow.org/v1alpha1', 'TrainJob')
    trainer = recipe['spec']['trainer']
    assert trainer['numNodes'] * trainer['resourcesPerNode']['limits']['nvidia.com/gpu'] == 16
    (patch,) = recipe['spec']['runtimePatches']
    (job,) = patch['trainingRuntimeSpec']['template']['spec']['replicatedJobs']
    pod = job['template']['spec']['template']['spec']
    mounts = {mount['mountPath']: mount['name'] for mount in pod['containers'][0]['volumeMounts']}
    assert set(mounts.values()) == {volume['name'] for volume in pod['volumes']}
    variables = {variable['name']: variable['value'] for variable in trainer['env']}
    assert os.path.dirname(variables['out']) in mounts
    node = dict(PET_NNODES='1', PET_NPROC_PER_NODE='2', PET_NODE_RANK='0')  # as Kubeflow's operator sets them
    node |= dict(PET_MASTER_ADDR='127.0.0.1', PET_MASTER_PORT=free_port())
    assert trainer['command'] == ['bash', '-c']
    (script,) = trainer['args']
    trains_and_continues(
        lambda train: bash(script, clone, train=train, out=str(tmp_path / 'gpt'), **node), variables['train']
    )


def test_dockerfile():
    """
    The files that its steps name exist, and the packages are installed before the rest is copied, which changes more
    often.
    """
    lines = [line for line in (ROOT / 'Dockerfile').read_text().splitlines() if line and not line.startswith('#')]
    steps = [line.split(' #')[0].split(maxsplit=1) for line in lines]
    assert len(lines) <= 10 and steps[0][0] == 'FROM'
    copied = [words.split()[:-1] for step, words in steps if step == 'COPY']
    assert all((ROOT / name).exists() for names in copied for name in names) and copied[-1] == ['.']
    (command,) = [json.loads(words) for step, words in steps if step == 'CMD']
    assert command == ['python', 'demo.py'] and (ROOT / command[1]).exists()
    install = next(i for i, (_, words) in enumerate(steps) if 'pip install' in words)
    assert steps[install - 1][0] == 'COPY' and {'pyproject.toml', 'constraints.txt', 'README.md'} == set(copied[0])
    ignored = (ROOT / '.dockerignore').read_text().split()
    assert {'.git', '.venv', 'out*'} <= set(ignored)


@pytest.mark.full
def test_notebook(clone, monkeypatch):
    """
    Its cells run in order, on two CPU processes, with a smaller model. The services' own steps, clone and install, are
    left out.
    """
    notebook = json.loads((RECIPES / 'two_gpus.ipynb').read_text())
    assert (notebook['nbformat'], notebook['metadata']['kernelspec']['language']) == (4, 'python')
    cells = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert len({cell['id'] for cell in notebook['cells']}) == len(notebook['cells'])
    monkeypatch.chdir(clone)
    shown, printed, left_out = [], [], []
    display = types.SimpleNamespace(Image=shown.append)
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, 'IPython.display', display)

    def shell(command):
        leave_out = command.startswith(('git clone ', 'pip install '))
        left_out.append(command) if leave_out else printed.append(bash(command, clone))

    names = {'shell': shell}
    for cell in cells:
        code = re.sub(r'^( *)!(.*)$', lambda line: f'{line[1]}shell(f{line[2]!r})', cell, flags=re.M)
        exec(code, names)
        if 'flags' in names and SMALL not in names['flags']:
            names['flags'] += ' ' + SMALL
    assert left_out == ['pip install -q -c constraints.txt -e .']
    trained = [text for text in printed if 'iter 0: loss' in text]
    assert len(trained) == 4 and 'Using ZeRO-1' in trained[1] and 'Wrapping model with FSDP' in trained[2]
    assert 'not using Triton' in trained[3] and shown == ['comparison.png'] and (clone / 'comparison.png').exists()
