"""
Reads files of token ids: recognizes their formats and cuts the windows of tokens that make up batches.

    headerless     nanoGPT's train.bin and val.bin: uint16 ids, or uint32 if meta.pkl says so
    llm.c          256 int32 (20240520, version 1, number of tokens, zeros), then uint16 ids; modded-nanogpt uses it too
    llm.c Llama 3  256 int32 (20240801, version 7, number of tokens, zeros), then uint32 ids

All integers are little-endian. The formats with a header are those of llm.c's dev/data/data_common.py.
"""

import codecs
import glob
import os
import resource
import weakref
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from errors import UserError
from regular_file import check_regular
from shell import quote

HEADER_BYTES = 256 * 4
SHARDS = {20240520: ('llm.c', 1, 'uint16'), 20240801: ('llm.c Llama 3', 7, 'uint32')}  # magic: name, version, dtype
OPEN_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # ulimit -n: a save, a log and the ranks need files too
# files that one process keeps open for a split
MAX_OPEN = 64 if OPEN_LIMIT == resource.RLIM_INFINITY else max(1, min(64, OPEN_LIMIT // 8))
NOT_DATA = 'not the data itself'
FOREIGN = (  # first bytes of other files, their kind, and advice
    (b'version https://git-lfs.github.com/', f'a Git LFS pointer, {NOT_DATA}. Fetch it with: git lfs pull'),
    (b'/annex/objects/', f'a git-annex pointer, {NOT_DATA}. Fetch it with: git annex get'),
    (b'MMIDIDX', 'the index of a Megatron data set, which is not supported. Prepare shards from its text'),
    (b'\x93NUMPY', 'a NumPy array (.npy). Write its ids without a header: array.astype("uint16").tofile(...)'),
    (b'PK\x03\x04', 'a zip archive (a .npz, or a file of PyTorch), not a token file'),
    (b'PAR1', 'a Parquet file, which holds text. Prepare it with data/text/prepare.py'),
    (b'ARROW1', 'an Arrow file. Prepare its text with data/text/prepare.py'),
    (b'\x80\x04\x95', 'a pickle. Write its ids without a header: numpy.array(ids, "uint16").tofile(...)'),
    (b'\x80\x05\x95', 'a pickle. Write its ids without a header: numpy.array(ids, "uint16").tofile(...)'),
    (b'\x89HDF\r\n', 'an HDF5 file, not a token file'),
    (b'\x1f\x8b\x08', 'compressed with gzip. Decompress it first'),
    (b'\x28\xb5\x2f\xfd', 'compressed with zstd. Decompress it first'),
    (b'BZh91AY&SY', 'compressed with bzip2. Decompress it first'),
    (b'\xfd7zXZ\0', 'compressed with xz. Decompress it first'),
)


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens: the offset of the first (in bytes), their number, and their little-endian dtype."""

    path: str
    format: str
    dtype: np.dtype
    offset: int
    tokens: int

    @property
    def bytes(self):
        return self.offset + self.tokens * self.dtype.itemsize


def recognize(path: str, dtype: str = 'uint16', known_count: bool = False, advice: str = '') -> TokenFile:
    """
    Returns the TokenFile at path, recognized by its first bytes and its size.

    dtype: type of the ids in a headerless file. known_count: the caller knows the number of tokens, so the width of the
    ids need not be guessed. advice: how to prepare the file again, for messages. Raises UserError, which names the file
    and its kind, for anything that is not a token file.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f'{path} is a link to {os.readlink(path)}, which does not exist')
    try:
        check_regular(path)
        with open(path, 'rb') as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(HEADER_BYTES)
            wide = _width_of_ids(f, size, np.dtype(dtype).itemsize)
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from None
    if size == 0:
        raise UserError(f'{path} is empty. {advice}'.rstrip())
    for start, description in FOREIGN:
        if head.startswith(start):
            raise UserError(f'{path} is {description}')
    magic, version, count = (int.from_bytes(head[i : i + 4], 'little', signed=True) for i in (0, 4, 8))
    if magic in SHARDS:
        return _recognize_shard(path, size, magic, version, count)
    if int.from_bytes(head[:4], 'big') in SHARDS:
        raise UserError(f'{path} is a shard in big-endian byte order, but only little-endian shards are supported')
    if 20240101 <= magic <= 20241231 and size >= HEADER_BYTES:  # llm.c's magic numbers are dates
        kind = 'evaluation file (multiple-choice questions)' if magic == 20240522 else f'file with the magic {magic}'
        pattern = quote(os.path.join(glob.escape(os.path.dirname(path)), 'NAME_*.bin'))
        raise UserError(
            f"{path} is llm.c's {kind}, not a token shard. Move it to another folder, or select the shards with a "
            f'pattern such as --dataset={pattern}'
        )
    if _is_text(head):
        raise UserError(
            f'{path} is text, not token ids: it begins {head[:40].decode("utf-8", "ignore")!r}. {advice}'.rstrip()
        )
    if _has_megatron_index(path):
        raise UserError(
            f'{path} belongs to the Megatron index {os.path.splitext(path)[0]}.idx, and Megatron data sets are not '
            'supported. Prepare shards from its text'
        )
    ids = np.dtype(dtype).newbyteorder('<')
    if wide and not known_count:
        raise UserError(
            f'{path} seems to hold ids of {wide} bits (half of its bytes are zeros), but they would be read as '
            f"{ids.name}. Write them as uint16, or as uint32 with 'dtype': 'uint32' in meta.pkl. {advice}".rstrip()
        )
    if size % ids.itemsize:
        raise UserError(
            f'{path} is truncated: {size:,} bytes are not a whole number of {ids.name} tokens. {advice}'.rstrip()
        )
    return TokenFile(path, 'headerless', ids, 0, size // ids.itemsize)


def _recognize_shard(path, size, magic, version, count):
    name, known_version, dtype = SHARDS[magic]
    advice = 'Copy or download it again'
    if size < HEADER_BYTES:
        raise UserError(f'{path} is truncated: its {size:,} bytes end within the header of a shard. {advice}')
    if version != known_version:
        raise UserError(
            f'{path} is a shard of version {version} ({name}), but only version {known_version} is supported'
        )
    if count == 0:
        raise UserError(f'{path} is an empty shard: its header says 0 tokens. {advice}, or remove it')
    file = TokenFile(path, name, np.dtype(dtype).newbyteorder('<'), HEADER_BYTES, count)
    if count < 0 or size != file.bytes:
        fault = 'truncated' if size < file.bytes else 'longer than its header says' if count > 0 else 'damaged'
        raise UserError(
            f'{path} is {fault}: its header says {count:,} tokens ({dtype}), so {file.bytes:,} bytes, but the file '
            f'has {size:,}. {advice}'
        )
    return file


def _is_text(head):
    """
    Returns whether the bytes are text in UTF-8. Token ids in uint16 practically never are: most have bytes below 32.
    """
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
    In blocks from its start, middle and end, the upper half of each id must be 0, and the lower half mostly not.
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
    The tokens of one split, stored in one or more TokenFiles in order. len() is the number of tokens.

    A window is block_size + 1 consecutive tokens of one file: block_size inputs and, one token later, their targets.
    Files are opened on first use, at most MAX_OPEN at a time, and not mapped into memory: mapped pages would count as
    resident memory, and a file that shrinks would kill the process.

    A problem with the data (a token outside the vocabulary, a file that can no longer be read) does not raise an error
    in the middle of a step, where the other ranks would wait for this one. It is appended to the list `problems`, as
    (path, message). The faulty tokens become -1, which the loss ignores. A window without any valid token is replaced
    by an earlier one, because the mean of no losses would be NaN.
    """

    def __init__(self, files: list[TokenFile], block_size: int, problems: list[tuple[str, str]] | None = None):
        self.files, self.block_size = files, block_size
        self.problems = [] if problems is None else problems
        # cumulative counts, from 0, of windows at any position, for random draws, and of rows, which do not overlap
        self.first_window = [0, *accumulate(max(file.tokens - block_size, 0) for file in files)]
        self.first_row = [0, *accumulate(-(-(file.tokens - 1) // block_size) for file in files)]
        self.windows, self.rows = self.first_window[-1], self.first_row[-1]
        self.spare = np.zeros(block_size + 1, np.int64)  # an earlier window
        self._descriptors = {}
        weakref.finalize(self, _close, self._descriptors)

    def __len__(self):
        return sum(file.tokens for file in self.files)

    def sample(self, batch_size: int, vocab_size: int) -> torch.Tensor:
        """
        Returns batch_size random windows, int64 (batch_size, block_size + 1), all equally likely. Draws one
        torch.randint, which for a single file is nanoGPT's own draw.
        """
        rows, places = self._allocate(batch_size), []
        for i in torch.randint(self.windows, (batch_size,)).tolist():
            k = bisect_right(self.first_window, i) - 1
            places.append((k, i - self.first_window[k]))
        return self._fill(rows, places, vocab_size)

    def consecutive(self, first: int, count: int, vocab_size: int) -> torch.Tensor:
        """
        Returns the rows first, ..., first + count - 1 as int64 (count, block_size + 1). Rows cover the files without
        overlap: row 0 starts at the first token, each further row block_size tokens later, and the last row of a file
        is padded with -1. The last row of all is followed by row 0.
        """
        rows = self._allocate(count)
        return self._fill(rows, [self.place(i % self.rows) for i in range(first, first + count)], vocab_size)

    def place(self, row: int) -> tuple[int, int]:
        """Returns (index of the file, position in it) for the first token of a row."""
        k = bisect_right(self.first_row, row) - 1
        return k, (row - self.first_row[k]) * self.block_size

    def read(self, k: int, position: int, count: int) -> np.ndarray:
        """
        Returns up to count tokens of file k from position on, in the file's dtype. Raises UserError if they are gone.
        """
        file = self.files[k]
        count = min(count, file.tokens - position)
        width = file.dtype.itemsize
        try:
            data = os.pread(self._descriptor(k), count * width, file.offset + position * width)
            if len(data) != count * width:
                raise OSError(f'it has become shorter than {file.bytes:,} bytes')
        except OSError as e:
            raise UserError(unreadable(file.path, e)) from None
        return np.frombuffer(data, file.dtype)

    def _allocate(self, count):
        """Returns count rows of -1. Call it before making a list of places, which would fill the memory slowly."""
        return torch.full((count, self.block_size + 1), -1).numpy()

    def _fill(self, rows, places, vocab_size):
        problems = len(self.problems)
        for row, (k, position) in zip(rows, places):
            try:
                tokens = self.read(k, position, self.block_size + 1)
            except UserError as e:
                self.problems.append((self.files[k].path, str(e)))
                continue
            row[: len(tokens)] = tokens
        if rows.max() >= vocab_size:
            r, i = np.argwhere(rows >= vocab_size)[0]
            k, position = places[r]
            path = self.files[k].path
            self.problems.append((path, outside_vocabulary(path, position + i, rows[r, i], vocab_size)))
            rows[rows >= vocab_size] = -1
        if len(self.problems) > problems:
            rows[(rows[:, 1:] < 0).all(axis=1)] = self.spare
        else:
            self.spare = rows[-1].copy()
        return torch.from_numpy(rows)

    def _descriptor(self, k):
        if k not in self._descriptors:
            if len(self._descriptors) == MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))  # the file opened first
            self._descriptors[k] = os.open(self.files[k].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[k]


def _close(descriptors):
    for descriptor in descriptors.values():
        os.close(descriptor)


def unreadable(path, error):
    """Returns the message about a file whose reading raised the OSError."""
    return f'{path} can no longer be read: {error.strerror or error}'


def outside_vocabulary(path, position, token, vocab_size):
    """Returns the message about a token without an embedding in the model."""
    return (
        f'token {token} at position {position:,} of {path} is outside the vocabulary of {vocab_size:,}. The model was '
        'made for other data (a checkpoint of another data set?), or the file is damaged or has another format: '
        'prepare the data again'
    )


def inputs_and_targets(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Splits windows (B, T + 1) into inputs and targets, contiguous int64 (B, T). A -1, where a window has no token,
    becomes 0 in the inputs and stays -1 in the targets, which the loss ignores.
    """
    return rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous()
