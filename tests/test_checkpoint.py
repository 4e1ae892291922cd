"""
Checkpoints: any changed byte or field is detected, names from other versions are understood, and a save loses nothing.
"""

import glob
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch

import out_dir
from checkpoint import load_checkpoint, load_model, write_checkpoint
from checkpoint_changes import changes, representatives
from conftest import NANOGPT, PROGRAMS, ROOT, TINY, load, log_of, make_letters
from errors import UserError
from model import GPT, GPTConfig
from resume import loss_to_beat, measured_differently

TRAIN, SAMPLE = NANOGPT / 'train.py', NANOGPT / 'sample.py'
RESUME = [*TINY, '--init_from=resume', '--max_iters=5', '--eval_interval=100', '--eval_iters=1']
READERS = ''.join(
    (NANOGPT / f'{name}.py').read_text() for name in ('checkpoint', 'checkpoint_fields', 'resume', 'sample')
)


@pytest.fixture(scope='module')
def trained(launch, tmp_path_factory):
    """A folder with the data set, and in out/ the checkpoints of a run that has done 5 iterations."""
    folder = tmp_path_factory.mktemp('trained')
    make_letters(folder)
    launch(TRAIN, *TINY, '--n_layer=1', '--max_iters=4', '--eval_interval=2', cwd=folder)
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A folder to run in, with the data set and these checkpoints."""
    (tmp_path / 'data').symlink_to(trained / 'data')
    shutil.copytree(trained / 'out', tmp_path / 'out')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def acceptable(status, stderr):
    return status == 0 or (status == 2 and stderr.count('error: ') == 1 and 'Traceback' not in stderr)


def run_changed(launch, script, numbers, flags):
    """
    Asserts that the script accepts each changed checkpoint or ends with one message. Returns how many it accepted.
    """
    shutil.copy('out/ckpt.pt', 'original.pt')
    launch(
        ROOT / 'tests' / 'checkpoint_changes.py',
        *('original.pt', 'out/ckpt.pt', 'results.json', json.dumps(numbers), script, *flags),
        timeout=600,
    )
    results = json.load(open('results.json'))
    assert len(results) == len(numbers)
    assert [r for r in results if not acceptable(*r[1:])] == []
    return sum(status == 0 for _, status, _ in results)


SCRIPTS = {
    'train': (TRAIN, [*RESUME, '--n_layer=1']),
    'sample': (SAMPLE, ['--start=0', '--num_samples=1', '--max_new_tokens=2', '--device=cpu']),
}


FOLDERS = ['nanoGPT', 'phase1_zero1', 'phase3_fsdp']


def only_for_training(path):
    """Returns whether only a trainer reads the field at this path."""
    return path[0] == 'optimizer' or path[:2] in (('resume', 'ranks'), ('resume', 'scaler'), ('resume', 'order'))


@pytest.mark.parametrize('folder', FOLDERS)
@pytest.mark.parametrize('name', SCRIPTS)
def test_a_changed_field_is_accepted_or_named(launch, run, folder, name):
    """
    Each folder tests its share of half of the changes, because the three share the code that reads a checkpoint on one
    rank; the next test makes all changes in each.
    """
    found = changes(load('out/ckpt.pt'))
    numbers = representatives(found, READERS)
    if name == 'sample':
        numbers = [n for n in numbers if not only_for_training(found[n][0])]
    numbers = numbers[FOLDERS.index(folder) :: 6]
    script, flags = SCRIPTS[name]
    accepted = run_changed(launch, ROOT / folder / script.name, numbers, flags)
    assert 0.05 * len(numbers) < accepted < 0.95 * len(numbers)  # it neither refuses all changes nor ignores all


def test_evaluation_accepts_or_names_a_changed_field(launch, run):
    """A quarter of the changes of all fields but the weights, which sample.py's test covers."""
    found = changes(load('out/ckpt.pt'))
    numbers = [n for n in representatives(found, READERS) if not only_for_training(found[n][0])]
    numbers = [n for n in numbers if found[n][0][0] != 'model']
    flags = ['--val_tokens=50', '--device=cpu']
    run_changed(launch, NANOGPT / 'evaluate.py', numbers[::4], flags)


@pytest.mark.full
@pytest.mark.parametrize('folder', FOLDERS)
@pytest.mark.parametrize('name', SCRIPTS)
def test_every_changed_field_is_accepted_or_named(launch, run, folder, name):
    script, flags = SCRIPTS[name]
    run_changed(launch, ROOT / folder / script.name, list(range(len(changes(load('out/ckpt.pt'))))), flags)


SHARDED = ['--ckpt_format=sharded', '--fsdp_min_num_params=1']
TRAINERS = {'nanoGPT': [], 'phase1_zero1': [], 'phase3_fsdp': [], 'phase3_fsdp sharded': SHARDED}


@pytest.mark.parametrize('trainer', TRAINERS)
def test_training_state_is_checked_on_all_ranks(launch, run, trainer):
    """Incomplete state would be replaced by zero moments. A step count may be an int instead of a tensor."""
    script, flags = ROOT / trainer.split()[0] / 'train.py', [*TINY, *TRAINERS[trainer], '--n_layer=1']
    if TRAINERS[trainer]:
        shutil.rmtree('out')
        launch(script, *flags, '--max_iters=4', nproc=2)
        path = glob.glob('out/ckpt_sharded/*/unsharded.pt')[0]
    else:
        path = 'out/ckpt.pt'
    whole, state = load(path), load(path)['optimizer']['state']
    without = {i: {k: v for k, v in s.items() if i != 5 or k != 'step'} for i, s in state.items()}
    ints = {i: {**s, 'step': int(s['step'])} for i, s in state.items()}
    for changed, message in (
        (
            {'optimizer': {**whole['optimizer'], 'state': {}}},
            'incomplete: exp_avg, exp_avg_sq, step of parameter 0 of 9',
        ),
        ({'optimizer': {**whole['optimizer'], 'state': without}}, 'incomplete: step of parameter 5 of 9'),
        ({'resume': {**whole['resume'], 'scaler': {'scale': -1.0}}}, 'its resume.scaler.scale is -1.0'),
        ({'best_val_loss': None}, 'its best_val_loss is None, but it must be a number'),
        ({'optimizer': {**whole['optimizer'], 'state': ints}}, None),
    ):
        torch.save({**whole, **changed}, path)
        ended = launch(script, *flags, '--init_from=resume', '--max_iters=5', nproc=2, check=False, timeout=60)
        assert acceptable(ended.returncode, ended.stderr) and (message or '') in ended.stderr, ended.stderr
        assert ended.returncode == (2 if message else 0)


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


def test_a_flipped_bit_anywhere_in_a_file_is_noticed(run):
    with open('out/ckpt.pt', 'rb') as f:
        content = f.read()
    load_checkpoint('out/ckpt.pt', to_resume=True)
    rng = random.Random(0)
    # the headers are a hundredth of the file: each of their bytes near its ends, and any bytes in between
    positions = [*range(300), *rng.sample(range(len(content)), 300), *range(len(content) - 400, len(content))]
    accepted = []
    for position in positions:
        with open('out/flipped.pt', 'wb') as f:
            f.write(flipped(content, position))
        try:
            load_checkpoint('out/flipped.pt')
            accepted.append(position)
        except UserError as e:
            assert 'out/flipped.pt is damaged' in str(e) and 'ckpt.pt' in str(e)
    assert accepted == []


def test_a_flipped_bit_in_a_file_of_another_program_is_noticed(run):
    """nanoGPT's files have only torch.save's checksums, which cover everything that is read from them."""
    torch.save(load('out/ckpt.pt'), 'other.pt')
    load_checkpoint('other.pt')
    with open('other.pt', 'rb') as f:
        content = f.read()
    weight = content.index(load('other.pt')['model']['transformer.wte.weight'].numpy().tobytes())
    with open('other.pt', 'wb') as f:
        f.write(flipped(content, weight + 100))
    with pytest.raises(UserError, match='is damaged: the checksum'):
        load_checkpoint('other.pt')


def test_a_flipped_bit_in_a_sharded_checkpoint_is_noticed(launch, run):
    launch(ROOT / 'phase3_fsdp' / 'train.py', *TINY, *SHARDED, '--max_iters=2', '--out_dir=shards', nproc=2)
    (run / 'flips.py').write_text(f"""
import os, random, sys
sys.path.insert(0, {str(ROOT / 'phase3_fsdp')!r})
from errors import UserError
from sharded_checkpoint import as_full, find_checkpoint
folder, rng = find_checkpoint('shards'), random.Random(0)
as_full(folder)
for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    content = open(path, 'rb').read()
    for position in rng.sample(range(len(content)), 20):
        with open(path, 'wb') as f:
            f.write(content[:position] + bytes([content[position] ^ 4]) + content[position + 1:])
        try:
            as_full(folder)
            print('accepted', name, position)
        except UserError:
            pass
    open(path, 'wb').write(content)
    print('tried', name)
""")
    out = launch('flips.py').stdout
    assert out.count('tried') == 4 and 'accepted' not in out, out


def test_names_of_wrappers_and_masks_of_other_versions(launch, run):
    checkpoint = load('out/ckpt.pt')
    model = GPT(GPTConfig(**checkpoint['model_args']))

    def wrapped(name, i):
        parts = name.split('.')
        parts.insert(len(parts) - 1, ('_checkpoint_wrapped_module', 'module._orig_mod', '_fsdp_wrapped_module')[i % 3])
        return ('module._orig_mod.', '_orig_mod.module.')[i % 2] + '.'.join(parts)

    weights = {wrapped(name, i): w for i, (name, w) in enumerate(checkpoint['model'].items())}
    weights['module._orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    weights['transformer.h.0.attn.masked_bias'] = torch.tensor(-1e4)
    load_model(model, {**checkpoint, 'model': weights})
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, checkpoint['model'][name])
    torch.save({**checkpoint, 'model': weights}, 'out/ckpt.pt')
    for folder in ('phase1_zero1', 'phase3_fsdp'):
        shutil.copytree('out', f'out_{folder}')
        ended = launch(ROOT / folder / 'train.py', *RESUME, '--n_layer=1', f'--out_dir=out_{folder}', nproc=2)
        assert 'iter 5:' in ended.stdout
    with pytest.raises(UserError, match='module.transformer.wte.weight is unknown'):
        both = {**checkpoint['model'], 'module.transformer.wte.weight': torch.ones(40, 32)}
        load_model(model, {**checkpoint, 'model': both})


def test_a_checkpoint_of_another_model(launch, run):
    """A fork of nanoGPT may have other options, or an output layer of its own, which our model would drop."""
    checkpoint = load('out/ckpt.pt')
    checkpoint['model_args']['rotary'] = True
    torch.save(checkpoint, 'out/ckpt.pt')
    result = launch(SAMPLE, '--device=cpu', '--num_samples=1', '--max_new_tokens=1')
    assert "note: the checkpoint's model_args have rotary=True, which this model.py ignores" in result.stdout
    checkpoint['model']['lm_head.weight'] = checkpoint['model']['lm_head.weight'] + 1
    torch.save(checkpoint, 'out/ckpt.pt')
    for script, *flags in ((TRAIN, *RESUME, '--n_layer=1'), (SAMPLE, '--device=cpu')):
        result = launch(script, *flags, check=False)
        assert result.returncode == 2
        assert 'lm_head.weight differs from its transformer.wte.weight, but in this model.py they are' in result.stderr


def test_the_best_checkpoint_has_its_own_storage(run):
    write_checkpoint({'iter_num': 1}, 'made/anew', best=True, required=True)
    assert os.stat('made/anew/ckpt.pt').st_ino != os.stat('made/anew/ckpt_best.pt').st_ino
    for method in ('copy_file_range', None):  # None: a system without it
        with pytest.MonkeyPatch.context() as patch:
            if not method:
                patch.delattr(os, 'copy_file_range')
            result = write_checkpoint({'iter_num': 2}, 'made/anew', best=True, required=True)
        assert result['best'] and result['bytes'] == os.path.getsize('made/anew/ckpt.pt')
        with open('made/anew/ckpt.pt', 'wb') as f:  # as cp does
            f.write(b'another')
        assert load('made/anew/ckpt_best.pt') == {'iter_num': 2}
    assert sorted(os.listdir('made/anew')) == ['ckpt.pt', 'ckpt_best.pt']


def test_a_best_checkpoint_that_cannot_be_copied(run, capsys, monkeypatch):
    """The latest is saved nevertheless, and the result says that it is not the best on the disk."""
    monkeypatch.setattr('checkpoint._copy', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    result = write_checkpoint({'iter_num': 9}, 'out', best=True, required=True)
    assert not result['best'] and result['bytes'] and load('out/ckpt.pt') == {'iter_num': 9}
    assert load('out/ckpt_best.pt')['iter_num'] == 4
    assert 'out/ckpt.pt is saved, but not its copy out/ckpt_best.pt' in capsys.readouterr().err


def test_a_resume_knows_the_best_checkpoint_on_the_disk(launch, run):
    """A run that was killed after it could not copy ckpt.pt has recorded a best loss that no checkpoint has."""
    write_checkpoint({**load('out/ckpt.pt'), 'best_val_loss': 0.5}, 'out', best=False, required=True)
    best = load('out/ckpt_best.pt')
    launch(TRAIN, *RESUME, '--n_layer=1', '--max_iters=6', '--eval_interval=3', '--learning_rate=1e-2')
    assert best['best_val_loss'] > load('out/ckpt_best.pt')['best_val_loss'] > 0.5
    assert load('out/ckpt.pt')['best_val_loss'] == load('out/ckpt_best.pt')['best_val_loss']


def test_a_best_loss_on_other_tokens_is_not_the_one_to_beat(launch, run):
    """It could be out of reach, so that no best checkpoint is saved any more. The one that has it gets another name."""
    for name in ('ckpt', 'ckpt_best'):
        torch.save({**load(f'out/{name}.pt'), 'best_val_loss': 0.5}, f'out/{name}.pt')
    best = (run / 'out' / 'ckpt_best.pt').read_bytes()
    flags = [TRAIN, *TINY, '--init_from=resume', '--n_layer=1', '--eval_interval=3', '--val_tokens=300']
    note = 'note: the lowest validation loss so far, 0.5000, does not count in this run'
    out = launch(*flags, '--max_iters=5').stdout  # without an evaluation, so ckpt_best.pt stays
    assert note in out and 'on other tokens (val_tokens=300 instead of 0)' in out
    assert (run / 'out' / 'ckpt_best.pt').read_bytes() == best
    out = launch(*flags, '--max_iters=6').stdout
    assert 'ckpt_best.pt has the lowest loss measured on other tokens: renamed to ckpt_best_before.pt' in out
    assert (run / 'out' / 'ckpt_best_before.pt').read_bytes() == best
    assert load('out/ckpt_best.pt')['iter_num'] == 6 and 0.5 < load('out/ckpt_best.pt')['best_val_loss'] < 1e9
    out = launch(*flags, '--max_iters=9').stdout
    assert 'other tokens' not in out and not os.path.exists('out/ckpt_best_before_2.pt')


@pytest.mark.parametrize('kept', [True, False])
def test_a_note_promises_to_keep_only_what_exists(tmp_path, capsys, kept):
    """nanoGPT itself keeps no copy of the best checkpoint."""
    checkpoint = {'best_val_loss': 0.5, 'config': {'dataset': 'words', 'block_size': 8}}
    if kept:
        torch.save(checkpoint, tmp_path / 'ckpt_best.pt')
    config = {'val_tokens': 0, 'block_size': 8, 'dataset': 'letters', 'eval_only': False, 'out_dir': str(tmp_path)}
    assert loss_to_beat(checkpoint, str(tmp_path / 'ckpt_best.pt'), config) == 1e9
    said = capsys.readouterr().out
    assert 'measures on other tokens (dataset=letters instead of words)' in said
    assert ('will be kept' in said) == (str(tmp_path) in out_dir.other_best) == kept


def test_fields_that_a_save_would_drop(launch, run):
    """Such as a moving average of the weights that another program has added."""
    flags = [TRAIN, *TINY, '--init_from=resume', '--n_layer=1', '--max_iters=5']
    assert 'also holds' not in launch(*flags).stdout
    torch.save({**load('out/ckpt.pt'), 'ema': {'a': torch.ones(2)}}, 'out/ckpt.pt')
    assert 'note: out/ckpt.pt also holds ema, which the next save drops: to keep it, copy' in launch(*flags).stdout


@pytest.mark.parametrize(
    'saved, config, same_data, difference',
    [
        ({'block_size': 64, 'eval_iters': 1}, {}, True, ''),  # more or fewer random batches estimate the same loss
        ({'val_tokens': 10, 'block_size': 8}, {}, True, 'val_tokens=0 instead of 10, block_size=64 instead of 8'),
        ({'block_size': 64}, {'val_tokens': 10}, True, 'val_tokens=10 instead of 0'),
        ({'dataset': 'letters'}, {}, True, ''),
        ({'dataset': 'letters'}, {}, False, 'dataset=words instead of letters'),
        ({'dataset': 'letters'}, {'dataset': '/nanoGPT/data/letters/'}, False, ''),
        ({'val_tokens': torch.zeros(2)}, {}, True, 'val_tokens=0 instead of tensor([0., 0.])'),
    ],
)
def test_on_which_tokens_a_loss_is_measured(saved, config, same_data, difference):
    config = {'val_tokens': 0, 'block_size': 64, 'eval_iters': 200, 'dataset': 'words', **config}
    assert measured_differently(saved, config, same_data) == difference


def test_what_was_set_aside_is_not_overwritten(launch, run):
    saved = {}
    for n_layer, ending in ((1, ''), (2, '_before'), (3, '_before_2')):
        launch(TRAIN, *TINY, f'--n_layer={n_layer}', '--max_iters=2', '--eval_interval=2')
        saved[n_layer] = (run / 'out' / 'ckpt.pt').read_bytes()
    assert [load(f'out/ckpt{ending}.pt')['iter_num'] for ending in ('_before', '_before_2', '_before_3')] == [5, 3, 3]
    assert [load(f'out/ckpt{e}.pt')['model_args']['n_layer'] for e in ('_before', '_before_2', '_before_3', '')] == [
        1,
        1,
        2,
        3,
    ]
    assert load('out/ckpt_best_before.pt')['iter_num'] == 4


PATCHED = """
import os, runpy, shutil, sys, time
sys.path.insert(0, os.path.dirname({script!r}))
import torch
{patch}
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def patched(folder, patch, script=TRAIN):
    """Writes a script that runs train.py after the patch. Returns its path."""
    path = folder / 'patched.py'
    path.write_text(PATCHED.format(script=str(script), patch=patch))
    return path


def test_two_runs_that_save_at_once(run, capsys, monkeypatch):
    """
    Without locks, the second run replaces the temporary file of the first, which must not become a checkpoint
    half-written.
    """
    save, before, best = torch.save, load('out/ckpt.pt'), load('out/ckpt_best.pt')['iter_num']

    def interrupted_save(checkpoint, f):
        save(checkpoint, f)
        os.remove('out/ckpt.pt.tmp')
        with open('out/ckpt.pt.tmp', 'wb') as other:
            other.write(b'half')

    monkeypatch.setattr(torch, 'save', interrupted_save)
    assert write_checkpoint({**before, 'iter_num': 9}, 'out', best=True, required=False)['bytes'] is None
    assert 'another run is writing out/ckpt.pt.tmp' in capsys.readouterr().err
    assert [load(f'out/{name}.pt')['iter_num'] for name in ('ckpt', 'ckpt_best')] == [before['iter_num'], best]
    assert open('out/ckpt.pt.tmp', 'rb').read() == b'half'


def test_a_folder_with_the_name_of_a_temporary_file_costs_no_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        os.makedirs(f'out/{name}.tmp/notes')
    assert write_checkpoint({'a': 1}, 'out', best=True, required=True)['best']
    assert sorted(os.listdir('out')) == ['ckpt.pt', 'ckpt.pt.tmp', 'ckpt_best.pt', 'ckpt_best.pt.tmp']


def test_a_save_without_another_thread(launch, work):
    launch(PROGRAMS / 'no_threads.py', TRAIN, *TINY, nproc=2)
    assert load('out/ckpt.pt')['iter_num'] == 21


def test_a_save_without_memory_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr(torch, 'save', no_memory)
    assert write_checkpoint({}, str(tmp_path), best=True, required=False)['bytes'] is None
    assert '(MemoryError); there is no earlier one, and training continues' in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_names_of_an_earlier_run(run, capsys, monkeypatch):
    """A run from scratch renames the checkpoints in its folder only once its own is written."""
    names = sorted(os.listdir('out'))
    monkeypatch.setattr(out_dir, 'unsaved_runs', {os.path.abspath('out')})
    checkpoint = load('out/ckpt.pt')
    with monkeypatch.context() as context:
        context.setattr(os, 'fsync', lambda fd: os.write(os.open('/dev/full', os.O_WRONLY), b'x'))
        assert write_checkpoint(checkpoint, 'out', best=True, required=False)['bytes'] is None
    assert sorted(os.listdir('out')) == names and 'the earlier one is untouched' in capsys.readouterr().err
    write_checkpoint(checkpoint, 'out', best=True, required=True)
    assert {'ckpt_before.pt', 'ckpt_best_before.pt', 'ckpt.pt', 'ckpt_best.pt'} <= set(os.listdir('out'))


def test_two_runs_in_one_folder_can_both_save(launch, run, tmp_path):
    flags = [*TINY, '--out_dir=both', '--max_iters=60', '--eval_interval=1', '--eval_iters=1', '--lr_decay_iters=60']
    with open(tmp_path / 'output', 'w') as output:
        runs = [launch.start(TRAIN, *flags, stdout=output) for _ in range(2)]
        assert [one.wait() for one in runs] == [0, 0]
    text = (tmp_path / 'output').read_text()
    assert 'WARNING: another run is using out_dir=both' in text and 'could not be saved' not in text
    assert load('both/ckpt.pt')['iter_num'] == 61 and not glob.glob('both/*.tmp')


def test_what_killed_runs_left_is_removed_once_nobody_writes_to_it(launch, run):
    """Only a second run in a folder has names of its own, which no later run would overwrite."""
    left = ['ckpt.pt.12.tmp', 'ckpt_best.pt.12.tmp', 'ckpt_sharded/saving_1', 'ckpt_sharded/saving.12_1']
    kept = ['ckpt.pt.mine.tmp', 'ckpt_sharded/iter_0000002_1']
    code = f'import sys; sys.path.insert(0, {str(NANOGPT)!r}); import out_dir; out_dir.make_out_dir("out", "resume")'

    def start():
        """Returns a process that uses the folder until its input ends."""
        command = [sys.executable, '-c', f'{code}; print(flush=True); sys.stdin.read()']
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        return process

    first = start()
    for name in left + kept:
        os.makedirs(f'out/{name}') if 'sharded' in name else open(f'out/{name}', 'w').close()
    second = start()  # has names of its own
    for other in (first, second):
        start().communicate()
        assert all(os.path.exists(f'out/{name}') for name in left + kept)
        other.communicate()
    start().communicate()
    assert [name for name in left + kept if os.path.exists(f'out/{name}')] == kept


def test_a_link_is_no_reason_to_overwrite_what_it_refers_to(launch, run):
    """It may be another run's checkpoint. If its disk is not mounted, init_from=auto must not start from scratch."""
    os.rename('out', 'other')
    os.mkdir('out')
    os.symlink('../other/ckpt.pt', 'out/ckpt.pt')
    before = (run / 'other' / 'ckpt.pt').read_bytes()
    out = launch(TRAIN, *RESUME, '--n_layer=1').stdout
    assert f'note: out/ckpt.pt is a link to {run}/other/ckpt.pt, which stays as it is' in out and 'iter 5:' in out
    assert load('out/ckpt.pt')['iter_num'] == 6 and (run / 'other' / 'ckpt.pt').read_bytes() == before
    os.symlink('../elsewhere/ckpt.pt', 'out/ckpt.link')
    os.rename('out/ckpt.pt', 'out/ckpt_best.pt')
    os.rename('out/ckpt.link', 'out/ckpt.pt')
    for script, *flags in ((TRAIN, *RESUME, '--n_layer=1', '--init_from=auto'), (SAMPLE,)):
        ended = launch(script, *flags, check=False)
        says = f'error: out/ckpt.pt is a link to {run}/elsewhere/ckpt.pt, which does not exist: is its disk mounted?\n'
        assert ended.returncode == 2 and ended.stderr == says
    os.symlink('nowhere', 'linked')
    ended = launch(TRAIN, *TINY, '--out_dir=linked', check=False)
    says = f'error: out_dir=linked cannot be used: it is a link to {run}/nowhere, which does not exist\n'
    assert ended.returncode == 2 and ended.stderr == says


def test_a_folder_of_the_users_is_no_checkpoint(launch, run):
    shutil.copytree('out', 'out/ckpt_copy')
    assert 'Resuming training from out/ckpt.pt' in launch(TRAIN, *RESUME, '--n_layer=1').stdout


def test_a_folder_that_was_deleted_is_made_again(launch, run):
    script = patched(
        run,
        'from step_guard import StepGuard\nstep = StepGuard.step\n'
        "StepGuard.step = lambda *args: (shutil.rmtree('gone', ignore_errors=True), step(*args))",
    )
    ended = launch(script, *TINY, '--out_dir=gone', '--max_iters=3', '--json_log=False')
    assert load('gone/ckpt.pt')['iter_num'] == 4 and ended.stderr == ''


@pytest.mark.parametrize('folder, flags', [('nanoGPT', []), ('phase3_fsdp', ['--ckpt_format=sharded'])])
def test_a_working_folder_that_was_deleted_is_made_again(launch, run, folder, flags):
    """out_dir is relative to it. The user may have made a new one of the same name meanwhile."""
    os.makedirs('project/data')
    shutil.copytree('data/letters', 'project/data/letters')
    patch = (
        'from step_guard import StepGuard\nstep = StepGuard.step\n'
        'def deleting_step(*args):\n'
        '    if os.environ["RANK"] == "0" and os.path.exists("data"): shutil.rmtree(here); os.mkdir(here)\n'
        '    step(*args)\n'
        'here, StepGuard.step = os.getcwd(), deleting_step'
    )
    script = patched(run, patch, ROOT / folder / 'train.py')
    ended = launch(script, *TINY, *flags, '--max_iters=3', nproc=2, cwd=run / 'project')
    assert ended.stderr == '' and log_of('project/out')['run']['status'] == 'completed'
    assert os.path.exists('project/out/ckpt_sharded/latest' if flags else 'project/out/ckpt.pt')


def test_a_save_that_fails_is_no_best_one(launch, run):
    """The evaluations see 3.0, 2.0 and 2.5. The save of 2.0 fails, so 2.5 is the best on the disk."""
    patch = (
        'import itertools\nimport checkpoint, distributed\n'
        'numbers = iter([9, 9, 3.0, 3.0, 2.0, 2.0, 2.5, 2.5])\nsaves = itertools.count(1)\n'
        'save, mean = torch.save, distributed.mean_over_ranks\n'
        'def fail(*args):\n    if next(saves) == 2: raise RuntimeError\n    save(*args)\n'
        'torch.save = fail\n'
        'def mean_over_ranks(x):\n    import inspect\n'
        "    evaluating = inspect.stack()[1].function == 'estimate_loss'\n"
        '    return mean(x) * 0 + next(numbers) if evaluating else mean(x)\n'
        'distributed.mean_over_ranks = mean_over_ranks'
    )
    ended = launch(patched(run, patch), *TINY, '--max_iters=6', '--eval_interval=2', '--out_dir=new')
    assert 'new/ckpt.pt could not be saved (RuntimeError); ' in ended.stderr
    assert (
        ended.stderr.count('WARNING: ') == 1 and 'the earlier one is untouched, and training continues' in ended.stderr
    )
    best = load('new/ckpt_best.pt')
    assert best['iter_num'] == 6 and best['best_val_loss'] == 2.5
    records = log_of('new')['checkpoints']
    assert [(r['iter'], r['best'], r['bytes'] is None) for r in records[:3]] == [
        (2, True, False),
        (4, False, True),
        (6, True, False),
    ]


def test_a_save_may_take_longer_than_dist_timeout(launch, run):
    script = patched(
        run,
        'save = torch.save\n'
        'torch.save = lambda *args, **options: (time.sleep(0 if options else 4), save(*args, **options))',
    )
    ended = launch(script, *TINY, '--out_dir=new', '--max_iters=2', '--dist_timeout=2', nproc=2)
    assert load('new/ckpt.pt')['iter_num'] == 3 and ended.stderr == ''


def test_only_the_best_is_left(launch, run):
    os.remove('out/ckpt.pt')
    out = launch(TRAIN, *RESUME, '--n_layer=1', '--init_from=auto').stdout
    assert 'out/ckpt.pt is missing, so out/ckpt_best.pt takes its place' in out and 'iter 4:' in out


@pytest.mark.parametrize(
    'prepare, out_dir, message',
    [
        (lambda: open('occupied', 'w').close(), 'occupied', 'occupied is not a folder'),
        (lambda: (os.remove('out/ckpt.pt'), os.mkdir('out/ckpt.pt')), 'out', 'out/ckpt.pt is a folder'),
        (
            lambda: (shutil.rmtree('out'), os.mkdir('out'), os.symlink('ckpt.pt', 'out/ckpt.pt')),
            'out',
            'Too many levels of symbolic links',
        ),
        (lambda: open('out/ckpt.pt', 'w').close(), 'out', 'Other checkpoints there: ckpt_best.pt'),
        (lambda: shutil.rmtree('out'), 'out', 'train first'),
    ],
)
def test_read_errors_are_named(launch, run, prepare, out_dir, message):
    prepare()
    ended = launch(SAMPLE, f'--out_dir={out_dir}', check=False)
    assert ended.returncode == 2 and message in ended.stderr and acceptable(2, ended.stderr), ended.stderr


def test_a_named_pipe_is_a_message(launch, run):
    """Opening it would wait for its writer."""
    checkpoint = load('out/ckpt.pt')
    for name in ('ckpt.pt', 'ckpt_best.pt'):
        os.remove(f'out/{name}')
        os.mkfifo(f'out/{name}')
    with pytest.raises(UserError, match='out/ckpt.pt cannot be read: not a regular file'):
        load_checkpoint('out/ckpt.pt')
    assert write_checkpoint(checkpoint, 'out', best=False, required=True)['bytes']
    launch(TRAIN, *RESUME, '--n_layer=1')


def test_an_unreadable_folder_is_one_message(launch, run):
    """With init_from=auto it must not start from scratch. root may read everything, so the system call is replaced."""
    patch = (
        'listdir = os.listdir\n'
        'def denied(path):\n    if path == "out": raise PermissionError(13, "Permission denied", path)\n'
        '    return listdir(path)\nos.listdir = denied'
    )
    for flags in (RESUME, ['--init_from=auto', '--n_layer=1']):
        ended = launch(patched(run, patch), *flags, check=False)
        assert ended.returncode == 2 and ended.stderr == 'error: out_dir=out cannot be read: Permission denied\n'


def test_a_checkpoint_of_another_name(launch, run):
    ended = launch(SAMPLE, '--ckpt=ckpt_last.pt', check=False)
    assert 'the checkpoints there are ckpt.pt, ckpt_best.pt' in ended.stderr and ended.returncode == 2


def test_the_smallest_temperature_takes_the_likeliest(launch, run):
    flags = ['--start=0', '--num_samples=1', '--max_new_tokens=20', '--device=cpu']
    coldest = launch(SAMPLE, *flags, '--temperature=0').stdout
    for temperature in ('1e-45', '1e-30', '1e-8'):
        assert launch(SAMPLE, *flags, f'--temperature={temperature}').stdout == coldest


@pytest.mark.parametrize('folder, nproc', [('nanoGPT', 1), ('phase1_zero1', 2), ('phase3_fsdp', 2)])
def test_a_model_with_nothing_but_nanogpts_interface(launch, run, folder, nproc):
    flags = [*TINY, f'--model_dir={ROOT / "tests" / "plain_model"}', '--out_dir=plain', '--peak_tflops=1']
    script = ROOT / folder / 'train.py'
    launch(script, *flags, '--max_iters=7', nproc=nproc)
    out = launch(script, *flags, '--max_iters=16', '--init_from=resume', nproc=nproc).stdout
    mfu = log_of('plain')['iterations'][-1]
    parameters = 2 * 40 * 32 + 2 * 32 * 32  # embeddings, head and two blocks
    expected = 6 * parameters * 16 * 8 / nproc / (mfu['time_ms'] / 1000) / 1e12
    assert 'iter 16:' in out and mfu['mfu'] == pytest.approx(expected, rel=1e-3)  # the logged time is rounded
