"""
Finds and reads prepared data sets: token files as memory maps, meta.pkl without executing it, and the text encodings.

    data_dir = find_data_dir('python_char')
    meta = load_meta(data_dir)                                     # {} for GPT-2 tokens, which have no meta.pkl
    data = open_tokens(data_dir, 'train', block_size=256, meta=meta)
    encoding = get_encoding(meta)                                  # encoding.encode(text), encoding.decode(ids)

Every mistake that a user can make ends in a UserError that says which file, what is wrong and what to do.
"""

import difflib
import os
import pickle

import numpy as np
from errors import UserError

HERE = os.path.dirname(os.path.abspath(__file__))


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


def meta_of_model(dataset: str, vocab_size: int, named: bool) -> dict:
    """
    The meta of the data set whose encoding a model with vocab_size tokens was trained with; {} for GPT-2's encoding, also where the data set is
    not on this machine and vocab_size allows it. named: the user has named the data set. Raises UserError if it is missing or does not fit.
    """
    meta = {}
    if dataset:
        try:
            meta = load_meta(find_data_dir(dataset))
        except UserError:
            if vocab_size < 50257 or named:  # then it was not GPT-2's encoding
                raise
    own = meta and meta.get('encoding') != 'gpt2'  # GPT-2's vocabulary may be padded in the model
    if vocab_size < meta.get('vocab_size', 50257) or (own and vocab_size != meta['vocab_size']):
        raise UserError(
            f'the model has {vocab_size} tokens, but the encoding of {dataset or "GPT-2"} has {meta.get("vocab_size", 50257)}: name the data '
            'set that it was trained on with --dataset'
        )
    return meta
