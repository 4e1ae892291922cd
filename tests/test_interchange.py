"""
A checkpoint of any trainer at any world size resumes in any other, and any sample.py samples from it.

One checkpoint goes through a chain of runs, each of which reads what the one before wrote, does one step and writes it
again. The learning rate is 0 and AdamW's betas are 1 to the precision of float32, so a step changes nothing but the
step count: what is written must be what was read, to the bit, whatever the gradients. By default the chain visits every
kind of run once; -m full (make test-full) takes every pair of them.
"""

import itertools
import os
import shutil
from dataclasses import dataclass

import pytest
import torch

from conftest import ROOT, TINY, assert_same, load, log_of, make_letters
from model import GPT, GPTConfig

# its difference to 1 is 1.1e-16: times a gradient and added to a float32 average, that rounds to nothing
BETA = '0.9999999999999999'
SMALL = [*TINY, '--batch_size=2']  # the interpreter takes 10 ms for a row
STANDSTILL = [
    *SMALL,
    '--init_from=resume',
    '--eval_interval=1000',
    '--learning_rate=0',
    '--decay_lr=False',
    f'--beta1={BETA}',
    f'--beta2={BETA}',
]
FOLDERS = ['nanoGPT', 'phase1_zero1', 'phase2_triton', 'phase3_fsdp']
FULL = pytest.mark.full
CONVERT = ROOT / 'phase3_fsdp' / 'sharded_checkpoint.py'
SHARDED = '--ckpt_format=sharded'


@dataclass(frozen=True)
class Kind:
    """
    A kind of run: train.py of a folder on nproc ranks, with Triton's kernels (in the interpreter) or without, to a
    checkpoint in either format.
    """

    folder: str
    nproc: int
    triton: bool = False
    sharded: bool = False

    def __str__(self):
        return f'{self.folder}{"+triton" * self.triton}{"+sharded" * self.sharded}-{self.nproc}'

    @property
    def flags(self):
        model_dir = ['--model_dir=../phase2_triton'] if self.triton and self.folder != 'phase2_triton' else []
        fsdp = ['--fsdp_min_num_params=1'] if self.folder == 'phase3_fsdp' else []  # a unit for each block
        return [*model_dir, *fsdp, *(['--ckpt_format=sharded'] if self.sharded else [])]

    @property
    def reads_sharded(self):
        return self.folder == 'phase3_fsdp' and self.nproc > 1


# In the order of the default chain: some have as many ranks as the one before, so they continue with its data, some
# have not. 3 ranks split the vocabulary of 40 unevenly
KINDS = [
    Kind('phase1_zero1', 2),
    Kind('phase3_fsdp', 4),
    Kind('phase1_zero1', 4),
    Kind('nanoGPT', 2),
    Kind('phase3_fsdp', 2),
    Kind('phase2_triton', 2),
    Kind('phase1_zero1', 1),
    Kind('phase3_fsdp', 1),
    Kind('phase2_triton', 4),
    Kind('nanoGPT', 4),
    Kind('phase3_fsdp', 3, sharded=True),
    Kind('phase3_fsdp', 2, sharded=True, triton=True),
    Kind('phase3_fsdp', 2, triton=True),
    Kind('phase1_zero1', 2, triton=True),
    Kind('nanoGPT', 1),
    Kind('phase2_triton', 1, triton=True),
]


@pytest.fixture(scope='module')
def start(launch, tmp_path_factory):
    """A folder with the data set and with start/ckpt.pt, of the reference after 5 iterations in one process."""
    folder = tmp_path_factory.mktemp('interchange')
    make_letters(folder)
    launch(ROOT / 'nanoGPT' / 'train.py', *SMALL, '--max_iters=4', '--eval_interval=2', '--out_dir=start', cwd=folder)
    assert load(folder / 'start' / 'ckpt.pt')['iter_num'] == 5
    return folder


@pytest.fixture
def work(start, tmp_path, monkeypatch):
    """A folder to run in, with the data set and that checkpoint as out/ckpt.pt."""
    (tmp_path / 'data').symlink_to(start / 'data')
    shutil.copytree(start / 'start', tmp_path / 'out')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def walk(launch, launch_interpreted, work):
    """
    walk(kinds) makes runs of these kinds, each from the checkpoint that the one before left in out/, and checks what
    each writes. before: what out/ckpt.pt means, if not what it is. visit(kind) is called after each run.
    """

    def walk(*kinds, before=None, visit=lambda kind: None):
        before = before or load('out/ckpt.pt')
        for kind, source in zip(kinds, (None, *kinds)):
            print(f'{source} -> {kind}')  # shown if something fails
            sharded = source and source.sharded
            if sharded and not kind.reads_sharded:
                launch(CONVERT, 'full', 'out')
                sharded = False
            flags = [
                *STANDSTILL,
                *kind.flags,
                f'--max_iters={before["iter_num"]}',
                f'--gradient_accumulation_steps={kind.nproc}',
            ]
            run = (launch_interpreted if kind.triton else launch)(
                ROOT / kind.folder / 'train.py', *flags, nproc=kind.nproc
            )
            assert f'Resuming training from out/{"ckpt_sharded/" if sharded else "ckpt.pt"}' in run.stdout
            assert ('\nusing Triton-accelerated' in run.stdout) == kind.triton
            after = in_full(launch) if kind.sharded else load('out/ckpt.pt')
            assert_one_step_later(before, after, kind.nproc)
            before = after
            visit(kind)

    return walk


def in_full(launch):
    """
    Returns the sharded checkpoint in out/ as a full one. Asserts that converting it back and again keeps every bit.
    """
    shutil.copytree('out', 'copy')
    launch(CONVERT, 'full', 'copy')
    full = load('copy/ckpt.pt')
    launch(CONVERT, 'sharded', 'copy')
    os.remove('copy/ckpt.pt')
    launch(CONVERT, 'full', 'copy')
    assert_same(load('copy/ckpt.pt'), full)
    shutil.rmtree('copy')
    return full


def assert_one_step_later(before, after, nproc):
    """
    `after`, of a run on nproc ranks, is `before` with one more step counted; and if they can, the ranks used the
    batches they had drawn.
    """
    state = {i: {**s, 'step': s['step'] + 1} for i, s in before['optimizer']['state'].items()}
    assert len(state) == 15 and all(
        list(s) == ['step', 'exp_avg', 'exp_avg_sq'] and s['exp_avg_sq'].any() for s in state.values()
    )
    assert list(after) == ['model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config', 'resume']
    expected = {**before, 'optimizer': {**before['optimizer'], 'state': state}, 'iter_num': before['iter_num'] + 1}
    own = ('config', 'resume', 'lr', 'betas')  # belong to the run that wrote the file
    assert_same(after, expected, but=own)
    assert after['model']['lm_head.weight'].data_ptr() == after['model']['transformer.wte.weight'].data_ptr()
    assert len(after['resume']['ranks']) == nproc

    record = log_of('out')['iterations'][-1]
    assert record['iter'] == before['iter_num']
    ranks = before.get('resume', {}).get('ranks', [])
    if len(ranks) == nproc:
        # float32 sums in other orders: 8 steps of 1.2e-7
        assert record['loss'] == pytest.approx(loss_on(before, ranks), rel=1e-6)


@torch.no_grad()
def loss_on(checkpoint, ranks):
    """Returns the checkpoint's loss on the batches that the ranks had drawn, one each."""
    model = GPT(GPTConfig(**checkpoint['model_args']))
    model.load_state_dict(checkpoint['model'])
    return sum(model(rank['X'], rank['Y'])[1].item() for rank in ranks) / len(ranks)


@pytest.fixture
def sample(launch, launch_interpreted, start):
    """sample(folder, out_dir) returns 8 characters from that folder's sample.py; phase2_triton's uses the kernels."""

    def sample(folder, out_dir):
        flags = ['--start=0', '--num_samples=1', '--max_new_tokens=8', '--top_k=5', '--device=cpu']
        triton = folder == 'phase2_triton'
        out = (launch_interpreted if triton else launch)(
            ROOT / folder / 'sample.py', *flags, f'--out_dir={out_dir}'
        ).stdout
        assert ('\nusing Triton-accelerated' in out) == triton
        text = out.splitlines()[-2]
        assert len(text) == 9
        return text

    return sample


def test_through_every_kind_once(walk, sample, start):
    """The weights, which are still the same, give the same text with each folder's sample.py."""
    expected, folders = sample('nanoGPT', start / 'start'), itertools.cycle(FOLDERS)

    def visit(kind):
        assert kind.sharded or sample(next(folders), 'out') == expected

    walk(*KINDS, visit=visit)


@FULL
@pytest.mark.parametrize('first', range(len(KINDS)), ids=lambda i: str(KINDS[i]))
def test_through_every_pair(walk, first):
    """From the first kind to itself, to each later one and back: together these chains have every ordered pair."""
    there_and_back = [kind for later in KINDS[first + 1 :] for kind in (later, KINDS[first])]
    walk(KINDS[first], KINDS[first], *there_and_back)


@FULL
@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_samples_of_every_kind(walk, sample, start, launch, kind):
    walk(kind)
    if kind.sharded:
        launch(CONVERT, 'full', 'out')
    assert [sample(folder, 'out') for folder in FOLDERS] == [sample('nanoGPT', start / 'start')] * 4


UPSTREAM = [Kind('nanoGPT', 1), Kind('phase1_zero1', 2), Kind('phase3_fsdp', 4)]


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
@pytest.mark.parametrize(
    'kind', UPSTREAM + [pytest.param(kind, marks=FULL) for kind in KINDS if kind not in UPSTREAM], ids=str
)
def test_from_upstream(walk, kind, prefix):
    """
    What nanoGPT itself writes: no key `resume`, a tensor for the best loss, and its flags only; from a compiled model
    also other names.
    """
    ours = load('out/ckpt.pt')
    args = {
        k: v
        for k, v in ours['config'].items()
        if k not in ('model_dir', 'activation_checkpointing', 'gelu', 'json_log', 'peak_tflops')
    }
    theirs = {k: v for k, v in ours.items() if k != 'resume'} | {
        'config': args,
        'best_val_loss': torch.tensor(ours['best_val_loss']),
    }
    torch.save(theirs | {'model': {prefix + k: v for k, v in ours['model'].items()}}, 'out/ckpt.pt')
    walk(kind, before={k: v for k, v in ours.items() if k != 'resume'})


@pytest.mark.parametrize(
    'folder, nproc, options',
    [('nanoGPT', 1, []), ('phase1_zero1', 2, []), ('phase3_fsdp', 2, []), ('phase3_fsdp', 2, [SHARDED])],
)
def test_a_shorter_block_size(launch, work, folder, nproc, options):
    """Training continues with the first positions and their AdamW state."""

    def saved():
        if options:
            launch(CONVERT, 'full', 'short')
        checkpoint = load('short/ckpt.pt')
        if options:
            os.remove('short/ckpt.pt')
        return checkpoint

    launch(ROOT / folder / 'train.py', *SMALL, *options, '--out_dir=short', '--max_iters=3', nproc=nproc)
    before = saved()
    out = launch(
        ROOT / folder / 'train.py',
        *STANDSTILL,
        *options,
        '--out_dir=short',
        '--block_size=8',
        '--max_iters=5',
        nproc=nproc,
    ).stdout
    after = saved()
    assert 'iter 5:' in out and after['model_args']['block_size'] == 8
    assert len(before['model']['transformer.wpe.weight']) == 16 and len(after['model']['transformer.wpe.weight']) == 8
    for name, tensor in after['model'].items():
        assert torch.equal(tensor, before['model'][name][: len(tensor)])
    for i, state in after['optimizer']['state'].items():
        old = before['optimizer']['state'][i]
        assert int(state['step']) == 6 and all(
            torch.equal(state[k], old[k][: len(state[k])]) for k in ('exp_avg', 'exp_avg_sq')
        )
