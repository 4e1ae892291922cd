"""
Shared by the prepare.py scripts: writing a data set all or nothing, splitting documents into train and val, encoding in
parallel with bounded memory, the command that trains on the result, and the two corpora that more than one data set is made of.
"""

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

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # encoding.py, errors.py and shell.py; there are packages of these names
from encoding import download, gpt2_encoding
from errors import UserError
from shell import python_command, quote_path, shortest_path
from text_reader import clean, read_text

try:
    import fcntl
except ImportError:  # Windows: two preparations at once are not noticed there
    fcntl = None

for stream in (sys.stdout, sys.stderr):
    with suppress(AttributeError, OSError):  # a stream of a notebook
        stream.reconfigure(
            errors='backslashreplace'
        )  # escapes names that the terminal's encoding has no characters for

GROUP = 1 << 20  # characters that are read, encoded and written at a time
ENDOFTEXT = 50256
SMALL = 50_000_000  # training tokens below which the suggested model is a small one
# what config/train_shakespeare_char.py suggests for a machine without a GPU
ON_A_CPU = (
    '--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0'
).split()
PYTHON_CHARS = '\n' + ''.join(map(chr, range(32, 127)))
# What is no library code (tests, generated tables and documentation), what differs between builds of one version, and what
# Linux distributions package separately: without these, a Python version has the same corpus nearly everywhere.
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
    Writes train.bin, val.bin and meta.pkl into out_dir, all or nothing.

        with DatasetWriter(out_dir, dtype='uint16') as out:
            out.write('train', ids)   # integers below 2**16 (or 2**32); appends
            out.write('val', ids)
            out.commit(meta)          # a dict, or None for GPT-2 tokens: these have no meta.pkl, since upstream has none

    Until commit everything is in .tmp files; what was there before stays until then, and stays if there is no commit. Raises
    UserError where out_dir cannot be written or another process is preparing it.
    """

    def __init__(self, out_dir, dtype='uint16'):
        self.out_dir, self.dtype, self.files = out_dir, np.dtype(dtype).newbyteorder('<'), {}
        self.documents = self.characters = 0  # for the report; the caller counts them

    def path(self, name):
        return os.path.join(self.out_dir, name)

    def tokens(self, split):
        return self.files[split].tell() // self.dtype.itemsize

    def __enter__(self):
        try:
            os.makedirs(self.out_dir, exist_ok=True)
        except OSError as error:
            raise UserError(f'cannot make {self.out_dir}: {error.strerror}') from error
        shards = sorted(name for name in os.listdir(self.out_dir) if re.fullmatch(r'.+(train|val)_\d+\.bin', name))
        if shards:
            folder = quote_path(shortest_path(self.out_dir))
            raise UserError(
                f'{self.path(shards[0])} is a shard of another data set, which must not be mixed with train.bin and val.bin. '
                f'Choose another folder, or remove the shards:\n  rm -f {folder}/*_train_*.bin {folder}/*_val_*.bin {folder}/shards.json'
            )
        try:
            for split in ('train', 'val'):
                path = self.path(f'{split}.bin.tmp')
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_BINARY', 0), 0o666)
                self.files[split] = os.fdopen(descriptor, 'r+b')
                if fcntl:  # the temporary file is its own lock, which ends with its process
                    _lock(descriptor)
                    if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        raise BlockingIOError  # the other process committed between our open and our lock: this is its train.bin now
                self.files[split].truncate(0)
        except (BlockingIOError, FileNotFoundError):
            raise UserError(f'another process is preparing {self.out_dir}: wait for it, or end it') from None
        except OSError as error:
            raise UserError(f'cannot write to {self.out_dir}: {error.strerror}') from error
        return self

    def write(self, split, ids):
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

    def commit(self, meta=None):
        """Makes the new files the data set, and prints its size and the command that trains on it. Raises UserError if train or
        val is empty."""
        counts = {split: self.tokens(split) for split in self.files}
        if not all(counts.values()):
            raise UserError(
                f'the text is too short: {counts["train"]} tokens for train, {counts["val"]} for val. Nothing was written'
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
        # in this order a kill at any moment leaves only files that belong together, and a missing one is an error to the reader
        for name in ('train.bin', 'val.bin'):
            _remove(self.path(name))
        if meta is None:
            _remove(self.path('meta.pkl'))
        else:
            os.replace(self.path('meta.pkl.tmp'), self.path('meta.pkl'))
        for split in ('val', 'train'):
            if not fcntl:
                self.files[split].close()  # Windows renames no open file
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
            _remove(self.path(f'{split}.bin.tmp'))  # while still locked
        _remove(self.path('meta.pkl.tmp'))
        for file in self.files.values():
            with suppress(OSError):  # what a full disk has not taken is tried again
                file.close()
        if isinstance(error, OSError):
            raise UserError(f'cannot prepare {self.out_dir}: {error}') from error


def print_written(documents: int, characters: int, tokens: int) -> None:
    """Prints how much was written; documents and characters only if they were counted."""
    parts = [
        f'{n:,} {noun}{"" if n == 1 else "s"}' for n, noun in ((documents, 'document'), (characters, 'character')) if n
    ]
    print(f'wrote {", ".join([*parts, f"{tokens:,} tokens"])}')


def print_training_command(out_dir: str, counts: dict[str, int], meta: dict | None, longest: int | None = None) -> None:
    """Prints the command that trains on the data set in out_dir: a model for its size and for this machine. longest: tokens of the
    longest file of either split, if a split has several files."""
    context = (longest or min(counts.values())) - 1  # a window and its targets must fit into a file of either split
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
    """Makes folder if it is missing, and keeps other processes from preparing it. Raises UserError if one does, or if the folder
    cannot be used."""
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, '.prepare.lock'), 'ab') as file:
            if fcntl:
                _lock(file.fileno())
            yield
    except BlockingIOError:
        raise UserError(f'another process is preparing {folder}: wait for it, or end it') from None
    except OSError as error:
        raise UserError(f'cannot prepare {folder}: {error.strerror or error}') from error


def _lock(descriptor):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without such locks


def _remove(path):
    if os.path.exists(path):
        os.remove(path)


def assign_splits(documents, val_fraction):
    """
    documents: iterable of (size, contents). Yields (split, contents) with every document whole in 'train' or 'val'.

    A document goes to val when val is behind its share of what came before, unless it alone would make val more than twice that
    share. With documents of one size that is every tenth for 0.1. Deterministic, needs no second pass, takes val from everywhere
    in the corpus, and does not depend on a document's size unless it is a large part of the whole.
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
    Writes documents into the DatasetWriter `out`, encoding on all cores, with memory for a few groups of GROUP characters only.

    documents: iterable of (size, iterable of str), the strings of one document being its consecutive pieces.
    encode: function of a list of pieces to an array of ids; it runs in threads, so it pays if it releases the GIL.
    end: what follows each document, as a piece: '\n' is added only where the document does not end with it.
    Where there are too few documents to give val half of its share, the rest of it is the end of train (split by position).
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
    """Yields function(item) for each item, in order, in as many threads as there are cores; never more than a few items ahead. If the
    items end in a UserError, it is raised after their results."""
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
    """GPT-2 tokens of text as an array of uint32; '<|endoftext|>' in it is encoded like any other text."""
    try:
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())
    except ValueError:  # tiktoken's regular expression gives up on a run of very many blanks
        return np.concatenate([gpt2_encode(text[: len(text) // 2]), gpt2_encode(text[len(text) // 2 :])])


def gpt2_encode_pieces(pieces):
    """GPT-2 tokens of consecutive pieces; a piece that is None is the <|endoftext|> token."""
    return np.concatenate([[ENDOFTEXT] if piece is None else gpt2_encode(piece) for piece in pieces])


def char_encoder(chars):
    """A function of a list of str to the array of ids, where the id of a character is its position in chars."""
    table = np.full(0x110000, len(chars), np.uint32)
    table[[ord(char) for char in chars]] = np.arange(len(chars))

    def encode(pieces):
        ids = table[np.frombuffer(''.join(pieces).encode('utf-32-le'), '<u4')]
        if ids.size and ids.max() == len(chars):
            raise UserError('a character is not in the vocabulary: did a file change while it was read?')
        return ids

    return encode


def char_meta(chars):
    """meta.pkl for one token per character of chars, with upstream's keys."""
    return {
        'vocab_size': len(chars),
        'itos': dict(enumerate(chars)),
        'stoi': {char: i for i, char in enumerate(chars)},
        'encoding': 'char',
    }


def dtype_for(vocab_size):
    return 'uint32' if vocab_size > 65535 else 'uint16'


def write_char_dataset(out_dir, train_text, val_text, chars, documents=1):
    """Writes the data set of two texts with one token per character of chars (sorted). documents: how many are in the texts."""
    encode, meta = char_encoder(chars), char_meta(chars)
    train, val = encode([train_text]), encode([val_text])
    # what a model reaches that knows only how frequent each character is: the loss to beat. One is added to each count, so that
    # it is finite for a character that occurs in val only
    counts = np.bincount(train, minlength=len(chars)) + 1
    meta['unigram_entropy'] = float(-np.log(counts / counts.sum())[val].mean())
    print(
        f'unigram entropy: {meta["unigram_entropy"]:.4f} nats (a validation loss below it means that context was learned)'
    )
    with DatasetWriter(out_dir, dtype_for(len(chars))) as out:
        out.write('train', train)
        out.write('val', val)
        out.documents, out.characters = documents, len(train_text) + len(val_text)
        out.commit(meta)


def stdlib_sources():
    """
    The sources of the standard library of the running Python, a list of str in the order of their paths: library code only (see
    STDLIB_SKIPPED), tabs expanded, and without the few characters outside PYTHON_CHARS. So the text depends on the Python version
    alone, not on what is installed. Raises UserError where this Python comes without its sources.
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
            f'this Python has no library sources to learn from: {len(paths)} .py files in {stdlib} (zipped, or a minimal '
            'installation?). Run this script with another Python, or prepare your own files with data/text/prepare.py'
        )
    texts = []
    for path in sorted(paths, key=lambda path: os.path.relpath(path, stdlib).split(os.sep)):
        with open(path, 'rb') as f:
            text = clean(f.read().decode('ascii', errors='ignore')).expandtabs()
        texts.append(re.sub('[^\n -~]', '', text))
    return texts


def tiny_shakespeare(out_dir, input=None, url=SHAKESPEARE_URL):
    """Returns the text of tiny Shakespeare: of the file `input` if given, else of out_dir/input.txt, which is downloaded from url if
    it is missing. Raises UserError."""
    path, script = input or os.path.join(out_dir, 'input.txt'), os.path.join(out_dir, 'prepare.py')
    if not input and not os.path.exists(path):
        print(f'downloading {url}')
        download(
            url,
            path,
            SHAKESPEARE_SHA256,
            f'This data set is made of one file, input.txt. Get it on any machine from\n  {SHAKESPEARE_URL}\n'
            f'and put it at\n  {path}\nor name it:\n  {python_command(script, "--input", "FILE")}',
        )
    text = read_text(path)
    with open(path, 'rb') as f:
        original = hashlib.file_digest(f, 'sha256').hexdigest() == SHAKESPEARE_SHA256
    if not original and not input:
        raise UserError(
            f'{path} is not tiny Shakespeare (its SHA-256 is another). To download it again, first remove it:\n'
            f'  rm {quote_path(shortest_path(path))}\nTo use it as it is:\n'
            f'  {python_command(script, "--input", shortest_path(path))}'
        )
    if not original:
        print(f'note: {path} is not the well-known tiny Shakespeare (its SHA-256 is another); used as it is')
    return text


def progress(what, total):
    """Returns a function to call with the number of bytes just done; it reports on stderr, on a terminal with tqdm's bar if tqdm is
    installed, else twice a minute."""
    if sys.stderr.isatty():
        with suppress(ImportError):
            return tqdm_progress(what, total)
    start = last = time.monotonic()
    terminal, done = sys.stderr.isatty(), 0

    def update(n):
        nonlocal done, last
        done, now = done + n, time.monotonic()
        finished = done > total - 1
        if now - last < (0.5 if terminal else 30) and not (finished and last > start):  # a short run says nothing
            return
        last, rate = now, done / (now - start) / 1e6
        print(
            f'\r{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {rate:.1f} MB/s, {max(total - done, 0) / 1e6 / rate:,.0f} s left  ',
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
