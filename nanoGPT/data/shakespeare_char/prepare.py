"""
Prepares tiny Shakespeare, one token per character.

    python data/shakespeare_char/prepare.py [--input FILE]

Downloads input.txt (1.1 MB) once, checks its SHA-256, and writes train.bin (the first 90%), val.bin and meta.pkl next
to this file.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from prepare_common import SHAKESPEARE_URL, tiny_shakespeare, write_char_dataset

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--input', metavar='FILE', help='use this file instead of a download; another text is accepted with a note'
    )
    parser.add_argument('--url', default=SHAKESPEARE_URL, help='a mirror of input.txt')
    args = parser.parse_args()
    text = tiny_shakespeare(HERE, args.input, args.url)
    n = int(len(text) * 0.9)
    write_char_dataset(HERE, text[:n], text[n:], sorted(set(text)))
