"""
Prepares the built-in data set: the standard library of the running Python, one token per character. No download.

    python data/python_char/prepare.py

Writes train.bin, val.bin and meta.pkl next to this file. The vocabulary is fixed (newline is 0, then printable ASCII
from ' ' = 1 to '~' = 95), so that ids mean the same everywhere. The text depends only on the Python version. val is a
tenth of the modules, each whole, taken evenly from the whole library.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from prepare_common import PYTHON_CHARS, assign_splits, stdlib_sources, write_char_dataset

if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    texts = stdlib_sources()
    parts = {'train': [], 'val': []}
    for split, text in assign_splits(((len(text), text) for text in texts), val_fraction=0.1):
        parts[split].append(text)
    print(
        f'Python {sys.version.split()[0]}: {len(texts)} modules, {sum(map(len, texts)):,} characters; '
        f'{len(parts["val"])} modules for val'
    )
    write_char_dataset(HERE, ''.join(parts['train']), ''.join(parts['val']), PYTHON_CHARS, documents=len(texts))
