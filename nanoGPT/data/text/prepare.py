"""
Your own text: .txt files (a document each), .jsonl files (a document per line) and .parquet files (a document per row).

    python data/text/prepare.py FILE_OR_FOLDER ... [--encoding gpt2|char|byte] [--field text] [--val_fraction 0.1] [--out data/text]

gpt2 is GPT-2's vocabulary, <|endoftext|> after each document. char is one token per character, its vocabulary the characters of
the files (read twice); byte is one token per byte of UTF-8: both end each document with a newline. Files of any size are read in
pieces. Whole documents go to val, taken evenly from all over the files; where there are too few for that, val is the end.
"""

import argparse
import codecs
import io
import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from prepare_common import (
    GROUP,
    DatasetWriter,
    UserError,
    char_encoder,
    char_meta,
    dtype_for,
    encode_documents,
    gpt2_encode_pieces,
    gpt2_encoding,
    progress,
)


def find_files(inputs):
    """The .txt, .jsonl and .parquet files of a list of files and folders: a sorted list of paths, each once."""
    paths = []
    for name in inputs:
        if os.path.isdir(name):
            paths += files_below(name)
        elif not os.path.exists(name):
            raise UserError(f'{name} does not exist')
        elif not _kind(name):
            raise UserError(f'{name} is no .txt, .jsonl or .parquet file (rename it, if it is one)')
        else:
            paths.append(name)
    if not paths:
        raise UserError(f'there are no .txt, .jsonl or .parquet files in {", ".join(inputs)}')
    return sorted({os.path.realpath(path): path for path in paths}.values())


def files_below(top):
    """Links to folders are followed, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=unreadable):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(folder, name)) for name in folders)
        yield from (
            path for file in files if _kind(file) and os.path.exists(path := os.path.join(folder, file))
        )  # not a link to nowhere


def unreadable(error):
    raise UserError(f'cannot read {error.filename}: {error.strerror}')


def _kind(path):
    extension = os.path.splitext(path)[1].lower()
    return extension if extension in ('.txt', '.jsonl', '.parquet') else None


def read_documents(paths, field, update):
    """Yields (size in bytes, iterable of str) for each document; update is called with the bytes read. UserError for bad input."""
    readers = {'.txt': read_txt, '.jsonl': read_jsonl, '.parquet': read_parquet}
    for path in paths:
        try:
            yield from readers[_kind(path)](path, field, update)
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror or error}') from error


def read_txt(path, field, update):
    if size := os.path.getsize(path):
        yield size, read_pieces(path, update)


def read_pieces(path, update):
    """
    A text file in pieces of about GROUP characters, with '\\n' for every kind of line end. A piece ends after a letter and before a
    blank, where GPT-2's tokens end anyway, so that the pieces' tokens are the file's.
    """
    decoder = codecs.getincrementaldecoder('utf-8-sig')()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position, rest = 0, ''
    with open(path, 'rb') as f:
        while True:
            block = f.read(GROUP)
            try:
                text = rest + newlines.decode(decoder.decode(block, final=not block), final=not block)
            except UnicodeDecodeError as error:
                position += (
                    len(block) - len(error.object) + error.start
                )  # its object starts with what the decoder had kept
                byte = error.object[error.start]
                raise UserError(
                    f'{path} is not UTF-8 text: byte {position:,} is 0x{byte:02x}. Convert it: iconv -t UTF-8'
                ) from None
            if not block:
                break
            position += len(block)
            update(len(block))
            cut = len(text) - 1
            while cut > 0 and not (text[cut] in ' \n' and not text[cut - 1].isspace()):
                cut -= 1
            cut = cut if cut > 0 else len(text)
            yield text[:cut]
            rest = text[cut:]
    if text:
        yield text


def read_jsonl(path, field, update):
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            update(len(line))
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode('utf-8-sig'))
            except UnicodeDecodeError as error:
                raise UserError(
                    f'{path}, line {number}: not UTF-8 text: byte {error.start:,} of the line is 0x{line[error.start]:02x}'
                ) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path}, line {number}: not JSON: {error}') from None
            if isinstance(record, dict) and field in record and record[field] is None:
                continue
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                has = f'the fields {", ".join(record)}' if isinstance(record, dict) else f'a {type(record).__name__}'
                raise UserError(
                    f'{path}, line {number}: there is no text in the field {field!r}, only {has}. Name another with --field'
                )
            yield from read_string(record[field])


def read_parquet(path, field, update):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path}: reading .parquet files needs pyarrow: pip install pyarrow') from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            kind = file.schema_arrow.field(field).type if field in file.schema_arrow.names else None
            if kind not in (pyarrow.string(), pyarrow.large_string()):
                raise UserError(
                    f'{path}: there is no text in a column {field!r}; its columns: {", ".join(file.schema_arrow.names)}. Name another with --field'
                )
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield from read_string(text)
                update(os.path.getsize(path) * len(batch) / file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise UserError(f'{path} is not a readable parquet file: {str(error).splitlines()[0]}') from error


def read_string(text):
    """One document from memory; nothing for one that is empty or null."""
    if text:
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')  # JSON may hold half a surrogate pair
        yield len(text.encode()), [text]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('inputs', nargs='+', metavar='FILE_OR_FOLDER')
    parser.add_argument('--encoding', choices=('gpt2', 'char', 'byte'), default='gpt2')
    parser.add_argument(
        '--field', default='text', help='where .jsonl and .parquet files have their text (default: text)'
    )
    parser.add_argument('--val_fraction', type=float, default=0.1)
    parser.add_argument(
        '--out', metavar='FOLDER', default=HERE, help='where to write the data set (default: beside this script)'
    )
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val_fraction {args.val_fraction} is not between 0 and 1')
    paths = find_files(args.inputs)
    total = sum(map(os.path.getsize, paths))
    print(f'{len(paths)} files, {total:,} bytes')

    end, dtype, meta = '\n', 'uint16', None
    if args.encoding == 'gpt2':
        gpt2_encoding()  # its errors first
        encode, end = gpt2_encode_pieces, None
    elif args.encoding == 'byte':
        meta = {'vocab_size': 256, 'encoding': 'byte'}
        encode = lambda pieces: np.frombuffer(''.join(pieces).encode(), np.uint8)
    else:
        chars = {'\n'}
        for _, pieces in read_documents(paths, args.field, progress('vocabulary', total)):
            for piece in pieces:
                chars.update(piece)
        encode, meta, dtype = char_encoder(sorted(chars)), char_meta(sorted(chars)), dtype_for(len(chars))

    with DatasetWriter(args.out, dtype) as out:
        encode_documents(
            out, read_documents(paths, args.field, progress('encoding', total)), encode, end, args.val_fraction
        )
        out.commit(meta)
