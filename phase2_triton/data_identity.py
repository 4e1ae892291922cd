"""
Checks that a resumed run continues on the data it started with.

A manifest is a plain dict in the checkpoint: the encoding, and for each split its files with name, size in bytes,
number of tokens and fingerprint. Files may be renamed or moved: only their sizes, contents and order are compared.
"""

import hashlib
import os

from encoding import encoding_fingerprint
from errors import UserError

WHOLE = 1 << 20  # bytes; of a larger file only BLOCKS blocks are read, spread evenly from its start to its end
BLOCKS, BLOCK = 16, 4096
ACCEPTED = 'the checkpoint does not record its training data (it is older, or from nanoGPT), so {name} is accepted'


def make_manifest(data) -> dict:
    """Returns the manifest of a Dataset. Reads at most 1 MB of each file. An unreadable file has no fingerprint."""
    return {
        'encoding': encoding_fingerprint(data.meta),
        **{split: [_describe(file) for file in tokens.files] for split, tokens in data.splits.items()},
    }


def _describe(file):
    try:
        fingerprint = _fingerprint(file.path, file.bytes)
    except OSError:  # deleted, for example; an open file can still be trained on, and its run must save
        fingerprint = ''
    return {'file': os.path.basename(file.path), 'bytes': file.bytes, 'tokens': file.tokens, 'fingerprint': fingerprint}


def quick_fingerprint(data) -> int:
    """
    Returns a number below 2 ** 48 that tells data sets apart by their encoding, the sizes of all files and the content
    of the first file of each split. It reads at most 1 MB of each of these files.
    """
    described = [encoding_fingerprint(data.meta)]
    for tokens in data.splits.values():
        described += [(file.bytes, file.tokens) for file in tokens.files] + [_describe(tokens.files[0])['fingerprint']]
    return int.from_bytes(hashlib.blake2b(repr(described).encode(), digest_size=6).digest())


def in_both_splits(manifest: dict) -> str:
    """Returns a warning about a validation file with the size and fingerprint of a training file, '' if none has."""
    train = {(e['bytes'], e['fingerprint']): e['file'] for e in manifest.get('train', ()) if e['fingerprint']}
    for entry in manifest.get('val', ()):
        twin = train.get((entry['bytes'], entry['fingerprint']))
        if twin:
            return (
                f'{twin} of train and {entry["file"]} of val have the same content, so the validation loss is '
                'measured on training data'
            )
    return ''


def without_fingerprints(manifest: dict, names: set[str]) -> dict:
    """Returns the manifest with empty fingerprints, which match any, for the files with these names."""
    blank = lambda entry: {**entry, 'fingerprint': ''} if entry['file'] in names else entry
    return {k: v if k == 'encoding' else [blank(entry) for entry in v] for k, v in manifest.items()}


def _fingerprint(path, size):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, 'rb', buffering=0) as f:
        if size <= WHOLE:
            digest.update(f.read())
        else:
            for i in range(BLOCKS):
                digest.update(os.pread(f.fileno(), BLOCK, (size - BLOCK) * i // (BLOCKS - 1)))
    return digest.hexdigest()


def check_manifest(saved):
    """Raises UserError unless saved, from a checkpoint, is None or has the structure of a manifest."""
    fields = {'file': str, 'bytes': int, 'tokens': int, 'fingerprint': str}
    sound = saved is None or (
        isinstance(saved, dict)
        and isinstance(saved.get('encoding'), str)
        and all(
            isinstance(entries, list)
            and all(isinstance(e, dict) and all(isinstance(e.get(k), t) for k, t in fields.items()) for e in entries)
            for split, entries in saved.items()
            if split != 'encoding'
        )
    )
    if not sound:
        raise UserError('the checkpoint is damaged: its description of the data (resume, data) cannot be read')


def check_same_data(saved: dict | None, data) -> None:
    """
    Raises UserError, naming the first difference, if the Dataset `data` is not the one that the manifest `saved`
    describes. A manifest without files, that of an imported model, describes only an encoding. Prints a line if `saved`
    is None. Reads the data again, so call it only on a resume.
    """
    check_manifest(saved)
    if saved is None:
        return print(ACCEPTED.format(name=data.name))
    check_same_encoding(saved, data.meta, data.name)
    now = data.manifest()
    for split in [split for split in data.splits if split in saved]:
        difference = _first_difference(split, saved[split], now[split])
        if difference:
            raise UserError(
                f'{data.name} is not the data that the checkpoint was trained on: {difference}. Resume with the '
                'same data (--dataset), or start a new run in another --out_dir'
            )


def check_same_encoding(saved: dict | None, meta: dict, name: str) -> None:
    """Raises UserError if the encoding of `meta` (see load_meta) is not that of the manifest `saved`."""
    check_manifest(saved)
    if saved is not None and saved['encoding'] != encoding_fingerprint(meta):
        raise UserError(
            f'the encoding of {name} is {encoding_fingerprint(meta)}, but the checkpoint was trained with '
            f'{saved["encoding"]}: give the data set that it was trained on (--dataset)'
        )


def _first_difference(split, before, now):
    if len(before) != len(now):
        more, less, change = (now, before, 'is new') if len(now) > len(before) else (before, now, 'is missing')
        known = {(entry['bytes'], entry['fingerprint']) for entry in less}
        extra = next((entry for entry in more if (entry['bytes'], entry['fingerprint']) not in known), more[-1])
        return f'{split} file {extra["file"]} {change} ({len(now)} files instead of {len(before)})'
    for old, new in zip(before, now):
        where = f'{split} file {new["file"]}' + (f' (earlier {old["file"]})' if old['file'] != new['file'] else '')
        for field, unit in (('tokens', ' tokens'), ('bytes', ' bytes')):
            if old[field] != new[field]:
                return f'{where} has {new[field]:,}{unit} instead of {old[field]:,}'
        if old['fingerprint'] and old['fingerprint'] != new['fingerprint']:
            return f'{where} has other contents (same size)' if new['fingerprint'] else f'{where} cannot be read'
    return ''
