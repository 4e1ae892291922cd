"""
Reads all text that becomes training data, so that the same text gives the same tokens from every kind of file.

    reader = TextReader(['corpus/', 'more.jsonl.gz'], field='text')
    reader.report()                                       # prints which files are read, which are skipped, and why
    for size, pieces in reader.documents(update): ...     # pieces: the consecutive parts of one document

Files: .txt (one document, or several with a separator), .jsonl and .ndjson (one document per line), .parquet (one
document per row); also compressed with gzip, bzip2, xz or zstd, recognized by the first bytes. Text is UTF-8. A byte
order mark at the start of a document is dropped, and every kind of line end (CR LF, CR) becomes a newline. Hidden files
are never read.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from errors import UserError, first_line
from shell import pip_install, python_command, quote_path

BLOCK = 1 << 20  # bytes read at a time
FINGERPRINT = 1 << 16  # bytes at the start and the end of a file that identify it
SAMPLE = 64 << 20  # bytes of a file that are read to guess its encoding
KINDS = {'.txt': 'txt', '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.parquet': 'parquet'}
COMPRESSIONS = {'.gz': 'gzip', '.bz2': 'bzip2', '.xz': 'xz', '.zst': 'zstd'}
# texts about a data set, which are read only if they are named explicitly
NOTES = ('license', 'licence', 'copying', 'notice', 'readme', 'changelog', 'authors', 'citation', 'requirements')
KNOWN = '.txt, .jsonl or .parquet file (or one of these with .gz, .bz2, .xz or .zst)'
ENDOFTEXT_TEXT = '<|endoftext|>'
NAMED = 10  # number of files that a report names


class TextReader:
    """
    Reads the documents in files and folders.

    inputs: files and folders. field: the field of .jsonl records and the column of .parquet files that holds the text.
    separator: the text between documents in .txt files; '' if each file is one document. `paths` lists the files to
    read, sorted, each once; `skipped` is a list of (path, reason); `bytes` is the size of all files together. Raises
    UserError if there is no file.
    """

    def __init__(self, inputs: Iterable[str], field: str = 'text', separator: str = ''):
        self.field, self.separator = field, separator
        self.paths, self.skipped = find_files(inputs)
        self.bytes = sum(map(os.path.getsize, self.paths))
        self.empty = 0  # documents without text, which documents() leaves out
        self.unsplit = set()  # .txt files that hold <|endoftext|> as text
        self.whole = set()  # .txt files in which the separator does not occur

    def fetch(self, index: int) -> str:
        """Returns the path of file number `index`."""
        return self.paths[index]

    def release(self, end: int) -> None:
        """Is called once the files before number `end` are no longer needed."""

    def bytes_before(self, index: int) -> int:
        """Returns the size of the files before number `index`."""
        return sum(map(os.path.getsize, self.paths[:index]))

    def identity(self) -> dict:
        """Returns a dict that identifies the documents: the files (names, sizes, starts and ends) and the options."""
        digest = hashlib.sha256()
        for path in self.paths:
            with opened_raw(path) as file:
                size = os.path.getsize(path)
                start = file.read(FINGERPRINT)
                file.seek(max(0, size - FINGERPRINT))
                digest.update(repr((os.path.basename(path), size, start, file.read())).encode())
        return {
            'files': len(self.paths),
            'bytes': self.bytes,
            'contents': digest.hexdigest(),
            'field': self.field,
            'separator': self.separator,
        }

    def report(self) -> None:
        """Prints which files are read, by kind, and which are skipped, with reasons."""
        print(f'reading {len(self.paths)} {plural("file", self.paths)}, {self.bytes:,} bytes: {by_kind(self.paths)}')
        reasons = Counter(reason for _, reason in self.skipped)
        for reason, count in reasons.most_common():
            names = [path for path, why in self.skipped if why == reason]
            print(f'skipped {count} {plural("file", names)}: {listed(names)}: {reason}')

    def report_documents(self) -> None:
        """Prints, after documents(), which documents were skipped and which option may have been forgotten."""
        if self.empty:
            print(f'skipped {self.empty:,} {plural("document", range(self.empty))} without text')
        if self.unsplit:
            print(
                f'note: {listed(sorted(self.unsplit))}: {ENDOFTEXT_TEXT} was read as text; to separate '
                f"documents at it, pass --separator '{ENDOFTEXT_TEXT}'"
            )
        if self.whole:
            hint = "; bash writes a line end as $'\\n'" if '\\n' in self.separator else ''
            print(
                f'note: {listed(sorted(self.whole))}: read as one document each, because the separator '
                f'{self.separator!r} does not occur{hint}'
            )

    def documents(
        self, update: Callable[[int], None] = lambda n: None, start: int = 0
    ) -> Iterator[tuple[int, Iterable[str]]]:
        """
        Yields (size in bytes, consecutive pieces of text) for each document with text, starting at file number `start`.
        Calls update with the bytes just read. Raises UserError for a file whose contents do not match its name.
        """
        self.empty, self.unsplit, self.whole = 0, set(), set()
        for path in self.paths[start:]:
            yield from self.read(path, update)

    def read(self, path: str, update: Callable[[int], None] = lambda n: None) -> Iterator[tuple[int, Iterable[str]]]:
        """Yields (size in bytes, consecutive pieces of text) for each document of one file."""
        reader = {'txt': self._txt, 'jsonl': self._jsonl, 'parquet': self._parquet}[kind_of(path) or 'txt']
        for size, pieces in reader(path, update):
            if size:
                yield size, pieces
            else:
                self.empty += 1

    def _txt(self, path, update):
        if not self.separator:
            pieces = self._watched(path, update)
            first = next(pieces, '')
            yield os.path.getsize(path) if first else 0, itertools.chain([first], pieces)
            return
        self.whole.add(path)
        parts, rest = [], ''  # the unfinished document; rest may end within a separator
        for piece in read_pieces(path, update):
            *complete, rest = (rest + piece).split(self.separator)
            for text in complete:
                self.whole.discard(path)
                yield as_document(''.join([*parts, text]).strip('\n'))
                parts = []
            parts.append(rest[: -len(self.separator)])
            rest = rest[-len(self.separator) :]
        yield as_document(''.join([*parts, rest]).strip('\n'))

    def _watched(self, path, update):
        for piece in read_pieces(path, update):
            if ENDOFTEXT_TEXT in piece:
                self.unsplit.add(path)
            yield piece

    def _jsonl(self, path, update):
        number = 0
        with opened(path, update) as stream:
            for block in stream:
                for line in block.splitlines():  # a block ends with \n; \r alone also ends lines
                    number += 1
                    if line.strip(b' \t\r\n\xef\xbb\xbf'):
                        yield as_document(self._text_of(path, number, line))

    def _text_of(self, path, number, line):
        """Returns the text in one line of a .jsonl file, '' for null."""
        where = f'{path}, line {number}'
        try:
            if b'\0' in line:
                raise UnicodeDecodeError('utf-8', line, line.index(b'\0'), line.index(b'\0') + 1, 'NUL')
            record = json.loads(line.decode('utf-8-sig'))
        except UnicodeDecodeError as error:
            place = f'byte {error.start:,} of the line is 0x{line[error.start]:02x}'
            raise not_utf8(path, f'{where}: not UTF-8 text: {place}') from None
        except (ValueError, RecursionError) as error:
            raise UserError(f'{where}: not JSON: {first_line(error)}') from None
        if not isinstance(record, dict):
            raise UserError(
                f'{where}: there is no text in the field {self.field!r}, only a {type(record).__name__}; a line must '
                'be an object such as {"text": "..."}'
            )
        if self.field not in record:
            raise UserError(
                f'{where}: there is no text in the field {self.field!r}, only the fields {", ".join(record)}. Name '
                'another with --field'
            )
        text = record[self.field]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f'{where}: the field {self.field!r} is of type {type(text).__name__}, not text. Name another with '
                '--field'
            )
        return text or ''

    def _parquet(self, path, update):
        try:
            import pyarrow as pa
            import pyarrow.parquet
        except ImportError:
            raise UserError(f'{path}: reading .parquet files needs pyarrow: {pip_install("pyarrow")}') from None
        size, rows = os.path.getsize(path), 0
        try:
            with opened(path) as stream, pa.parquet.ParquetFile(seekable(stream)) as file:
                names = file.schema_arrow.names
                if self.field not in names:
                    raise UserError(
                        f'{path}: there is no column {self.field!r}; its columns: {", ".join(names)}. Name another '
                        'with --field'
                    )
                if names.count(self.field) > 1:
                    raise UserError(f'{path}: there are {names.count(self.field)} columns {self.field!r}: rename one')
                column_type = file.schema_arrow.field(self.field).type
                if not holds_text(column_type):
                    raise UserError(
                        f'{path}: the column {self.field!r} is of type {column_type}, not text. Name another with '
                        '--field'
                    )
                for batch in file.iter_batches(batch_size=256, columns=[self.field]):
                    for row, text in enumerate(batch.column(0), rows):
                        yield as_document(decoded(text, f'{path}, row {row + 1}'))
                    before, rows = rows, rows + len(batch)
                    total = file.metadata.num_rows
                    update(size * rows // total - size * before // total)
        except pa.ArrowException as error:
            raise UserError(f'{path} is not a readable parquet file: {first_line(error)}') from error


def plural(noun, things):
    return noun if len(things) == 1 else f'{noun}s'


def listed(names):
    """Returns 'a, b and 3 more': the first names of a list."""
    more = f' and {len(names) - NAMED:,} more' if len(names) > NAMED else ''
    return ', '.join(names[:NAMED]) + more


def by_kind(paths):
    """Returns '12 .jsonl.gz, 1 .txt (notes.txt)': the number of files of each kind, and the names of rare ones."""
    kinds = Counter(map(extension_of, paths))
    names = {kind: [os.path.basename(path) for path in paths if extension_of(path) == kind] for kind in kinds}
    return ', '.join(
        f'{count} {kind}' + (f' ({", ".join(names[kind])})' if len(kinds) > 1 and count <= NAMED else '')
        for kind, count in kinds.most_common()
    )


def split_extensions(path):
    """Returns ('.jsonl', '.gz') for 'a.jsonl.gz' and ('.txt', '') for 'b.TXT'."""
    stem, extension = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1], extension) if extension in COMPRESSIONS else (extension, '')


def extension_of(path):
    return ''.join(split_extensions(path))


def kind_of(path: str) -> str | None:
    """Returns 'txt', 'jsonl' or 'parquet' by the file's name, None for another file."""
    return KINDS.get(split_extensions(path)[0])


def find_files(inputs: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """
    Finds the text files among files and folders. Returns (sorted paths, each file once; list of (path, reason) for
    skipped files). Searches folders with their subfolders, links included, each folder once. Raises UserError for an
    input that does not exist, is hidden or is not a text file, and if there is no text file at all.
    """
    paths, skipped, seen = [], [], set()

    def add(path, reason):
        real = os.path.realpath(path)
        if not reason and real in seen:
            reason = 'the same file as another'
        if reason:
            skipped.append((path, reason))
        else:
            paths.append(path)
        seen.add(real)

    for name in inputs:
        if os.path.isdir(name):
            for path in files_below(name):
                add(path, why_skipped(path))
        elif not os.path.lexists(name):
            raise UserError(f'{name} does not exist')
        elif os.path.basename(name).startswith('.'):
            raise hidden(name)
        elif not kind_of(name):
            raise UserError(f'{name} is not a {KNOWN}. If it is text, rename it to .txt')
        else:
            reason = why_not_readable(name)
            if reason:
                raise UserError(f'{name}: {reason}')
            if os.path.realpath(name) not in seen:  # named explicitly, and perhaps also found in a folder
                add(name, '')
    if not paths:
        reasons = ''.join(f'\n  {path}: {reason}' for path, reason in skipped[:NAMED])
        reasons += f'\n  and {len(skipped) - NAMED:,} more' if len(skipped) > NAMED else ''
        raise UserError(
            f'there are no .txt, .jsonl or .parquet files to read in {", ".join(inputs)}. If others hold text, give '
            f'copies of them the ending .txt{reasons}'
        )
    return sorted(paths), sorted(skipped)


def files_below(top):
    """Yields every file below the folder top, sorted; yields hidden folders as if they were files."""
    seen = {os.path.realpath(top)}
    for folder, folders, files in os.walk(top, followlinks=True, onerror=unreadable):
        yield from (os.path.join(folder, name) for name in sorted(folders) if name.startswith('.'))
        visible = {os.path.join(folder, name): name for name in sorted(folders) if not name.startswith('.')}
        folders[:] = [name for path, name in visible.items() if os.path.realpath(path) not in seen]
        seen.update(map(os.path.realpath, visible))
        yield from (os.path.join(folder, name) for name in sorted(files))


def hidden(path):
    return UserError(f'{path} is a hidden file, and hidden files are not read. Rename it if it is text to train on')


def unreadable(error):
    raise UserError(f'cannot read {error.filename}: {error.strerror}')


def why_not_readable(path):
    """Returns why a file cannot be read, whatever its name; '' if it can."""
    try:
        status = os.stat(path)
    except OSError as error:
        return 'a link to a file that does not exist' if os.path.islink(path) else f'{error.strerror}'
    return '' if stat.S_ISREG(status.st_mode) else 'not a regular file'


def why_skipped(path):
    """Returns why a file in a folder is skipped; '' if it is read."""
    name, extension = os.path.basename(path), split_extensions(path)[0]
    if name.startswith('.'):
        return 'hidden'
    if extension == '.json':
        return 'a .json file; if it holds one JSON object per line, rename it to .jsonl'
    if extension not in KINDS:
        return 'not .txt, .jsonl or .parquet'
    if extension == '.txt' and name.lower().split('.')[0].split('-')[0].split('_')[0] in NOTES:
        return 'about the data, by its name; to train on it, name the file explicitly'
    return why_not_readable(path) or ('' if os.path.getsize(path) else 'empty')


def opened_raw(path):
    try:
        return open(path, 'rb')
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from error


@contextmanager
def opened(path: str, update: Callable[[int], None] = lambda n: None) -> Iterator[io.BufferedIOBase]:
    """
    Yields the contents of a file as a binary stream, decompressed if its first bytes say so. Calls update with the
    bytes read from the disk. Turns errors of the file system and of damaged compressed data into UserError.
    """
    try:
        with open(path, 'rb', buffering=0) as file:
            raw = io.BufferedReader(_Counted(file, update), BLOCK)
            head = raw.peek(10)[:10]
            if head.startswith(b'\x1f\x8b'):
                stream = gzip.GzipFile(fileobj=raw)
            elif head[:3] == b'BZh' and head[4:10] in (b'1AY&SY', b'\x17rE8P\x90'):  # the second is an empty one
                stream = io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor), BLOCK)
            elif head.startswith(b'\xfd7zXZ\0'):
                stream = io.BufferedReader(_Streams(raw, lzma.LZMADecompressor), BLOCK)
            elif head.startswith(b'\x28\xb5\x2f\xfd') or (head[1:4] == b'\x2a\x4d\x18' and head[0] >> 4 == 5):
                stream = io.BufferedReader(_zstd(path, raw), BLOCK)
            else:
                stream = raw
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f'{path} is damaged or incomplete: {first_line(error)}. Get the file again') from error
    except OSError as error:
        if error.errno is None:  # raised by a decompressor
            raise UserError(f'{path} is damaged or incomplete: {first_line(error)}. Get the file again') from error
        raise UserError(f'cannot read {path}: {error.strerror}') from error


class _Counted(io.RawIOBase):
    """A file that reports the number of bytes read."""

    def __init__(self, file, update):
        self.file, self.update = file, update

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        return self.file.seek(offset, whence)

    def tell(self):
        return self.file.tell()

    def readinto(self, buffer):
        n = self.file.readinto(buffer)
        if n:
            self.update(n)
        return n


class _Streams(io.RawIOBase):
    """
    The contents of all bzip2 or xz streams in a file. BZ2File and LZMAFile take a damaged second stream for the end of
    the file, and so lose the rest. Reads small blocks, because each end of a stream copies the rest of its block.
    """

    def __init__(self, raw, decompressor):
        self.raw, self.new, self.decompressor = raw, decompressor, decompressor()

    def readable(self):
        return True

    def readinto(self, buffer):
        data = b''
        while not data:
            if self.decompressor.eof:
                block = self.decompressor.unused_data.lstrip(b'\0')  # xz may pad with zeros
                while not block:
                    more = self.raw.read1(io.DEFAULT_BUFFER_SIZE)
                    if not more:
                        return 0
                    block = more.lstrip(b'\0')
                self.decompressor = self.new()
            elif self.decompressor.needs_input:
                block = self.raw.read1(io.DEFAULT_BUFFER_SIZE)
                if not block:
                    raise EOFError('it ends within a compressed stream')
            else:
                block = b''
            data = self.decompressor.decompress(block, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _zstd(path, raw):
    try:
        from compression import zstd  # Python 3.14

        return zstd.ZstdFile(raw)
    except ImportError:
        pass
    try:
        import pyarrow
    except ImportError:
        raise UserError(f'{path}: reading zstd files needs pyarrow: {pip_install("pyarrow")}') from None
    return pyarrow.CompressedInputStream(raw, 'zstd')


def seekable(stream):
    """Returns the stream if seeking in it is free, else its contents in memory."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, _Counted):
        return stream
    return io.BytesIO(stream.read())


def holds_text(column_type):
    """Returns whether a pyarrow type is text: any kind of string, UTF-8 in bytes, or a dictionary of either."""
    import pyarrow.types as types

    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    tests = ('is_string', 'is_large_string', 'is_string_view', 'is_binary', 'is_large_binary', 'is_binary_view')
    return any(getattr(types, test)(column_type) for test in tests if hasattr(types, test))


def decoded(scalar, where):
    """Returns a value of a column, a pyarrow scalar, as str."""
    try:
        text = scalar.as_py()
        return text.decode() if isinstance(text, bytes) else text or ''
    except UnicodeDecodeError as error:
        place = f'byte {error.start:,} is 0x{error.object[error.start]:02x}'
        raise UserError(f'{where}: not UTF-8 text: {place}') from None


def clean(text: str) -> str:
    """
    Returns text without a byte order mark at its start, with \\n for every kind of line end, and with U+FFFD for half a
    surrogate pair, which JSON may hold.
    """
    text = text.lstrip('\ufeff')
    if '\r' in text:
        text = text.replace('\r\n', '\n').replace('\r', '\n')
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def as_document(text):
    """Returns (size in bytes, [text]) for a document in memory."""
    text = clean(text)
    return len(text.encode()), [text]


def read_text(path: str) -> str:
    """Returns the whole text of a file, except for .jsonl and .parquet files. Raises UserError."""
    if os.path.basename(path).startswith('.'):
        raise hidden(path)
    if kind_of(path) in ('jsonl', 'parquet'):
        text_script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'text', 'prepare.py')
        raise UserError(
            f'{path} holds documents, not one text. Prepare it with the script for your own files: '
            f'{python_command(text_script, path)}'
        )
    return ''.join(read_pieces(path))


def read_pieces(path: str, update: Callable[[int], None] = lambda n: None) -> Iterator[str]:
    """
    Yields the text of a file in pieces of about BLOCK bytes. A piece ends after a letter and before a blank, where
    GPT-2's tokens always end, so that the tokens of the pieces are those of the file.
    """
    decoder = codecs.getincrementaldecoder('utf-8')()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position, rest, start = 0, '', True
    with opened(path, update) as stream:
        while True:
            block = stream.read(BLOCK)
            try:
                text = newlines.decode(decoder.decode(block, final=not block), final=not block)
                if (nul := block.find(b'\0')) >= 0:
                    raise UnicodeDecodeError('utf-8', block, nul, nul + 1, 'NUL')
            except UnicodeDecodeError as error:
                # error.object starts with the bytes that the decoder had kept
                position += len(block) - len(error.object) + error.start
                place = f'byte {position:,} is 0x{error.object[error.start]:02x}'
                sample = error.object if position > SAMPLE else None
                raise not_utf8(path, f'{path} is not UTF-8 text: {place}', sample) from None
            if start and text:
                text = text.lstrip('\ufeff')
                start = not text
            text = rest + text
            if not block:
                break
            position += len(block)
            cut = len(text) - 1
            while cut > 0 and not (text[cut] in ' \n' and not text[cut - 1].isspace()):
                cut -= 1
            cut = cut if cut > 0 else len(text)
            if cut:
                yield text[:cut]
            rest = text[cut:]
    if text:
        yield text


def not_utf8(path, problem, sample=None):
    """
    Returns the UserError for a file that is not UTF-8: the problem, and a command that converts the file and keeps the
    original. sample: bytes with the problem, if they are not at the start of the file.
    """
    if sample is None:
        with opened(path) as stream:
            sample = stream.read(SAMPLE)
    name, convert = guess_encoding(sample)
    with open(path, 'rb') as file:
        head = file.read(4)
    tools = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zX': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
    tool = next((tool for magic, tool in tools.items() if head.startswith(magic)), None)
    old, new, kept = (quote_path(path + ending) for ending in ('', '.utf-8', '.orig'))
    command = f'{tool} -dc < {old} | {convert} | {tool} > {new}' if tool else f'{convert} < {old} > {new}'
    if not tool and convert.startswith('iconv'):
        command = f'{convert} {old} > {new}'
    return UserError(
        f'{problem}. It looks like {name}. This command converts it and keeps the original:\n'
        f'  {command} && mv {old} {kept} && mv {new} {old}'
    )


def guess_encoding(sample: bytes) -> tuple[str, str]:
    """Returns (name, command that converts stdin to UTF-8) for the most likely encoding of bytes that are not UTF-8."""
    quarters = [sample[i::4].count(b'\0') for i in range(4)]  # NULs at each position of four bytes
    nuls, n = sum(quarters), max(len(sample) // 4, 1)
    text = sample.decode('utf-8', 'replace')
    damaged, beyond_ascii = text.count('\ufffd'), sum(char > '\x7f' for char in text)
    name = 'ISO-8859-1'  # can convert any bytes
    if sample.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        name = 'UTF-32'
    elif sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = 'UTF-16'
    elif quarters[2] + quarters[3] > 1.8 * n:
        name = 'UTF-32LE'
    elif quarters[0] + quarters[1] > 1.8 * n:
        name = 'UTF-32BE'
    elif nuls and not damaged and (beyond_ascii or nuls < n / 2):
        return 'UTF-8 with NUL bytes in it', "tr -d '\\000'"
    elif nuls and quarters[1] + quarters[3] > 4 * (quarters[0] + quarters[2]):
        name = 'UTF-16LE'
    elif nuls and quarters[0] + quarters[2] > 4 * (quarters[1] + quarters[3]):
        name = 'UTF-16BE'
    elif beyond_ascii > 10 * damaged:
        return 'UTF-8 with a few damaged bytes', 'iconv -c -f UTF-8 -t UTF-8'
    else:
        used = set(sample)
        if any(0x80 <= byte < 0xA0 for byte in used) and not used & {0x81, 0x8D, 0x8F, 0x90, 0x9D}:
            name = 'WINDOWS-1252'
        return f'{name} (if the result is wrong, name another encoding after -f)', f'iconv -f {name} -t UTF-8'
    return name, f'iconv -f {name} -t UTF-8'
