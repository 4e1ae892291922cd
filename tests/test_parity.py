"""
Every trainer with every model at 1, 2 and 4 processes computes the same numbers as nanoGPT/, and nanoGPT/ the numbers
in golden_losses.json. The cases on Triton's interpreter are slow: by default three of them run, briefly (-m full, or
make test-full: all).
"""

import hashlib
import json
import math
import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import PROGRAMS, ROOT, TINY, assert_same, load, log_of, make_letters

TRAINERS = ['nanoGPT', 'phase1_zero1', 'phase3_fsdp']
MODELS = {'reference': [], 'triton': ['--model_dir=../phase2_triton']}
WORLD_SIZES = [1, 2, 4]
ITERATIONS = 50
CLIP = {1: 1.3, 2: 1.1, 4: 1.0}  # the mean gradient of more sequences is shorter
# weight decay, accumulation, a clipping that holds in some iterations only; 24 rows of 32 are more than one program of
# a kernel takes
FLAGS = [
    *TINY,
    '--block_size=8',
    '--batch_size=3',
    '--learning_rate=1e-3',
    '--min_lr=1e-4',
    '--weight_decay=0.2',
    f'--lr_decay_iters={ITERATIONS}',
    '--eval_interval=1000',
    '--eval_iters=1',
]
# float32 has steps of 1.2e-7. FSDP adds up gradients and norms in another order than DDP, Triton's kernels rows in
# another than F.layer_norm. One or two steps are what this was seen to make in 50 iterations (of a loss 1.6e-7, of a
# norm 2.4e-7, of the weights 2.2e-7); the contract allows 8 for a loss
TOLERANCE = dict(loss=1e-6, grad_norm=1e-6, weights=1e-6)
GOLDEN = Path(__file__).with_name('golden_losses.json')


def flags_of(nproc, iterations):
    return [
        *FLAGS,
        f'--gradient_accumulation_steps={2 * nproc}',
        f'--grad_clip={CLIP[nproc]}',
        f'--max_iters={iterations - 1}',
    ]


@pytest.fixture(scope='module')
def train(launch, launch_interpreted, tmp_path_factory):
    """
    train(trainer, model, nproc, iterations, *more flags): .stdout, .iterations (of its log) and .checkpoint of a run.
    One that has been made is not made again.
    """
    folder = tmp_path_factory.mktemp('parity')
    make_letters(folder)
    runs = {}

    def train(*cell):
        if cell not in runs:
            trainer, model, nproc, iterations, *more = cell
            out_dir, program = folder / str(len(runs)), [ROOT / trainer / 'train.py']
            if '--compile=True' in more:
                program.insert(0, PROGRAMS / 'aot_eager.py')
            start = launch_interpreted if model == 'triton' else launch
            run = start(
                *program,
                *flags_of(nproc, iterations),
                *MODELS[model],
                *more,
                f'--out_dir={out_dir}',
                nproc=nproc,
                cwd=folder,
                timeout=400,
            )
            runs[cell] = SimpleNamespace(
                stdout=run.stdout, iterations=log_of(out_dir)['iterations'], checkpoint=load(out_dir / 'ckpt.pt')
            )
        return runs[cell]

    return train


def deviations(run, reference):
    """
    Returns the worst relative deviations of a run: of its losses and gradient norms, of the 2-norm of its final weight
    matrices and vectors.
    """
    pairs = list(zip(run.iterations, reference.iterations, strict=True))
    worst = {key: max(abs(ours[key] / theirs[key] - 1) for ours, theirs in pairs) for key in ('loss', 'grad_norm')}
    weights = reference.checkpoint['model']
    assert run.checkpoint['model'].keys() == weights.keys()
    worst['weights'] = max(
        ((p - weights[k]).norm() / weights[k].norm()).item() for k, p in run.checkpoint['model'].items()
    )
    return worst


def assert_agree(run, reference, exactly=False):
    assert [record['iter'] for record in run.iterations] == list(range(len(reference.iterations)))
    found = deviations(run, reference)
    assert all(math.isfinite(value) and value <= (0 if exactly else TOLERANCE[key]) for key, value in found.items()), (
        found
    )
    if exactly:
        for ours, theirs in (
            (run.checkpoint[k], reference.checkpoint[k]) for k in ('model', 'optimizer', 'iter_num', 'best_val_loss')
        ):
            assert_same(ours, theirs)


@pytest.mark.parametrize('nproc', WORLD_SIZES)
def test_the_settings_show_what_they_should(train, nproc):
    """The model learns, and gradients are clipped in some iterations, left alone in others."""
    run = train('nanoGPT', 'reference', nproc, ITERATIONS)
    norms = [record['grad_norm'] for record in run.iterations]
    assert min(norms) < CLIP[nproc] < max(norms)
    assert run.iterations[-1]['loss'] < run.iterations[0]['loss'] - 0.4


@pytest.mark.parametrize('nproc', WORLD_SIZES)
@pytest.mark.parametrize('trainer', TRAINERS[1:])
def test_same_numbers_as_the_reference(train, trainer, nproc):
    more = ['--fsdp_min_num_params=1'] if trainer == 'phase3_fsdp' else []  # a unit for each block
    run = train(trainer, 'reference', nproc, ITERATIONS, *more)
    assert ('not using' in run.stdout) == (nproc == 1)
    # ZeRO-1 changes no order of summation; one process runs the reference's own code
    assert_agree(run, train('nanoGPT', 'reference', nproc, ITERATIONS), exactly=trainer == 'phase1_zero1' or nproc == 1)


CHECKPOINTING = ['--activation_checkpointing', '--fsdp_reshard=True', '--fsdp_min_num_params=1']
BRIEFLY = [('nanoGPT', 1, []), ('phase1_zero1', 4, []), ('phase3_fsdp', 2, CHECKPOINTING)]
TRITON_CELLS = [(trainer, nproc, []) for trainer in TRAINERS for nproc in WORLD_SIZES] + [
    ('phase3_fsdp', 2, CHECKPOINTING)
]


@pytest.mark.parametrize(
    'trainer, nproc, more, iterations',
    [(*cell, 4) for cell in BRIEFLY]
    + [pytest.param(*cell, ITERATIONS, marks=pytest.mark.full) for cell in TRITON_CELLS],
    ids=lambda value: 'checkpointing' * bool(value) if isinstance(value, list) else None,
)
def test_same_numbers_with_triton(train, trainer, nproc, more, iterations):
    run = train(trainer, 'triton', nproc, iterations, *more)
    assert re.search(r'^using Triton-accelerated LayerNorm', run.stdout, re.M) and 'not using Triton' not in run.stdout
    reference = train('nanoGPT', 'reference', nproc, iterations)
    assert_agree(run, reference)
    if trainer != 'phase3_fsdp':  # FSDP differs in some bits anyway
        assert deviations(run, reference)['weights'] > 0, 'F.layer_norm, not the kernels'
    if iterations == ITERATIONS and (trainer == 'phase1_zero1' or nproc == 1) and trainer != 'nanoGPT':
        assert_agree(run, train('nanoGPT', 'triton', nproc, iterations), exactly=True)


@pytest.mark.parametrize(
    'checkpointing', [[], pytest.param(CHECKPOINTING, marks=pytest.mark.full)], ids=['', 'checkpointing']
)
def test_triton_model_compiled_under_fsdp(train, checkpointing):
    """Kernels that run need no compiler and get none; the numbers are the reference's."""
    run = train('phase3_fsdp', 'triton', 2, 4, '--compile=True', '--fsdp_min_num_params=1', *checkpointing)
    assert re.search(r'^using Triton', run.stdout, re.M) and 'graphs 0 breaks 0' in run.stdout
    assert_agree(run, train('nanoGPT', 'reference', 2, 4))


def machine():
    """Returns the facts that the last bits of a loss depend on."""
    cpu = (
        re.search(r'^model name\s*: (.*)$', Path('/proc/cpuinfo').read_text(), re.M)
        if platform.system() == 'Linux'
        else None
    )
    return dict(
        torch=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
        machine=platform.machine(),
        cpu=cpu and cpu[1],
    )


def test_golden_losses(train, pytestconfig, tmp_path, capsys):
    """
    The reference's losses are those that golden_losses.json has: to the bit on the kind of machine that wrote it,
    elsewhere to 1e-5, since another CPU or torch sums in another order (AVX2 for AVX-512: 1.5e-7). `pytest -k golden
    --regenerate-golden` rewrites it and says what changed. That is right only after a change that is meant to change
    the numbers, and belongs in the same commit.
    """
    make_letters(tmp_path)
    data = hashlib.sha256((tmp_path / 'data' / 'letters' / 'train.bin').read_bytes()).hexdigest()
    losses = {
        str(nproc): [record['loss'] for record in train('nanoGPT', 'reference', nproc, ITERATIONS).iterations]
        for nproc in (1, 2)
    }
    flags = {nproc: ' '.join(flags_of(int(nproc), ITERATIONS)) for nproc in losses}
    now = dict(machine=machine(), flags=flags, data=data, losses=losses)
    if pytestconfig.getoption('regenerate_golden'):
        before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(now, indent=1) + '\n')
        with capsys.disabled():
            print(
                f'\nwrote {GOLDEN.name}; changed: {", ".join(k for k in now if now[k] != before.get(k)) or "nothing"}'
            )
            for nproc, values in before.get('losses', {}).items():
                print(
                    f'{nproc} processes: by up to '
                    f'{max(abs(a / b - 1) for a, b in zip(losses[nproc], values)):.1e}, relative'
                )
    golden = json.loads(GOLDEN.read_text())
    assert golden['flags'] == flags and golden['data'] == data, 'these are losses of another run'
    if golden['machine'] == now['machine']:
        assert losses == golden['losses']
    else:
        for nproc, values in golden['losses'].items():
            assert losses[nproc] == pytest.approx(values, rel=1e-5)
