"""
Prepares your own text: .txt files (one document each), .jsonl files (one document per line) and .parquet files (one
document per row), also compressed (.gz, .bz2, .xz, .zst).

    python data/text/prepare.py FILE_OR_FOLDER ... [--encoding gpt2|char|byte] [--field text] [--val_fraction 0.1]
                                                   [--out data/text]
    python data/text/prepare.py stories.txt --separator '<|endoftext|>'     # a .txt file with many documents

gpt2: GPT-2's vocabulary, <|endoftext|> after each document. char: one token per character, with the characters of the
files as vocabulary (read twice). byte: one token per byte of UTF-8. char and byte end each document with a newline.
Files of any size are read in pieces. val gets whole documents, taken evenly from all files; with too few documents, val
is the end of the text.

    python data/text/prepare.py FILE_OR_FOLDER ... --shards [--shard_tokens 100000000] [--val_fraction 0.1]
                                                   [--out FOLDER]

writes shards in llm.c's format instead (text_train_000001.bin, ...), in GPT-2's vocabulary, <|endoftext|> before each
document. The first tokens are the validation shard. After an interruption, the same command continues after the last
complete shard.
"""

import argparse
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from errors import UserError  # isort: skip  first: it also reports a missing package

import numpy as np

from prepare_common import (
    DatasetWriter,
    char_encoder,
    char_meta,
    dtype_for,
    encode_documents,
    gpt2_encode_pieces,
    gpt2_encoding,
    progress,
)
from shard_writer import write_shards
from text_reader import TextReader


def write_pair(reader, encoding, val_fraction, out_dir):
    """Writes train.bin and val.bin, and meta.pkl for characters and bytes."""
    end, dtype, meta = '\n', 'uint16', None
    if encoding == 'gpt2':
        encode, end = gpt2_encode_pieces, None
    elif encoding == 'byte':
        meta = {'vocab_size': 256, 'encoding': 'byte'}
        encode = lambda pieces: np.frombuffer(''.join(pieces).encode(), np.uint8)
    else:
        chars = {'\n'}
        for _, pieces in reader.documents(progress('vocabulary', reader.bytes)):
            for piece in pieces:
                chars.update(piece)
        encode, meta, dtype = char_encoder(sorted(chars)), char_meta(sorted(chars)), dtype_for(len(chars))
    with DatasetWriter(out_dir, dtype) as out:
        documents = reader.documents(progress('encoding', reader.bytes))
        encode_documents(out, documents, encode, end, val_fraction)
        reader.report_documents()
        out.commit(meta)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('inputs', nargs='+', metavar='FILE_OR_FOLDER', help='text to read, with subfolders')
    parser.add_argument(
        '--encoding', choices=('gpt2', 'char', 'byte'), default='gpt2', help='see above (default: gpt2)'
    )
    parser.add_argument(
        '--field',
        default='text',
        help='field of .jsonl and column of .parquet files that holds the text (default: text)',
    )
    parser.add_argument(
        '--separator', default='', metavar='TEXT', help="text between documents in .txt files, such as '<|endoftext|>'"
    )
    parser.add_argument('--shards', action='store_true', help="write shards in llm.c's format, in GPT-2's vocabulary")
    parser.add_argument('--shard_tokens', type=int, default=100_000_000, help='tokens per shard (default: 100,000,000)')
    parser.add_argument('--val_fraction', type=float, default=0.1, help='share of the text for val (default: 0.1)')
    parser.add_argument(
        '--out', metavar='FOLDER', default=HERE, help='where to write the data set (default: next to this script)'
    )
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val_fraction {args.val_fraction} is not between 0 and 1')
    if args.shards and args.encoding != 'gpt2':
        raise UserError(f'--shards writes GPT-2 tokens, but the encoding is {args.encoding}: leave out one of the two')
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(f'--shard_tokens {args.shard_tokens} is not between 2 and 2,147,483,647')
    reader = TextReader(args.inputs, args.field, args.separator)
    reader.report()

    if args.encoding == 'gpt2':
        gpt2_encoding()  # report its errors first
    if args.shards:
        write_shards(reader, args.out, 'text', args.shard_tokens, args.val_fraction)
    else:
        write_pair(reader, args.encoding, args.val_fraction, args.out)
