"""
Finds and opens prepared data sets: token files in several formats, and meta.pkl without executing it.

    data = open_dataset('python_char', block_size=256)    # a name, a folder, or a pattern: 'fineweb10B/fineweb_*.bin'
    rows = data.train.sample(batch_size, vocab_size)      # random windows; data_order.py reads them in order
    data.meta                                             # {} for GPT-2 tokens, which have no meta.pkl

A folder holds train.bin and val.bin, or shards with train or val in their names, such as fineweb_train_000001.bin and
fineweb_val_000000.bin. token_files.py lists their formats. Run as a program, this module describes a data set:

$ python dataset.py fineweb10B

A user's mistake raises a UserError that says which file is wrong, why, and what to do.
"""

from errors import UserError  # isort: skip  first: it also reports a missing package

import difflib
import glob
import os
import pickle
import re
import sys

import torch.distributed as dist

from data_identity import check_same_encoding, make_manifest, without_fingerprints
from encoding import encoding_fingerprint, get_encoding
from regular_file import check_regular
from shell import python_command, quote
from token_files import TokenFiles, recognize

HERE = os.path.dirname(os.path.abspath(__file__))
SPLITS = ('train', 'val')
LLAMA_3 = {'vocab_size': 128256, 'encoding': 'llama-3'}  # the meta of shards in the Llama 3 format, which lack meta.pkl


class Dataset:
    """
    An open data set: .name for messages, .meta (see load_meta), and .train and .val, which are TokenFiles.

    .problem is None, or the message about the first fault found while reading: a token outside the vocabulary, or a
    file that can no longer be read. Reading continues without the faulty tokens, so that all ranks can save together
    and then call raise_problem().
    """

    def __init__(self, name: str, meta: dict, files: dict, block_size: int):
        self.name, self.meta, self.problems = name, meta, []
        self.splits = {split: TokenFiles(files[split], block_size, self.problems) for split in files}
        self.train, self.val = (self.splits.get(split) for split in SPLITS)
        self._manifest = None

    @property
    def problem(self) -> str | None:
        return self.problems[0][1] if self.problems else None

    def raise_problem(self) -> None:
        """Raises UserError on every rank if any rank has a problem. Collective."""
        for _, message in self._problems_of_all_ranks():
            raise UserError(message)

    def full_manifest(self) -> dict:
        """Returns the manifest with the fingerprints of all files. Reads a part of each file, once."""
        self._manifest = self._manifest or make_manifest(self)
        return self._manifest

    def manifest(self) -> dict:
        """
        Returns the manifest that check_same_data compares, a plain dict for the checkpoint. A file in which any rank
        found a problem loses its fingerprint, so that the run can resume once the file is repaired. Collective.
        """
        return without_fingerprints(
            self.full_manifest(), {os.path.basename(path) for path, _ in self._problems_of_all_ranks()}
        )

    def _problems_of_all_ranks(self):
        problems = [self.problems]
        if dist.is_initialized():
            problems *= dist.get_world_size()
            dist.all_gather_object(problems, self.problems)
        return [problem for one in problems for problem in one]


def open_dataset(dataset: str, block_size: int, splits: tuple[str, ...] = SPLITS) -> Dataset:
    """
    Opens a data set given as a name in data/, a folder, a pattern of shards or a single file. Reads a few kilobytes of
    each file. Raises UserError if it does not exist, if a file in it is not a token file, if its files do not belong
    together, or if no file holds a window of block_size + 1 tokens.
    """
    name, folder, paths = find_files(dataset)
    for split in splits:
        if not paths[split]:
            raise UserError(_missing(folder, split, paths))
    meta = _common_meta(sorted({os.path.dirname(path) for split in splits for path in paths[split]}))
    advice = f'Prepare the data again: {prepare_command(folder)}'
    files = {}
    for split in splits:
        expected = meta.get(f'{split}_tokens') if name == folder else None  # a pattern may select some of the shards
        dtype = meta.get('dtype', 'uint16')
        files[split] = [recognize(path, dtype, expected is not None, advice) for path in paths[split]]
        tokens = sum(file.tokens for file in files[split])
        if expected is not None and tokens != expected:
            where = f'{folder} ({len(paths[split])} shards of {split})' if len(paths[split]) > 1 else paths[split][0]
            raise UserError(
                f'{where} holds {tokens:,} tokens, but meta.pkl says {expected:,}: it is truncated, incomplete, '
                f'or from another preparation. {advice}'
            )
    _check_agreement(files)
    for split in splits:
        longest = max(files[split], key=lambda file: file.tokens)
        if longest.tokens < block_size + 1:
            where = longest.path if len(files[split]) == 1 else f'the longest shard of {split}, {longest.path},'
            raise UserError(
                f'{where} holds {longest.tokens:,} tokens, too few for block_size {block_size} and its target: at '
                f'least {block_size + 1:,} are needed. Set a smaller --block_size, or prepare more data'
            )
    if not meta and files[splits[0]][0].format == 'llm.c Llama 3':
        meta = dict(LLAMA_3)
    return Dataset(name, meta, files, block_size)


def find_files(dataset: str) -> tuple[str, str, dict]:
    """
    Returns (name, folder, {'train': paths, 'val': paths}) with sorted paths. name is the folder or the pattern. If a
    pattern matches only one split, the other split has the same names with train and val exchanged. Raises UserError if
    nothing matches, or if it is unclear which files are meant.
    """
    pattern, matches = _match(dataset)
    if not pattern:
        folder = find_data_dir(dataset)
        return folder, folder, _files_in(folder)
    paths = {split: [] for split in SPLITS}
    for path in matches:
        split = _split_of(path)
        if not split or not path.endswith('.bin'):
            recognize(path)  # raises a more specific error for other kinds of files
        if not split:
            raise UserError(f'{path} has neither train nor val in its name, so it is unclear to which split it belongs')
        paths[split].append(path)
    for split, other in (SPLITS, SPLITS[::-1]):
        if not paths[split]:
            start, file = os.path.split(pattern)
            found = _matches(os.path.join(start, file.replace(other, split)))
            paths[split] = [path for path in found if path.endswith('.bin') and _split_of(path) == split]
    return pattern, os.path.dirname(matches[0]) or '.', paths


def _match(dataset):
    """
    Returns (pattern, sorted paths) if dataset is a file or a pattern of files, and ('', []) if it is a folder or
    nothing. Ignores files other than .bin if any is .bin.
    """
    candidates = _candidates(dataset)
    if not any(os.path.isdir(folder) for folder in candidates):
        for pattern in candidates:
            matches = [path for path in _matches(pattern) if not os.path.isdir(path)]
            if matches:
                return pattern, [path for path in matches if path.endswith('.bin')] or matches
    return '', []


def _matches(pattern):
    """Returns the file of this name, which may hold brackets, or else the sorted files that match the pattern."""
    return [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))


def _candidates(name):
    name = os.path.expanduser(name)
    paths = (os.path.join(folder, name) for folder in ('data', os.path.join(HERE, 'data'), ''))
    return list(dict.fromkeys(paths)) if name else []  # an absolute path is the same in all folders


def _split_of(path):
    """Returns 'train', 'val', or None if the file's name has neither as a word. Raises UserError if it has both."""
    words = re.findall('(?<![a-z])(train|val)(?:id|idation)?(?![a-z])', os.path.basename(path).lower())
    if len(set(words)) > 1:
        raise UserError(f'{path} has both train and val in its name, so it is unclear to which split it belongs')
    return words[0] if words else None


def _files_in(folder):
    """Returns {'train': paths, 'val': paths} of a folder: train.bin and val.bin, or shards."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith('.bin') and not name.startswith('.'))
    except OSError as e:
        raise UserError(f'{folder} cannot be read: {e.strerror}') from None
    files = {split: [name for name in names if _split_of(name) == split] for split in SPLITS}
    pair = [name for name in ('train.bin', 'val.bin') if name in names]
    shards = [name for split in SPLITS for name in files[split] if name not in pair]
    if pair and shards:
        raise UserError(
            f'{folder} holds {" and ".join(pair)} and also {shards[0]}, so it is unclear which to read. Give '
            f'--dataset={quote(os.path.join(folder, pair[0]))}, '
            f'or a pattern such as --dataset={_pattern(folder, shards[0])}'
        )
    return {split: [os.path.join(folder, name) for name in files[split]] for split in SPLITS}


def _pattern(folder, shard):
    """Returns a pattern, quoted for a shell, that matches this shard and those named like it, in both splits."""
    return quote(os.path.join(glob.escape(folder), re.sub('train|val|[0-9]+', '*', glob.escape(shard))))


def _missing(folder, split, paths):
    """Returns the message about a split without files. Raises UserError if the folder has files of another kind."""
    there = next((os.path.basename(path) for other in SPLITS for path in paths[other]), None)
    if not there:
        for name in sorted(os.listdir(folder)):
            if name.endswith(('.bin', '.idx', '.npy')) and not name.startswith('.'):
                recognize(os.path.join(folder, name))
                there = name
    if there and there not in ('train.bin', 'val.bin'):
        return (
            f'there are no shards of the split {split}: {folder} has {there}, but no .bin file with the word {split} '
            'in its name'
        )
    return f'{os.path.join(folder, f"{split}.bin")} does not exist. Prepare the data first: {prepare_command(folder)}'


def _common_meta(folders):
    metas = [load_meta(folder) for folder in folders]
    for folder, meta in zip(folders, metas):
        if encoding_fingerprint(meta) != encoding_fingerprint(metas[0]):
            raise UserError(
                f'the shards in {folders[0]} and {folder} do not belong together: their encodings are '
                f'{encoding_fingerprint(metas[0])} and {encoding_fingerprint(meta)}'
            )
    return metas[0]


def _check_agreement(files):
    """Raises UserError if formats differ within a split, if id types differ at all, or if a file appears twice."""
    seen = {}
    for split, others in files.items():
        for file in others:
            for first, agrees in (
                (others[0], file.format == others[0].format),
                (next(iter(files.values()))[0], file.dtype == next(iter(files.values()))[0].dtype),
            ):
                if not agrees:
                    raise UserError(
                        f'{file.path} and {first.path} do not belong together: the first is {file.format} '
                        f'({file.dtype.name}), the second {first.format} ({first.dtype.name}). '
                        'All files of a data set must have one format'
                    )
            stat = os.stat(file.path)
            twin = seen.setdefault((stat.st_dev, stat.st_ino), (split, file.path))
            if twin[1] != file.path:
                where = f'both splits, {twin[0]} and {split}' if twin[0] != split else f'{split} twice'
                raise UserError(f'{twin[1]} and {file.path} are the same file, which must not be in {where}')


def find_meta(dataset: str) -> dict:
    """Returns the meta of a data set as open_dataset finds it, even if its token files are missing."""
    meta = load_meta(find_data_dir(dataset))
    paths = [] if meta else find_files(dataset)[2]['train']
    return dict(LLAMA_3) if paths and recognize(paths[0]).format == 'llm.c Llama 3' else meta


def find_data_dir(name: str) -> str:
    """
    Returns the folder of data set `name`, which may also be a path to a folder or a pattern of files. Looks for
    ./data/name, data/name next to this file, and name, and prefers the first that holds tokens. Raises UserError, with
    the known names, if there is none.
    """
    pattern, matches = _match(name)
    if pattern:
        return os.path.dirname(matches[0]) or '.'
    candidates = _candidates(name)
    found = [folder for folder in candidates if os.path.isdir(folder)]
    if not found:
        known = _known_data_sets()
        known.sort(key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())  # nearest first
        raise UserError(
            f'there is no data set {name!r}: no folder and no file {", ".join(candidates)}. '
            f'Known: {", ".join(known) or "none"}'
        )
    return next((folder for folder in found if glob.glob(os.path.join(glob.escape(folder), '*train*.bin'))), found[0])


def _known_data_sets():
    known = set()
    for root in ('data', os.path.join(HERE, 'data')):
        for file in ('prepare.py', 'train.bin'):
            known.update(os.path.basename(os.path.dirname(path)) for path in glob.glob(f'{glob.escape(root)}/*/{file}'))
    return sorted(known)


def prepare_command(data_dir: str) -> str:
    """Returns the command that prepares data_dir, for error messages."""
    own, text = os.path.join(data_dir, 'prepare.py'), os.path.join(HERE, 'data', 'text', 'prepare.py')
    if not os.path.exists(own):
        return python_command(text, 'YOUR_FILES', '--out', data_dir)
    return python_command(own, *['YOUR_FILES'] * (os.path.exists(text) and os.path.samefile(own, text)))


class _PlainUnpickler(pickle.Unpickler):
    """Loads only dicts, lists, strings, numbers and the like: without imports, a pickle cannot run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it imports {module}.{name}, which could run code')


def load_meta(data_dir: str) -> dict:
    """
    Returns data_dir's meta.pkl as a dict, {} if there is none. Executes nothing. Raises UserError if it is unusable.
    """
    path = os.path.join(data_dir, 'meta.pkl')
    if not os.path.exists(path):
        return {}
    try:
        check_regular(path)
        with open(path, 'rb') as f:
            meta = _PlainUnpickler(f).load()
        if not isinstance(meta, dict):
            raise ValueError(f'it holds a {type(meta).__name__} instead of a dict')
        if type(meta.get('vocab_size')) is not int or meta['vocab_size'] < 1:
            raise ValueError(f'its vocab_size is {meta.get("vocab_size", "missing")!r}')
        if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
            raise ValueError(f'its dtype is {meta["dtype"]!r}, not uint16 or uint32')
        for field in (f'{split}_tokens' for split in SPLITS):
            if type(meta.get(field, 0)) is not int:
                raise ValueError(f'its {field} is {meta[field]!r}, not a whole number')
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    except Exception as error:  # a corrupt pickle can raise nearly anything
        raise UserError(
            f'{path} is not a usable meta.pkl: {error}. Prepare the data again: {prepare_command(data_dir)}'
        ) from error
    return meta


def meta_of_model(dataset: str, vocab_size: int, named: bool, saved: dict | None = None) -> dict:
    """
    Returns the meta of the data set that a model with vocab_size tokens was trained on. Returns {} for GPT-2's
    encoding, also if the data set is not on this machine and vocab_size allows GPT-2's. named: the user has named the
    data set. saved: the manifest in the checkpoint. Raises UserError if the data set is missing or has another
    encoding.
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
            f'the model has {vocab_size} tokens, but the encoding of {dataset or "GPT-2"} has '
            f'{meta.get("vocab_size", 50257)}: name the data set that it was trained on with --dataset'
        )
    check_same_encoding(saved, meta, dataset or 'GPT-2')
    return meta


def describe(data: Dataset) -> str:
    """Returns the lines that `python dataset.py FOLDER` prints."""
    lines = [
        f'{data.name}: tokens of {data.train.files[0].dtype.name}, vocabulary of {data.meta.get("vocab_size", 50257):,}'
    ]
    lines[0] += f', encoding: {encoding_fingerprint(data.meta)}'
    for split, tokens in data.splits.items():
        names = [os.path.basename(tokens.files[i].path) for i in (0, -1)]
        span = names[0] if len(tokens.files) == 1 else f'{len(tokens.files)} shards, {names[0]} to {names[1]}'
        lines.append(f'{split}: {len(tokens):,} tokens in {span} ({tokens.files[0].format})')
    first = data.train.read(0, 0, 32).tolist()
    lines.append(f'first tokens of train: {" ".join(map(str, first))}')
    try:
        lines.append(f'decoded: {get_encoding(data.meta).decode(first)!r}')
    except UserError as e:
        lines.append(f'not decoded: {e}')
    return '\n'.join(lines)


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        print(
            f'usage: {python_command(__file__, "FOLDER")}\n'
            'FOLDER may also be a name in data/, or a quoted pattern of shards'
        )
        sys.exit(0 if sys.argv[1:] in (['-h'], ['--help']) else 2)
    sys.stdout.reconfigure(errors='backslashreplace')  # for characters that a terminal cannot show
    print(describe(open_dataset(sys.argv[1], block_size=1)))
