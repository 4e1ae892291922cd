"""
Prepares FineWeb-Edu or FineWeb as token shards in llm.c's format (GPT-2 tokens, <|endoftext|> before each document).

    pip install huggingface_hub pyarrow                        # or this project's extra `data`
    python data/fineweb/prepare.py                             # FineWeb-Edu, all of the sample of 10 billion tokens
    python data/fineweb/prepare.py --num_shards 10             # the first 10 training shards; 20 later adds 10 more
    python data/fineweb/prepare.py --kind fineweb --sample 100BT
    python data/fineweb/prepare.py --ready-made --num_shards 10    # downloads shards that others encoded
    python data/fineweb/prepare.py --input FILE_OR_FOLDER ...      # your own .parquet, .jsonl or .txt files

Writes edu_fineweb_val_000000.bin, edu_fineweb_train_000001.bin and so on next to this file (or to --out): 100 million
tokens and 200 MB each, 99 training shards for 10 billion tokens. Encodes on all cores. The parquet files (about 2 GB
each) are removed once their tokens are written. After an interruption, the same command continues after the last
complete shard.
"""

import argparse
import hashlib
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]  # data/ and the trainer's folder
from errors import UserError, first_line
from prepare_common import gpt2_encoding, print_training_command, print_written
from shard_writer import read_header, shard_name, write_shards
from shell import pip_install, python_command
from text_reader import TextReader

NAMES = {'edu': 'edu_fineweb', 'fineweb': 'fineweb'}  # names of the shards that are encoded here, as in llm.c
# data sets with the folders sample/10BT, sample/100BT and sample/350BT
SOURCES = {'edu': 'HuggingFaceFW/fineweb-edu', 'fineweb': 'HuggingFaceFW/fineweb'}
# (kind, sample): data set on the Hugging Face Hub, name of its shards, number of training shards. modded-nanogpt
# (data/cached_fineweb*.py) and llm.c (dev/data/edu_fineweb.sh) download the same ones
READY_MADE = {
    ('fineweb', '10BT'): ('kjj0/fineweb10B-gpt2', 'fineweb', 103),
    ('fineweb', '100BT'): ('kjj0/fineweb100B-gpt2', 'fineweb', 1030),
    ('edu', '10BT'): ('kjj0/finewebedu10B-gpt2', 'finewebedu', 99),
    ('edu', '100BT'): ('karpathy/fineweb-edu-100B-gpt2-token-shards', 'edu_fineweb', 1001),
}
SCRIPT = os.path.abspath(__file__)
PARALLEL = 4  # simultaneous downloads of ready-made shards


def hub():
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f'FineWeb needs the package huggingface_hub: {pip_install("huggingface_hub", "pyarrow")}'
        ) from None
    return huggingface_hub


def unreachable(repository, error, by_hand):
    """Returns the UserError for a failed download, with instructions for a machine without a network."""
    return UserError(
        f'cannot load {repository}: {first_line(error)}\n'
        'If the connection broke, run the same command again: it continues after the completed part. '
        f'Without a network: {by_hand}'
    )


class HubReader(TextReader):
    """
    Reads the documents of a sample of FineWeb. Downloads parquet files into folder while earlier ones are encoded, and
    removes them once their shards are written. Raises UserError if the Hub cannot be reached.
    """

    def __init__(self, repository: str, sample: str, folder: str):
        self.repository, self.sample, self.folder = repository, sample, folder
        self.field, self.separator, self.empty, self.skipped = 'text', '', 0, []
        self.unsplit = self.whole = frozenset()
        api = hub().HfApi()
        try:
            self.revision = api.dataset_info(repository).sha
            tree = api.list_repo_tree(repository, f'sample/{sample}', repo_type='dataset', revision=self.revision)
            files = sorted((file.path, file.size) for file in tree if file.path.endswith('.parquet'))
        except Exception as error:  # many classes: no network, no such sample, a proxy, ...
            raise self.unreachable(error) from error
        if not files:
            raise UserError(f'{repository} has no .parquet files in sample/{sample}')
        self.paths, self.sizes = [path for path, _ in files], [size for _, size in files]
        self.bytes, self.downloads, self.released = sum(self.sizes), {}, 0

    def unreachable(self, error):
        by_hand = (
            f'get .parquet files of\nhttps://huggingface.co/datasets/{self.repository} (folder sample/{self.sample}) '
            f'and pass their folder:\n  {python_command(SCRIPT, "--input", "FOLDER")}'
        )
        return unreachable(self.repository, error, by_hand)

    def fetch(self, index):
        for i in range(index, min(index + 2, len(self.paths))):  # the next file downloads while this one is encoded
            if i not in self.downloads:
                self.downloads[i] = Future()
                # a daemon thread: ends with the program
                Thread(target=self._download, args=(i,), daemon=True).start()
        try:
            return self.downloads[index].result()
        except Exception as error:
            raise self.unreachable(error) from error

    def _download(self, i):
        where = dict(repo_type='dataset', revision=self.revision, local_dir=self.folder)
        try:
            self.downloads[i].set_result(hub().hf_hub_download(self.repository, self.paths[i], **where))
        except Exception as error:
            self.downloads[i].set_exception(error)

    def release(self, end):
        for path in self.paths[self.released : end]:
            path = os.path.join(self.folder, path)
            if os.path.exists(path):
                os.remove(path)
        self.released = end

    def bytes_before(self, index):
        return sum(self.sizes[:index])

    def identity(self):
        files = repr(list(zip(self.paths, self.sizes, strict=True))).encode()
        return {'repository': self.repository, 'sample': self.sample, 'files': hashlib.sha256(files).hexdigest()}

    def report(self):
        print(f'reading {len(self.paths)} .parquet files, {self.bytes:,} bytes, of {self.repository}')


def download_ready_made(kind, sample, out, num_shards):
    """Downloads the encoded shards that are missing in out."""
    if (kind, sample) not in READY_MADE:
        known = ', '.join(f'--kind {kind} --sample {sample}' for kind, sample in READY_MADE)
        raise UserError(f'there are no ready-made shards for --kind {kind} --sample {sample}, only for {known}')
    repository, name, most = READY_MADE[kind, sample]
    names = [shard_name(name, i) for i in range(1 + min(num_shards or most, most))]
    download = hub().hf_hub_download
    os.makedirs(out, exist_ok=True)
    others = [file for file in os.listdir(out) if file.endswith('.bin') and not file.startswith(f'{name}_')]
    if others:
        raise UserError(f'{os.path.join(out, others[0])} belongs to another data set. Choose another folder with --out')

    def get(file):
        path = os.path.join(out, file)
        if not os.path.exists(path):
            download(repository, file, repo_type='dataset', local_dir=out)
        return read_header(path)

    counts = []
    with ThreadPoolExecutor(PARALLEL) as pool:
        running = [pool.submit(get, file) for file in names]
        for file, future in zip(names, running, strict=True):
            try:
                counts.append(future.result())
            except UserError as error:
                pool.shutdown(cancel_futures=True)
                raise UserError(f'{error}. Remove it, and run the same command again') from None
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                by_hand = f'get the shards from\nhttps://huggingface.co/datasets/{repository} and put them into {out}'
                raise unreachable(repository, error, by_hand) from error
            print(f'{file}: {counts[-1]:,} tokens')
    print_written(0, 0, sum(counts))
    print_training_command(out, {'train': sum(counts[1:]), 'val': counts[0]}, None, min(max(counts[1:]), counts[0]))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kind', choices=tuple(SOURCES), default='edu', help='FineWeb-Edu (default) or FineWeb')
    parser.add_argument(
        '--sample',
        choices=('10BT', '100BT', '350BT'),
        default='10BT',
        help='size of the sample in tokens (default: 10BT)',
    )
    parser.add_argument('--num_shards', type=int, metavar='N', help='training shards to make (default: all)')
    parser.add_argument('--shard_tokens', type=int, default=100_000_000, help='tokens per shard (default: 100,000,000)')
    parser.add_argument('--ready-made', action='store_true', help='download shards that others encoded')
    parser.add_argument('--input', nargs='+', metavar='FILE_OR_FOLDER', help='encode these files instead')
    parser.add_argument(
        '--field',
        default='text',
        help='field of .jsonl and column of .parquet files that holds the text (default: text)',
    )
    parser.add_argument('--separator', default='', metavar='TEXT', help='text between documents in .txt files')
    parser.add_argument('--out', metavar='FOLDER', default=HERE, help='where to write (default: next to this script)')
    args = parser.parse_args()
    if args.num_shards is not None and args.num_shards < 1:
        raise UserError(f'--num_shards {args.num_shards} is not a positive number')
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(f'--shard_tokens {args.shard_tokens} is not between 2 and 2,147,483,647')
    if args.ready_made and args.input:
        raise UserError('--ready-made downloads shards, and --input encodes your own files: leave out one of the two')
    if args.ready_made:
        download_ready_made(args.kind, args.sample, args.out, args.num_shards)
    else:
        gpt2_encoding()  # report its errors first
        if args.input:
            reader = TextReader(args.input, args.field, args.separator)
        else:
            reader = HubReader(SOURCES[args.kind], args.sample, os.path.join(args.out, 'downloads'))
        reader.report()
        write_shards(reader, args.out, NAMES[args.kind], args.shard_tokens, num_shards=args.num_shards)
