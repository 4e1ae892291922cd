"""The chapters show today's diffs, code and numbers; their pictures can be drawn; tests grade the exercises."""

import importlib
import shutil
import sys

import pytest

from conftest import ROOT

sys.path += [str(ROOT), *(str(ROOT / name) for name in ('docs', 'docs/pictures', 'exercises'))]
import embed_diffs
import make
import triton_pictures
from planner import memory
from planner.gpus import GPUS
from planner.run import Run

PICTURES = ('who_holds_what', 'all_reduce', 'step_memory', 'overlap', 'timeline', 'activations')
GRADERS = {  # a program that grades the exercise, its arguments, its number of ranks, and what it prints at the end
    'zero1': ('zero1_cases.py', ['few_tensors'], 4, '"equal": true'),
    'fsdp': ('fsdp_first_weights.py', ['phase3_fsdp'], 3, 'equal\n'),
    'gelu': ('run_pytest.py', ['-q', 'tests/kernels/test_gelu.py', '-k', 'more_than_a_program'], 1, '1 passed'),
}


@pytest.mark.parametrize('chapter', embed_diffs.CHAPTERS)
def test_a_chapter_shows_the_files(chapter):
    text = (ROOT / chapter).read_text()
    assert embed_diffs.updated(chapter, text) == text, 'run: python docs/embed_diffs.py'


def test_embedding_replaces_hunks_and_functions_and_notices_a_new_hunk():
    text = 'One\n```diff\n@@ a\n-1\n@@ b\n+2\n```\nTwo\n```diff\n@@ c\n```\n'
    new = ['@@ d\n', '@@ e\n', '@@ f\n+3\n']
    assert embed_diffs.with_hunks(text, new) == 'One\n```diff\n@@ d\n@@ e\n```\nTwo\n```diff\n@@ f\n+3\n```\n'
    with pytest.raises(ValueError, match='4 hunks, the blocks have 3'):
        embed_diffs.with_hunks(text, [*new, '@@ g\n'])
    triton = 'phase2_triton/IMPLEMENTATION.md'
    text = (ROOT / triton).read_text()
    changed = text.replace('tl.load(x_ptr', 'tl.load(y_ptr', 1)
    assert changed != text == embed_diffs.updated(triton, changed)


@pytest.mark.parametrize('name', PICTURES)
def test_a_picture_is_drawn_and_small(name, tmp_path):
    """200 kB: a page with five of them loads within a second on a slow line."""
    importlib.import_module(name).draw(tmp_path / f'{name}.svg')
    for path in (tmp_path / f'{name}.svg', ROOT / 'docs/pictures' / f'{name}.svg'):
        assert 1000 < path.stat().st_size < 200_000


def test_pictures_of_the_triton_chapter_show_the_result_files():
    assert triton_pictures.outdated() == [], 'run: python docs/pictures/triton_pictures.py'
    for name in triton_pictures.PICTURES:
        assert (triton_pictures.HERE / name).stat().st_size < 200_000


def test_a_timeline_is_sorted_out_and_drawn(tmp_path, monkeypatch):
    """Made-up kernels of two GPUs, in microseconds: a gap of 5 us does not show, one of 20 us does."""
    record, timeline = importlib.import_module('record'), importlib.import_module('timeline')
    kernels = [
        ('embedding', 100.0, 200.0),
        ('cudnn_sdpa_flash_fprop', 205.0, 300.0),
        ('ncclDevKernel_AllGather_RING_LL', 150.0, 400.0),
        ('cross_entropy_kernel', 320.0, 400.0),
        ('nvjet', 400.0, 900.0),
        ('ncclDevKernel_ReduceScatter_Sum_f32_RING_LL', 500.0, 950.0),
        ('multi_tensor_apply_kernel LpNormFunctor', 960.0, 970.0),
        ('FusedAdamMathFunctor', 970.0, 1000.0),
    ]
    gpu = record.sorted_out(kernels, start=100.0)
    assert gpu['forward'] == [[0.0, 0.2]] and gpu['backward'] == [[0.22, 0.8]] and gpu['optimizer'] == [[0.86, 0.9]]
    assert gpu['communication'] == [['AllGather', 0.05, 0.3], ['ReduceScatter', 0.4, 0.85]]
    assert gpu['attention'] == [[0.105, 0.2]]
    record.write({'ddp': [gpu, gpu], 'fsdp': [gpu, gpu]}, tmp_path / 'timeline.json')
    monkeypatch.setattr(timeline, 'FOLDER', tmp_path)
    timeline.draw(tmp_path / 'timeline.svg')
    assert (tmp_path / 'timeline.svg').stat().st_size > 1000


def test_derived_activations_are_the_planners_and_the_measured_peak():
    """0.1%: torch rounds each tensor to 512 bytes, which matters for the smallest batch only."""
    activations = importlib.import_module('activations')
    assert activations.table() in (ROOT / 'docs/activations.md').read_text()
    for sequences in (1, 12, 32):
        derived = sum(activations.parts(sequences).values())
        assert derived == pytest.approx(activations.measured(sequences), rel=1e-3)
        assert derived == pytest.approx(planned(sequences), rel=1e-9)


def planned(sequences):
    """Returns the planner's bytes of all tensors at the peak of the same run."""
    run = Run(GPUS['h200'], 1, 12, 12, 768, sequences, 1024, micro_steps=2, graphs=False)
    return sum(memory.tensors(run).values())


@pytest.mark.parametrize('name', make.EXERCISES)
def test_an_exercise_fails_until_it_is_solved(name, launch, launch_interpreted, tmp_path):
    folder = tmp_path / name
    exercise = make.make(name, folder)
    assert (folder / exercise.file).read_text().count('EXERCISE: ') == len(exercise.blanks)
    program, args, nproc, end = GRADERS[name]
    grade = launch_interpreted if name == 'gelu' else launch
    command, run = (folder / 'tests/programs' / program, *args), dict(nproc=nproc, cwd=folder)
    blank = grade(*command, **run, check=False)
    assert blank.returncode != 0 and 'NotImplementedError' in blank.stdout + blank.stderr
    shutil.copy(ROOT / exercise.file, folder / exercise.file)
    assert end in grade(*command, **run).stdout
    with pytest.raises(FileExistsError):
        make.make(name, folder)  # the reader's solution is not overwritten


def test_a_blank_whose_lines_are_not_there_is_an_error():
    with pytest.raises(ValueError, match='2 lines start with'):
        make.blanked('a = 1\na = 2\nb = 1\n', make.Blank('a =', 'b =', 'task'))
    assert make.blanked('if x:\n    a = 1\n    b = 2\nc\n', make.Blank('a =', 'b =', 'task')) == (
        "if x:\n    # EXERCISE: task\n    raise NotImplementedError('exercise')\nc\n"
    )
