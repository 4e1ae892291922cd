"""
Finds damage in checkpoint files by their checksums.

torch.save writes a zip archive. The archive holds the CRC-32 of each member (the bytes of a tensor, or the pickle that
refers to them), but torch.load does not compare them. add_crc() appends a comment to the archive with the CRC-32 of all
bytes outside the members, so that check_archive() detects a change in any byte of the file. Other programs ignore the
comment. In a file without one, such as nanoGPT's, check_archive() compares the members only.

zlib.crc32 reads 4 to 6 GB/s per core from the page cache on an AMD EPYC. It releases Python's global lock, so threads
share the members. A checkpoint of GPT-2 124M with AdamW's state (1.5 GB) takes about 0.3 s on one core.
"""

import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from regular_file import check_regular

COMMENT = b'CRC-32 of all bytes outside the members: '  # 8 hexadecimal digits follow
CHUNK = 64 * 2**20  # bytes


class DamagedFile(Exception):
    """Raised for a damaged file; the message describes the damage."""


def add_crc(f: BinaryIO) -> None:
    """Appends the comment to the archive that torch.save wrote to f, a file open for reading and writing."""
    members = _members(f)
    f.seek(-2, os.SEEK_END)  # an archive ends with the length of its comment
    f.write(struct.pack('<H', len(COMMENT) + 8) + COMMENT)
    crc = _crc32_outside(f, members, f.tell())
    f.seek(0, os.SEEK_END)
    f.write(b'%08x' % crc)


def check_archive(path: str, contents: bool = True) -> None:
    """
    Raises DamagedFile if a byte changed since torch.save and add_crc() wrote the file, OSError if it is unreadable.
    contents: also checks the tensors, which takes the time of reading the whole file.
    """
    check_regular(path)
    with open(path, 'rb') as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        if f.read(4) != b'PK\3\4':
            raise DamagedFile('torch.save did not write it, or its first bytes were overwritten')
        try:
            members = _members(f)
            # without a comment, as torch.save writes it, an archive ends with a record of 22 bytes whose last byte is 0
            f.seek(-22, os.SEEK_END)
            end = f.read()
            if not (end.startswith(b'PK\5\6') and end.endswith(b'\0\0')):
                outside = _crc32_outside(f, members, size - 8)
                f.seek(size - 8 - len(COMMENT))
                if f.read() != COMMENT + b'%08x' % outside:
                    raise DamagedFile('the checksum (CRC-32) of its headers is wrong')
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OSError) as e:
            raise DamagedFile(f'it was cut short, or its headers were overwritten: {e}') from None
        if not contents:
            return
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            found = _in_threads(lambda member: zlib.crc32(view[member[0] : member[1]]), members)
    for (start, stop, expected), crc in zip(members, found):
        if crc != expected:
            raise DamagedFile(f'the checksum (CRC-32) of its bytes {start:,} to {stop:,} is wrong')


def fingerprint(path: str) -> str:
    """
    Returns the CRC-32 of all bytes outside the members, as 8 hexadecimal digits. These bytes hold the members' CRC-32s,
    so checkpoints of different content have different fingerprints, and no tensor is read.
    """
    with open(path, 'rb') as f:
        return f'{_crc32_outside(f, _members(f), os.path.getsize(path)):08x}'


def crc32_of_chunks(path: str) -> list[int]:
    """Returns the CRC-32 of each 64 MiB of the file. Raises OSError if it is unreadable."""

    def crc32(start):
        with open(path, 'rb') as f:
            f.seek(start)
            return zlib.crc32(f.read(CHUNK))

    return _in_threads(crc32, range(0, os.path.getsize(path), CHUNK))


def _in_threads(function, arguments: Iterable) -> list:
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 4)) as pool:
        return list(pool.map(function, arguments))


def _members(f: BinaryIO) -> list[tuple[int, int, int]]:
    """Returns (first byte, byte after the last, CRC-32) for the data of each member, in the order of the file."""
    members = []
    with zipfile.ZipFile(f) as archive:
        for info in archive.infolist():
            f.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack('<HH', f.read(4))
            start = info.header_offset + 30 + name_length + extra_length
            members.append((start, start + info.file_size, info.CRC))
    return sorted(members)


def _crc32_outside(f: BinaryIO, members: list[tuple[int, int, int]], size: int) -> int:
    """Returns the CRC-32 of the first `size` bytes of f, without those of the members."""
    crc, position = 0, 0
    for start, stop in [*((start, stop) for start, stop, _ in members), (size, size)]:
        if start < position:
            raise ValueError('its members overlap')
        f.seek(position)
        crc, position = zlib.crc32(f.read(start - position), crc), stop
    return crc
