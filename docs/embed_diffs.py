"""
Keeps the diffs in the chapters equal to the files. A chapter shows every hunk of its diff, in order, in ```diff blocks; the
text between the blocks explains them.

    python docs/embed_diffs.py       # after a change of a train.py: writes the new hunks into the same blocks
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {  # chapter: the file that its folder changes
    'phase1_zero1/IMPLEMENTATION.md': 'train.py',
    'phase3_fsdp/IMPLEMENTATION.md': 'train.py',
}
BLOCK = re.compile(r'^```diff\n(.*?)^```$', re.M | re.S)


def hunks_of(diff: str) -> list[str]:
    return re.split(r'^(?=@@ )', diff, flags=re.M)[1:]


def diff_of(chapter: str) -> list[str]:
    """Returns the hunks of `diff -u` between the reference's file and the one that the chapter explains."""
    name = CHAPTERS[chapter]
    files = [str(ROOT / 'nanoGPT' / name), str((ROOT / chapter).parent / name)]
    return hunks_of(subprocess.run(['diff', '-u', *files], capture_output=True, text=True).stdout)


def rewrite(text: str, hunks: list[str]) -> str:
    """Returns a chapter's text with these hunks in its blocks, as many in each as before. Raises ValueError if the counts differ."""
    counts = [len(hunks_of(block)) for block in BLOCK.findall(text)]
    if sum(counts) != len(hunks):
        raise ValueError(f'the diff has {len(hunks)} hunks, the blocks have {sum(counts)}: change a block by hand')
    left = iter(hunks)
    return BLOCK.sub(lambda match: f'```diff\n{"".join(next(left) for _ in hunks_of(match[1]))}```', text)


def main():
    for chapter in CHAPTERS:
        path = ROOT / chapter
        try:
            path.write_text(rewrite(path.read_text(), diff_of(chapter)))
        except ValueError as error:
            sys.exit(f'{chapter}: {error}')


if __name__ == '__main__':
    main()
