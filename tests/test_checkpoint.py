"""
Checkpoints: any change of a byte or of a field is noticed, names of other versions are understood, and a save loses nothing.
"""

import json
import shutil

import pytest

from checkpoint_changes import changes, representatives
from conftest import NANOGPT, ROOT, TINY, load, make_letters

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
    """Asserts that the script accepts each changed checkpoint or ends with one message. Returns how many it accepted."""
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


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_changed_field_is_accepted_or_named(launch, run, name):
    found = changes(load('out/ckpt.pt'))
    numbers = representatives(found, READERS)
    if name == 'sample':  # which looks at nothing else
        numbers = [n for n in numbers if found[n][0][0] not in ('optimizer', 'resume')][::2]
    script, flags = SCRIPTS[name]
    accepted = run_changed(launch, script, numbers, flags)
    assert 0.05 * len(numbers) < accepted < 0.95 * len(numbers)  # it neither refuses all nor looks at none


@pytest.mark.full
@pytest.mark.parametrize('folder', ['nanoGPT', 'phase1_zero1', 'phase3_fsdp'])
@pytest.mark.parametrize('name', SCRIPTS)
def test_every_changed_field_is_accepted_or_named(launch, run, folder, name):
    script, flags = SCRIPTS[name]
    run_changed(launch, ROOT / folder / script.name, list(range(len(changes(load('out/ckpt.pt'))))), flags)
