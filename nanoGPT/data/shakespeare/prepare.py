"""
Prepares tiny Shakespeare in GPT-2 tokens, for finetuning.

    python data/shakespeare/prepare.py [--input FILE]

Downloads input.txt (1.1 MB) once, checks its SHA-256, and writes train.bin (the first 90%) and val.bin next to this
file.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from prepare_common import DatasetWriter, gpt2_encode, gpt2_encoding, parse_shakespeare_arguments, tiny_shakespeare

if __name__ == '__main__':
    args = parse_shakespeare_arguments(__doc__)
    gpt2_encoding()  # report its errors first
    text = tiny_shakespeare(HERE, args.input, args.url)
    n = int(len(text) * 0.9)
    with DatasetWriter(HERE) as out:
        out.write('train', gpt2_encode(text[:n]))
        out.write('val', gpt2_encode(text[n:]))
        out.documents, out.characters = 1, len(text)
        out.commit()
