"""
Files of token ids: their formats, and the windows of tokens that batches are made of.

    headerless     nanoGPT's train.bin and val.bin: uint16 ids, or uint32 where meta.pkl says so
    llm.c          256 int32 (20240520, version 1, number of tokens, zeros), then uint16 ids; also modded-nanogpt's format
    llm.c Llama 3  256 int32 (20240801, version 7, number of tokens, zeros), then uint32 ids

All integers are little-endian. The formats with a header are those of llm.c's dev/data/data_common.py.
"""

import codecs
import os
import weakref
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from errors import UserError

HEADER_BYTES = 256 * 4
SHARDS = {20240520: ('llm.c', 1, 'uint16'), 20240801: ('llm.c Llama 3', 7, 'uint32')}  # magic: name, version, dtype
MAX_OPEN = 64  # files that one process keeps open for a split
NOT_DATA = 'not the data itself'
FOREIGN = (  # the first bytes of other files, what they are, and what to do
    (b'version https://git-lfs.github.com/', f'a Git LFS pointer, {NOT_DATA}. Fetch it with: git lfs pull'),
    (b'/annex/objects/', f'a git-annex pointer, {NOT_DATA}. Fetch it with: git annex get'),
    (b'MMIDIDX', 'the index of a Megatron data set, whose files are not read here. Prepare shards from its text'),
    (b'\x93NUMPY', 'a NumPy array (.npy). Write its ids without a header: array.astype("uint16").tofile(...)'),
    (b'PK\x03\x04', 'a zip archive (a .npz, or a file of PyTorch), not a token file'),
    (b'PAR1', 'a Parquet file, which holds text. Prepare it with data/text/prepare.py'),
    (b'ARROW1', 'an Arrow file. Prepare its text with data/text/prepare.py'),
    (b'\x89HDF\r\n', 'an HDF5 file, not a token file'),
    (b'\x1f\x8b\x08', 'compressed with gzip. Decompress it first'),
    (b'\x28\xb5\x2f\xfd', 'compressed with zstd. Decompress it first'),
    (b'\xfd7zXZ\0', 'compressed with xz. Decompress it first'),
)


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens: where they start (in bytes), how many there are, and their little-endian dtype."""

    path: str
    format: str
    dtype: np.dtype
    offset: int
    tokens: int

    @property
    def bytes(self):
        return self.offset + self.tokens * self.dtype.itemsize


def recognize(path: str, dtype: str = 'uint16', known_count: bool = False, again: str = '') -> TokenFile:
    """
    Returns the TokenFile at path, judged by the first bytes and the size of the file.

    dtype: type of the ids in a headerless file. known_count: something else will confirm the number of tokens, so the
    width of the ids need not be guessed. again: how to make the file anew, for messages. Raises UserError, with the name
    of the file and what it is, for anything that is not a token file.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f'{path} is a link to {os.readlink(path)}, which does not exist')
    try:
        with open(path if os.path.isfile(path) or os.path.isdir(path) else os.devnull, 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(HEADER_BYTES)
            wide = _width_of_ids(f, size, np.dtype(dtype).itemsize)
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from None
    if size == 0:
        raise UserError(f'{path} is empty. {again}')
    for start, what in FOREIGN:
        if head.startswith(start):
            raise UserError(f'{path} is {what}')
    magic, version, count = (int.from_bytes(head[i : i + 4], 'little', signed=True) for i in (0, 4, 8))
    if magic in SHARDS:
        return _recognize_shard(path, size, magic, version, count)
    if 20240101 <= magic <= 20241231 and size >= HEADER_BYTES:  # llm.c's magic numbers are dates
        what = 'evaluation file (multiple-choice questions)' if magic == 20240522 else f'file with the magic {magic}'
        raise UserError(
            f"{path} is llm.c's {what}, not a token shard. Remove it from the folder, or name the shards by a pattern: "
            f"--dataset='{os.path.join(os.path.dirname(path), 'NAME_*.bin')}'"
        )
    if _is_text(head):
        raise UserError(f'{path} is text, not token ids: it begins {head[:40].decode("utf-8", "ignore")!r}. {again}')
    if _has_megatron_index(path):
        raise UserError(
            f'{path} belongs to the Megatron index {os.path.splitext(path)[0]}.idx, and Megatron data sets are not read here. '
            'Prepare shards from its text'
        )
    ids = np.dtype(dtype).newbyteorder('<')
    if wide and not known_count:
        raise UserError(
            f'{path} holds ids of {wide} bits, to judge by its zeros, but they are read as {ids.name}. Write them as uint16: '
            "np.fromfile(path, 'int64').astype('uint16').tofile(path)".replace('int64', f'int{wide}')
            + ("; or let meta.pkl say 'dtype': 'uint32'" if wide == 32 else '')
        )
    if size % ids.itemsize:
        raise UserError(f'{path} is truncated: {size:,} bytes are no whole number of {ids.name} tokens. {again}')
    return TokenFile(path, 'headerless', ids, 0, size // ids.itemsize)


def _recognize_shard(path, size, magic, version, count):
    name, known_version, dtype = SHARDS[magic]
    again = 'Copy or download it again'
    if size < HEADER_BYTES:
        raise UserError(f'{path} is truncated: its {size:,} bytes end within the header of a shard. {again}')
    if version != known_version:
        raise UserError(
            f'{path} is a shard of version {version} ({name}), but only version {known_version} is known here'
        )
    if count == 0:
        raise UserError(f'{path} is an empty shard: its header says 0 tokens. {again}, or remove it')
    file = TokenFile(path, name, np.dtype(dtype).newbyteorder('<'), HEADER_BYTES, count)
    if count < 0 or size != file.bytes:
        fault = 'truncated' if size < file.bytes else 'longer than its header says' if count > 0 else 'damaged'
        raise UserError(
            f'{path} is {fault}: its header says {count:,} tokens ({dtype}), so {file.bytes:,} bytes, but the file has '
            f'{size:,}. {again}'
        )
    return file


def _is_text(head):
    """True if the bytes are text in UTF-8. Token ids in uint16 practically never are: most have bytes below 32."""
    try:
        text = codecs.getincrementaldecoder('utf-8')().decode(head)
    except UnicodeDecodeError:
        return False
    return len(head) >= 64 and all(char.isprintable() or char in '\t\n\r\f' for char in text)


def _has_megatron_index(path):
    index = os.path.splitext(path)[0] + '.idx'
    if not os.path.isfile(index):
        return False
    with open(index, 'rb') as f:
        return f.read(7) == b'MMIDIDX'


def _width_of_ids(f, size, itemsize):
    """
    Returns 64 or 32 if the ids in the headerless file f are evidently that wide, and wider than itemsize bytes; else 0.
    Evident means: in blocks from its start, middle and end, the upper half of each id is 0, and the lower half mostly not.
    """
    blocks = []
    for start in (0, size // 2, max(size - 4096, 0)):
        f.seek(start // 8 * 8)
        block = f.read(4096)
        blocks.append(block[: len(block) // 8 * 8])
    sample = b''.join(blocks)
    for bits, half in ((64, '<u4'), (32, '<u2')):
        pairs = np.frombuffer(sample, half).reshape(-1, 2)
        low, high = pairs[:, 0], pairs[:, 1]
        if bits // 8 > itemsize and len(pairs) >= 16 and not high.any() and 2 * np.count_nonzero(low) > len(low):
            return bits
    return 0


class TokenFiles:
    """
    The tokens of one split in one or more TokenFiles, read in their order. len() is the number of tokens.

    A window is block_size + 1 consecutive tokens of one file: block_size inputs and, one token later, their targets.
    Files are opened when they are first read, at most MAX_OPEN at a time, and read without mapping them: mapped pages would
    count as resident memory, and a file that shrinks would kill the process.

    A problem with the data (a token outside the vocabulary, a file that cannot be read any more) raises no error in the
    middle of a step, where the other ranks would wait for this one. It is appended to the list `problems`, as (path, message),
    and the tokens in question become -1, which the loss ignores.
    """

    def __init__(self, files: list[TokenFile], block_size: int, problems: list[tuple[str, str]] | None = None):
        self.files, self.block_size = files, block_size
        self.problems = [] if problems is None else problems
        # cumulative counts, from 0: of windows at any position, for random draws, and of rows that do not overlap
        self.first_window = [0, *accumulate(max(file.tokens - block_size, 0) for file in files)]
        self.first_row = [0, *accumulate(-(-(file.tokens - 1) // block_size) for file in files)]
        self.windows, self.rows = self.first_window[-1], self.first_row[-1]
        self._descriptors = {}
        weakref.finalize(self, _close, self._descriptors)

    def __len__(self):
        return sum(file.tokens for file in self.files)

    def sample(self, batch_size: int, vocab_size: int) -> torch.Tensor:
        """
        Returns batch_size random windows, int64 (batch_size, block_size + 1), all equally likely. Draws one torch.randint,
        which is nanoGPT's own draw where there is one file.
        """
        places = []
        for i in torch.randint(self.windows, (batch_size,)).tolist():
            k = bisect_right(self.first_window, i) - 1
            places.append((k, i - self.first_window[k]))
        return self._windows_at(places, vocab_size)

    def consecutive(self, first: int, count: int, vocab_size: int) -> torch.Tensor:
        """
        Returns the rows first, ..., first + count - 1, int64 (count, block_size + 1), of those that cover the files without
        overlap; after the last row comes row 0 again. Row 0 starts at the first token, and the next one block_size tokens
        later. The last row of a file ends with it, and is filled up with -1.
        """
        return self._windows_at([self.place(i % self.rows) for i in range(first, first + count)], vocab_size)

    def place(self, row: int) -> tuple[int, int]:
        """Returns (index of the file, position in it) of the first token of a row."""
        k = bisect_right(self.first_row, row) - 1
        return k, (row - self.first_row[k]) * self.block_size

    def read(self, k: int, position: int, count: int) -> np.ndarray:
        """Returns up to count tokens of file k from position on, of the file's dtype. Raises OSError if they are gone."""
        file = self.files[k]
        count = min(count, file.tokens - position)
        width = file.dtype.itemsize
        data = os.pread(self._descriptor(k), count * width, file.offset + position * width)
        if len(data) != count * width:
            raise OSError(f'it has become shorter than {file.bytes:,} bytes')
        return np.frombuffer(data, file.dtype)

    def _windows_at(self, places, vocab_size):
        rows = np.full((len(places), self.block_size + 1), -1, np.int64)
        for row, (k, position) in zip(rows, places):
            try:
                tokens = self.read(k, position, self.block_size + 1)
            except OSError as e:
                path = self.files[k].path
                self.problems.append((path, f'{path} cannot be read any more: {e.strerror or e}'))
                continue
            row[: len(tokens)] = tokens
        if rows.max() >= vocab_size:
            r, i = np.argwhere(rows >= vocab_size)[0]
            k, position = places[r]
            path = self.files[k].path
            self.problems.append((path, outside_vocabulary(path, position + i, rows[r, i], vocab_size)))
            rows[rows >= vocab_size] = -1
        return torch.from_numpy(rows)

    def _descriptor(self, k):
        if k not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))  # the one that was opened first
            self._descriptors[k] = os.open(self.files[k].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[k]


def _close(descriptors):
    for descriptor in descriptors.values():
        os.close(descriptor)


def outside_vocabulary(path, position, token, vocab_size):
    """Returns the message about a token that the model has no embedding for."""
    return (
        f'token {token} at position {position:,} of {path} is outside the vocabulary of {vocab_size:,}. The model was made for '
        'other data (a checkpoint of another data set?), or the file is damaged or has another format: prepare the data again'
    )


def inputs_and_targets(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Splits windows (B, T + 1) into inputs and targets, contiguous int64 (B, T). A -1, where a window has no token, becomes 0 as
    an input and stays -1 as a target, which the loss ignores.
    """
    return rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous()
