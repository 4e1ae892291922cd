"""
Functions shared by the prepare.py scripts: write a data set atomically, split documents into train and val, encode in
parallel with bounded memory, print the command that trains on the result, and read the corpora of more than one data
set.
"""

from errors import UserError  # isort: skip  first: it also reports a missing package

import argparse
import hashlib
import os
import pickle
import re
import shutil
import sys
import sysconfig
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np

from encoding import download, gpt2_encoding
from output import protect_output
from shell import python_command, quote_path, shortest_path
from text_reader import clean, read_text

try:
    import fcntl
except ImportError:  # Windows, where two simultaneous preparations are not detected
    fcntl = None

protect_output()  # hours of work must not end because a reader such as `| head` or the terminal is gone

HERE = os.path.dirname(os.path.abspath(__file__))
GROUP = 1 << 20  # characters read, encoded and written at a time
ENDOFTEXT = 50256
SMALL = 50_000_000  # for fewer training tokens, a small model is suggested
# as config/train_shakespeare_char.py suggests for a machine without a GPU
ON_A_CPU = (
    '--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=2000 --lr_decay_iters=2000 '
    '--dropout=0.0'
).split()
PYTHON_CHARS = '\n' + ''.join(map(chr, range(32, 127)))
# Skips everything that is not library code (tests, generated tables, documentation), that differs between builds of one
# version, or that Linux distributions package separately. A Python version thus has the same corpus nearly everywhere.
STDLIB_SKIPPED = {
    '__pycache__',
    'site-packages',
    'dist-packages',
    'test',
    'tests',
    'idle_test',
    'encodings',
    'pydoc_data',
    'idlelib',
    'tkinter',
    'turtledemo',
    'lib2to3',
    'distutils',
    'ensurepip',
    'macholib',
    '_distutils_system_mod.py',
    'sitecustomize.py',
    'usercustomize.py',
}
SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'  # 1,115,394 bytes


class DatasetWriter:
    """
    Writes train.bin, val.bin and meta.pkl into out_dir atomically.

        with DatasetWriter(out_dir, dtype='uint16') as out:
            out.write('train', ids)   # integers below 2**16 (or 2**32); appends
            out.write('val', ids)
            out.commit(meta)          # a dict, or None for GPT-2 tokens, which have no meta.pkl in nanoGPT either

    Until commit() everything is in .tmp files, and an earlier data set stays. It also stays if commit() is never
    called. Raises UserError if out_dir cannot be written or another process is preparing it.
    """

    def __init__(self, out_dir: str, dtype: str = 'uint16'):
        self.out_dir, self.dtype, self.files = out_dir, np.dtype(dtype).newbyteorder('<'), {}
        self.locked = locked(out_dir)
        self.documents = self.characters = 0  # for the report, counted by the caller

    def path(self, name):
        return os.path.join(self.out_dir, name)

    def tokens(self, split):
        return self.files[split].tell() // self.dtype.itemsize

    def __enter__(self):
        self.locked.__enter__()
        try:
            shards = sorted(name for name in os.listdir(self.out_dir) if re.fullmatch(r'.+(train|val)_\d+\.bin', name))
            if shards:
                folder = quote_path(shortest_path(self.out_dir))
                raise UserError(
                    f'{self.path(shards[0])} is a shard of another data set, which must not be mixed with train.bin '
                    'and val.bin. Choose another folder, or remove the shards:\n'
                    f'  rm -f {folder}/*_train_*.bin {folder}/*_val_*.bin {folder}/shards.json'
                )
            for split in ('train', 'val'):
                self.files[split] = open(self.path(f'{split}.bin.tmp'), 'w+b')
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, split: str, ids) -> None:
        self.files[split].write(np.ascontiguousarray(ids, dtype=self.dtype).data)

    def top_up_val(self, val_fraction):
        """Moves the end of train to val until val has val_fraction of all tokens: a split by position."""
        train, val = self.files['train'], self.files['val']
        missing = int((self.tokens('train') + self.tokens('val')) * val_fraction) - self.tokens('val')
        keep = train.tell() - max(missing, 0) * self.dtype.itemsize
        train.seek(keep)
        shutil.copyfileobj(train, val, 1 << 20)
        train.seek(keep)
        train.truncate()

    def commit(self, meta: dict | None = None) -> None:
        """
        Replaces the data set by the new files and prints its size and a training command. Raises UserError if a split
        is empty.
        """
        counts = {split: self.tokens(split) for split in self.files}
        if not all(counts.values()):
            raise UserError(
                f'the text is too short: {counts["train"]} tokens for train, {counts["val"]} for val. '
                'Nothing was written'
            )
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        if meta is not None:
            meta = dict(meta, dtype=self.dtype.name, train_tokens=counts['train'], val_tokens=counts['val'])
            with open(self.path('meta.pkl.tmp'), 'wb') as f:
                pickle.dump(meta, f, protocol=4)
                f.flush()
                os.fsync(f.fileno())
        # in this order, a kill at any moment leaves only files that belong together; a missing file is an error to the
        # reader
        for name in ('train.bin', 'val.bin'):
            _remove(self.path(name))
        if meta is None:
            _remove(self.path('meta.pkl'))
        else:
            os.replace(self.path('meta.pkl.tmp'), self.path('meta.pkl'))
        for split in ('val', 'train'):
            if not fcntl:
                self.files[split].close()  # Windows cannot rename an open file
            os.replace(self.path(f'{split}.bin.tmp'), self.path(f'{split}.bin'))
        for file in self.files.values():
            file.close()
        self.files = {}  # nothing left to clean up
        print_written(self.documents, self.characters, sum(counts.values()))
        print(
            f'{self.out_dir}: train.bin has {counts["train"]:,} tokens, val.bin {counts["val"]:,} ({self.dtype.name}), '
            f'{"vocabulary of " + format(meta["vocab_size"], ",") if meta else "GPT-2 vocabulary"}'
        )
        print_training_command(self.out_dir, counts, meta)

    def __exit__(self, kind, error, trace):
        for split in self.files:
            _remove(self.path(f'{split}.bin.tmp'))
        _remove(self.path('meta.pkl.tmp'))
        for file in self.files.values():
            with suppress(OSError):  # closing retries a write that failed on a full disk
                file.close()
        self.locked.__exit__(kind, error, trace)


def print_written(documents: int, characters: int, tokens: int) -> None:
    """Prints how much was written; documents and characters only if they were counted."""
    parts = [
        f'{n:,} {noun}{"" if n == 1 else "s"}' for n, noun in ((documents, 'document'), (characters, 'character')) if n
    ]
    print(f'wrote {", ".join([*parts, f"{tokens:,} tokens"])}')


def print_training_command(out_dir: str, counts: dict[str, int], meta: dict | None, longest: int | None = None) -> None:
    """
    Prints a command that trains a model of suitable size on the data set in out_dir on this machine. longest: tokens in
    the longest file of either split, if a split has several files.
    """
    context = (longest or min(counts.values())) - 1  # a window and its target must fit into one file of each split
    if context < 1:
        print('This is too little text to train on: a split needs at least 2 tokens.')
        return
    name = os.path.basename(os.path.abspath(out_dir))
    known = os.path.join('data', name)  # train.py looks here first
    is_ours = os.path.samefile(out_dir, os.path.join(HERE, name)) if os.path.isdir(os.path.join(HERE, name)) else False
    found_first = is_ours and (not os.path.isdir(known) or os.path.samefile(known, out_dir))
    flags = [f'--dataset={name if found_first else shortest_path(out_dir)}', f'--out_dir=out-{name}']
    block_size = 1024
    if found_first and name == 'python_char':
        flags, block_size = ['config/train_python_char.py'], 128
    elif meta or counts['train'] < SMALL:
        config = 'config/train_shakespeare_char.py'
        flags, block_size = [config] if found_first and name == 'shakespeare_char' else [config, *flags], 256
        if not os.path.exists('/dev/nvidiactl'):
            flags, block_size = [*flags, *ON_A_CPU], 64
    if context < block_size:
        flags.append(f'--block_size={context}')
    train = os.path.join(os.path.dirname(HERE), 'train.py')
    print(f'Train on it:\n  {python_command(train, *flags)}')


@contextmanager
def locked(folder: str):
    """
    Creates the folder if it is missing, and keeps other processes from preparing it. Raises UserError if another
    process is preparing it, or if the folder cannot be used.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, '.prepare.lock'), 'ab') as file:
            if fcntl:
                _lock(file.fileno())
            yield
    except BlockingIOError:
        raise UserError(f'another process is preparing {folder}: wait for it, or end it') from None
    except FileExistsError:
        raise UserError(f'cannot prepare {folder}: it is a file, or a link that leads nowhere') from None
    except OSError as error:
        where = f'{error.filename}: ' if error.filename not in (None, folder) else ''
        raise UserError(f'cannot prepare {folder!r}: {where}{error.strerror or error}') from error


def _lock(descriptor):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # the file system has no such locks


def _remove(path):
    if os.path.exists(path):
        os.remove(path)


def assign_splits(documents, val_fraction):
    """
    Yields (split, contents) for documents, an iterable of (size, contents); every document is whole in 'train' or
    'val'.

    A document goes to val if val has less than its share of the documents before, unless it alone would make val more
    than twice that share. With documents of equal size and 0.1, this is every tenth. The rule is deterministic, needs
    no second pass, takes val from everywhere in the corpus, and depends on a document's size only if it is a large part
    of the whole.
    """
    total = val = 0
    for size, contents in documents:
        behind = val < val_fraction * total
        total += size
        split = 'val' if behind and val + size <= 2 * val_fraction * total else 'train'
        val += size if split == 'val' else 0
        yield split, contents


def encode_documents(out, documents, encode, end, val_fraction):
    """
    Encodes documents on all cores and writes them into the DatasetWriter `out`. Holds only a few groups of GROUP
    characters in memory.

    documents: iterable of (size, iterable of str); the strings are the consecutive pieces of one document. encode:
    function from a list of pieces to an array of ids. It runs in threads, so it should release the GIL. end: piece to
    write after each document, such as '\n', unless the document ends with it; or None, which is always added. If there
    are too few documents to give val half of its share, the end of train fills it up (a split by position).
    """

    def pieces():
        for split, document in assign_splits(documents, val_fraction):
            piece = ''
            out.documents += 1
            for piece in document:
                out.characters += len(piece)
                yield split, piece
            if end is None or not piece.endswith(end):
                yield split, end

    def groups():
        group, size = {'train': [], 'val': []}, 0
        for split, piece in pieces():
            group[split].append(piece)
            size += len(piece or '') + 1
            if size >= GROUP:
                yield group
                group, size = {'train': [], 'val': []}, 0
        yield group

    def encode_group(group):
        return {split: encode(group[split]) for split in group if group[split]}

    for encoded in in_parallel(encode_group, groups()):
        for split, ids in encoded.items():
            out.write(split, ids)
    if out.tokens('val') < val_fraction / 2 * (out.tokens('train') + out.tokens('val')):
        out.top_up_val(val_fraction)


def in_parallel(function, items):
    """
    Yields function(item) for each item, in order, computed in as many threads as there are cores, only a few items
    ahead. A UserError from the items is raised after the results of the items before it.
    """
    workers = os.cpu_count() or 1
    error = None
    with ThreadPoolExecutor(workers) as pool:
        running = deque()
        try:
            for item in items:
                running.append(pool.submit(function, item))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
        except UserError as e:
            error = e
        while running:
            yield running.popleft().result()
    if error:
        raise error


def gpt2_encode(text):
    """Returns GPT-2 tokens of text as an array of uint32; encodes '<|endoftext|>' in it like any other text."""
    try:
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())
    except ValueError:  # tiktoken's regular expression fails on a very long run of blanks
        return np.concatenate([gpt2_encode(text[: len(text) // 2]), gpt2_encode(text[len(text) // 2 :])])


def gpt2_encode_pieces(pieces):
    """Returns GPT-2 tokens of consecutive pieces; None stands for the <|endoftext|> token."""
    return np.concatenate([[ENDOFTEXT] if piece is None else gpt2_encode(piece) for piece in pieces])


def char_encoder(chars):
    """Returns a function from a list of str to an array of ids. The id of a character is its position in chars."""
    table = np.full(0x110000, len(chars), np.uint32)
    table[[ord(char) for char in chars]] = np.arange(len(chars))

    def encode(pieces):
        ids = table[np.frombuffer(''.join(pieces).encode('utf-32-le'), '<u4')]
        if ids.size and ids.max() == len(chars):
            raise UserError('a character is not in the vocabulary: did a file change while it was read?')
        return ids

    return encode


def char_meta(chars):
    """Returns the content of meta.pkl for one token per character of chars, with nanoGPT's keys."""
    return {
        'vocab_size': len(chars),
        'itos': dict(enumerate(chars)),
        'stoi': {char: i for i, char in enumerate(chars)},
        'encoding': 'char',
    }


def dtype_for(vocab_size):
    return 'uint32' if vocab_size > 65535 else 'uint16'


def write_char_dataset(out_dir, train_text, val_text, chars, documents=1):
    """
    Writes a data set of two texts, one token per character of chars (sorted). documents: their number in the texts.
    """
    encode, meta = char_encoder(chars), char_meta(chars)
    train, val = encode([train_text]), encode([val_text])
    # the loss of a model that knows only the frequency of each character: the loss to beat. Each count is increased by
    # one, so that the loss is finite for a character that occurs only in val
    counts = np.bincount(train, minlength=len(chars)) + 1
    if val.size:
        meta['unigram_entropy'] = float(-np.log(counts / counts.sum())[val].mean())
        print(
            f'unigram entropy: {meta["unigram_entropy"]:.4f} nats (a lower validation loss means that the model has '
            'learned from context)'
        )
    with DatasetWriter(out_dir, dtype_for(len(chars))) as out:
        out.write('train', train)
        out.write('val', val)
        out.documents, out.characters = documents, len(train_text) + len(val_text)
        out.commit(meta)


def stdlib_sources():
    """
    Returns the sources of the running Python's standard library as a list of str in the order of their paths: library
    code only (see STDLIB_SKIPPED), with tabs expanded, without the few characters outside PYTHON_CHARS. The text thus
    depends only on the Python version, not on installed packages. Raises UserError if this Python comes without its
    sources.
    """
    stdlib, paths = sysconfig.get_paths()['stdlib'], []
    for folder, folders, files in os.walk(stdlib):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPPED and not name.startswith('config-')]
        paths += [
            os.path.join(folder, name)
            for name in files
            if name.endswith('.py') and name not in STDLIB_SKIPPED and not name.startswith('_sysconfigdata')
        ]
    if len(paths) < 100:
        raise UserError(
            f'this Python has no library sources to learn from: {len(paths)} .py files in {stdlib} (zipped, or a '
            'minimal installation?). Run this script with another Python, or prepare your own files with '
            'data/text/prepare.py'
        )
    texts = []
    for path in sorted(paths, key=lambda path: os.path.relpath(path, stdlib).split(os.sep)):
        with open(path, 'rb') as f:
            text = clean(f.read().decode('ascii', errors='ignore')).expandtabs()
        texts.append(re.sub('[^\n -~]', '', text))
    return texts


def parse_shakespeare_arguments(description: str) -> argparse.Namespace:
    """Returns the command line's --input and --url. description: the text of --help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--input', metavar='FILE', help='use this file instead of a download; another text is accepted with a note'
    )
    parser.add_argument('--url', default=SHAKESPEARE_URL, help='a mirror of input.txt')
    return parser.parse_args()


def tiny_shakespeare(out_dir: str, input: str | None = None, url: str = SHAKESPEARE_URL) -> str:
    """
    Returns the text of tiny Shakespeare from the file `input`, or else from out_dir/input.txt, which it downloads from
    url if it is missing. Raises UserError.
    """
    path, script = input or os.path.join(out_dir, 'input.txt'), os.path.join(out_dir, 'prepare.py')
    if not input and not os.path.exists(path):
        print(f'downloading {url}')
        download(
            url,
            path,
            SHAKESPEARE_SHA256,
            f'This data set consists of one file, input.txt. Get it on any machine from\n  {SHAKESPEARE_URL}\n'
            f'and put it at\n  {path}\nor name it:\n  {python_command(script, "--input", "FILE")}',
        )
    text = read_text(path)
    with open(path, 'rb') as f:
        original = hashlib.file_digest(f, 'sha256').hexdigest() == SHAKESPEARE_SHA256
    if not original and not input:
        raise UserError(
            f'{path} is not tiny Shakespeare (its SHA-256 differs). To download it again, first remove it:\n'
            f'  rm {quote_path(shortest_path(path))}\nTo use it anyway:\n'
            f'  {python_command(script, "--input", shortest_path(path))}'
        )
    if not original:
        print(f'note: {path} is not the well-known tiny Shakespeare (its SHA-256 differs), but is used anyway')
    return text


def progress(what: str, total: int):
    """
    Returns a function to call with the number of bytes just processed. It reports on stderr: on a terminal with tqdm's
    bar, if tqdm is installed, else twice a minute.
    """
    if sys.stderr.isatty():
        with suppress(ImportError):
            return tqdm_progress(what, total)
    start = last = time.monotonic()
    terminal, done = sys.stderr.isatty(), 0

    def update(n):
        nonlocal done, last
        done, now = done + n, time.monotonic()
        finished = done > total - 1
        if now - last < (0.5 if terminal else 30) and not (finished and last > start):  # a short run prints nothing
            return
        last, rate = now, done / (now - start) / 1e6
        print(
            f'\r{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate:.1f} MB/s, '
            f'{max(total - done, 0) / 1e6 / rate:,.0f} s left  ',
            end='' if terminal and not finished else '\n',
            file=sys.stderr,
            flush=True,
        )

    return update


def tqdm_progress(what, total):
    from tqdm import tqdm

    bar = tqdm(desc=what, total=total, unit='B', unit_scale=True)

    def update(n):
        bar.update(n)
        if bar.n >= total:
            bar.close()

    return update
