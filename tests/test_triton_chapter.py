"""
phase2_triton/IMPLEMENTATION.md embeds the diff of model.py, one block per hunk, and code of the kernels. They must
equal the files, and its pictures must show the numbers of the result files. After a change of either:

    python tests/test_triton_chapter.py    # rewrites the chapter's blocks and the pictures; new hunks still need a text
"""

import ast
import difflib
import re
import sys

from conftest import ROOT

sys.path.append(str(ROOT / 'docs' / 'pictures'))
import triton_pictures

CHAPTER = ROOT / 'phase2_triton' / 'IMPLEMENTATION.md'
DIFF = re.compile(r'```diff\n(.*?)```\n', re.S)
CODE = re.compile(r'(<!-- code: (\S+) (\w+) -->\n```python\n)(.*?)(```\n)', re.S)


def hunks():
    """The hunks of `diff -U1 nanoGPT/model.py phase2_triton/model.py`, each with its @@ line."""
    before, after = (
        (ROOT / folder / 'model.py').read_text().splitlines(True) for folder in ('nanoGPT', 'phase2_triton')
    )
    lines = list(difflib.unified_diff(before, after, n=1))[2:]
    starts = [i for i, line in enumerate(lines) if line.startswith('@@')]
    return [''.join(lines[start:end]) for start, end in zip(starts, [*starts[1:], None])]


def function(file, name):
    """The source of a function of phase2_triton/, with its decorators."""
    text = (ROOT / 'phase2_triton' / file).read_text()
    node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name)
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return '\n'.join(text.splitlines()[start - 1 : node.end_lineno]) + '\n'


def outdated(text):
    """What the chapter's text shows differently from the files."""
    found = [f'{file} {name}' for _, file, name, code, _ in CODE.findall(text) if code != function(file, name)]
    return found + ['diff of model.py'] * (DIFF.findall(text) != hunks())


def updated(text):
    """
    The chapter with the code and the hunks of today. Each block gets the most similar hunk; those left follow the one
    before.
    """
    text = CODE.sub(lambda m: m[1] + function(m[2], m[3]) + m[5], text)
    new, first = hunks(), DIFF.search(text).start()
    blocks = [block.split('\n', 1)[1] for block in DIFF.findall(text)]
    taken, i = [], 0
    for n, block in enumerate(blocks):  # in order, and one left for each block that follows
        choices = range(i, len(new) - (len(blocks) - n - 1))
        best = max(choices, key=lambda c: difflib.SequenceMatcher(None, block, new[c].split('\n', 1)[1]).ratio())
        taken.append(best)
        i = best + 1
    ends = [*taken[1:], len(new)]
    starts = [0, *taken[1:]]
    groups = iter(''.join(f'```diff\n{hunk}```\n' for hunk in new[s:e]) for s, e in zip(starts, ends))
    return text[:first] + DIFF.sub(lambda m: next(groups), text[first:])


def stale_pictures():
    return [
        name
        for name, (collect, _) in triton_pictures.PICTURES.items()
        if triton_pictures.digest(collect()) not in (triton_pictures.HERE / name).read_text()
    ]


def test_the_chapter_shows_the_files():
    assert outdated(CHAPTER.read_text()) == [], 'run: python tests/test_triton_chapter.py'


def test_the_check_can_fail_and_the_command_repairs():
    text = CHAPTER.read_text()
    bad = text.replace('+from kernels.', '+from colonels.', 1).replace('tl.load(x_ptr', 'tl.load(y_ptr', 1)
    assert outdated(bad) == ['kernels/gelu.py forward_kernel', 'diff of model.py']
    assert updated(bad) == text == updated(text)
    blocks = DIFF.findall(text)
    assert outdated(updated(text.replace(f'```diff\n{blocks[3]}```\n', ''))) == []  # a hunk without a text of its own


def test_pictures_show_the_result_files():
    assert stale_pictures() == [], 'run: python tests/test_triton_chapter.py'
    for name in triton_pictures.PICTURES:
        assert (triton_pictures.HERE / name).stat().st_size < 200_000


if __name__ == '__main__':
    CHAPTER.write_text(updated(CHAPTER.read_text()))
    triton_pictures.main()
