"""
Prepares tiny Shakespeare in GPT-2 tokens, for finetuning.

    python data/shakespeare/prepare.py [--input FILE]

Downloads input.txt (1.1 MB) once, checks its SHA-256, and writes train.bin (the first 90%) and val.bin next to this
file.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from prepare_common import SHAKESPEARE_URL, DatasetWriter, gpt2_encode, gpt2_encoding, tiny_shakespeare

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--input', metavar='FILE', help='use this file instead of a download; another text is accepted with a note'
    )
    parser.add_argument('--url', default=SHAKESPEARE_URL, help='a mirror of input.txt')
    args = parser.parse_args()
    gpt2_encoding()  # report its errors first
    text = tiny_shakespeare(HERE, args.input, args.url)
    n = int(len(text) * 0.9)
    with DatasetWriter(HERE) as out:
        out.write('train', gpt2_encode(text[:n]))
        out.write('val', gpt2_encode(text[n:]))
        out.documents, out.characters = 1, len(text)
        out.commit()
