"""
The diff is the documentation: files that a phase does not change are byte-identical to nanoGPT/'s, and the diffs are
small.
"""

import difflib
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NANOGPT = ROOT / 'nanoGPT'
PHASES = {path.name: path for path in ROOT.glob('phase*_*') if (path / 'train.py').exists()}
# the one file each phase changes
CHANGES = {'phase1_zero1': 'train.py', 'phase2_triton': 'model.py', 'phase3_fsdp': 'train.py'}


def common_files():
    """Returns the names that `make sync` copies, and the two files that a phase may change."""
    not_copied = re.search(r'^NOT_COPIED := (.*)$', (ROOT / 'Makefile').read_text(), re.M)[1].split()
    return [p.name for p in NANOGPT.glob('*.py') if p.name not in not_copied] + ['config', 'model.py', 'train.py']


def test_fsdp_has_a_copy_of_the_reference_trainer():
    assert (ROOT / 'phase3_fsdp' / 'train_ddp.py').read_bytes() == (NANOGPT / 'train.py').read_bytes(), 'make sync'


@pytest.mark.parametrize('phase', PHASES)
def test_unchanged_files_are_identical(phase):
    for name in common_files():
        if name == CHANGES[phase]:
            continue
        theirs, ours = PHASES[phase] / name, NANOGPT / name
        pairs = [(theirs / p.name, p) for p in ours.glob('*.py')] if ours.is_dir() else [(theirs, ours)]
        for a, b in pairs:
            assert a.read_bytes() == b.read_bytes(), f'{a} differs from {b}: make sync'
    assert os.readlink(PHASES[phase] / 'data') == '../nanoGPT/data'


@pytest.mark.parametrize('phase', PHASES)
def test_the_changed_file_is_a_small_diff(phase):
    """At most the contract's scale and a quarter: 30, 60 and 120 lines, a changed line counting once."""
    name = CHANGES[phase]
    old, new = ((folder / name).read_text().splitlines() for folder in (NANOGPT, PHASES[phase]))
    changed = sum(
        max(b - a, d - c)
        for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if tag != 'equal'
    )
    assert 0 < changed <= 1.25 * {'phase1_zero1': 30, 'phase2_triton': 60, 'phase3_fsdp': 120}[phase]
