"""
Keeps the diffs and the code in the chapters equal to the files. A chapter shows every hunk of its diff, in order, in
```diff blocks, and the text between the blocks explains them. A ```python block below `<!-- code: FILE FUNCTION -->`
shows a function.

    python docs/embed_diffs.py       # after a change of a train.py, a model.py or a kernel: rewrites the blocks
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {  # chapter: (the file that its folder changes, lines of context in a hunk)
    'phase1_zero1/IMPLEMENTATION.md': ('train.py', 3),
    'phase2_triton/IMPLEMENTATION.md': ('model.py', 1),
    'phase3_fsdp/IMPLEMENTATION.md': ('train.py', 3),
}
DIFF = re.compile(r'^```diff\n(.*?)^```$', re.M | re.S)
CODE = re.compile(r'(<!-- code: (\S+) (\w+) -->\n```python\n)(.*?)(^```$)', re.M | re.S)


def hunks_of(diff: str) -> list[str]:
    return re.split(r'^(?=@@)', diff, flags=re.M)[1:]


def diff_of(chapter: str) -> list[str]:
    """Returns the hunks of the diff between the reference's file and the one that the chapter explains."""
    name, context = CHAPTERS[chapter]
    files = [str(folder / name) for folder in (ROOT / 'nanoGPT', (ROOT / chapter).parent)]
    return hunks_of(subprocess.run(['diff', f'-U{context}', *files], capture_output=True, text=True).stdout)


def with_hunks(text: str, hunks: list[str]) -> str:
    """
    Returns a chapter's text with these hunks in its blocks, as many in each as before. Raises ValueError if the total
    differs.
    """
    counts = [len(hunks_of(block)) for block in DIFF.findall(text)]
    if sum(counts) != len(hunks):
        raise ValueError(
            f'the diff has {len(hunks)} hunks, the blocks have {sum(counts)}: a line @@ in a block makes room for one'
        )
    left = iter(hunks)
    return DIFF.sub(lambda match: f'```diff\n{"".join(next(left) for _ in hunks_of(match[1]))}```', text)


def source_of(path: Path, name: str) -> str:
    """Returns the source of a function, with its decorators."""
    text = path.read_text()
    node = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name)
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return '\n'.join(text.splitlines()[start - 1 : node.end_lineno]) + '\n'


def updated(chapter: str, text: str) -> str:
    """Returns the chapter's text with today's hunks and functions. Raises ValueError as with_hunks does."""
    folder = (ROOT / chapter).parent
    text = CODE.sub(lambda match: match[1] + source_of(folder / match[2], match[3]) + match[5], text)
    return with_hunks(text, diff_of(chapter))


def main():
    for chapter in CHAPTERS:
        path = ROOT / chapter
        try:
            path.write_text(updated(chapter, path.read_text()))
        except ValueError as error:
            sys.exit(f'{chapter}: {error}')


if __name__ == '__main__':
    main()
