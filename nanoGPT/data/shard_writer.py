"""
Writes documents as token shards in llm.c's format, which modded-nanogpt reads too: FOLDER/NAME_val_000000.bin, then
FOLDER/NAME_train_000001.bin and so on. The tokens are GPT-2's, with <|endoftext|> before each document.

    write_shards(TextReader(['corpus/']), 'data/corpus', 'text', shard_tokens=100_000_000)

A shard is a header of 256 little-endian int32 (20240520, version 1, number of tokens, zeros) and the tokens in uint16,
as in llm.c's dev/data/data_common.py. As there, the first tokens are the validation split, and a document may continue
in the next shard. A shard appears complete (.tmp file, fsync, rename). A preparation that was killed continues after
the last complete shard; shards.json records the position in the input.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from errors import UserError
from prepare_common import (
    ENDOFTEXT,
    GROUP,
    gpt2_encode_pieces,
    gpt2_encoding,
    in_parallel,
    locked,
    print_training_command,
    print_written,
    progress,
)
from shell import quote_path, shortest_path
from text_reader import TextReader

HEADER_INTS, MAGIC, VERSION = 256, 20240520, 1
STATE = 'shards.json'


@dataclass
class Group:
    """Consecutive pieces of text to encode together (None: <|endoftext|>), and their position in the input."""

    file: int  # index of the file of the first piece
    piece: int  # index of the first piece among those of that file
    start_bytes: int  # bytes of input before the group; end_bytes: up to its end
    end_bytes: int = 0
    pieces: list = field(default_factory=list)
    characters: int = 0


def header(tokens: int) -> bytes:
    """Returns the header of a shard with this many tokens."""
    ints = np.zeros(HEADER_INTS, '<i4')
    ints[:3] = MAGIC, VERSION, tokens
    return ints.tobytes()


def read_header(path: str) -> int:
    """
    Returns the number of tokens in a shard. Raises UserError if the header or the size is not that of a complete shard.
    """
    with open(path, 'rb') as f:
        ints = np.frombuffer(f.read(HEADER_INTS * 4).ljust(HEADER_INTS * 4, b'\0'), '<i4')
    size, tokens = os.path.getsize(path), int(ints[2])
    if tuple(ints[:2]) != (MAGIC, VERSION) or size != HEADER_INTS * 4 + 2 * tokens:
        raise UserError(
            f'{path} is not a complete shard of GPT-2 tokens: its header begins {ints[:3].tolist()}, and it has '
            f'{size:,} bytes'
        )
    return tokens


def shard_name(name: str, index: int) -> str:
    """Returns the file name of a shard; number 0 is the validation split."""
    return f'{name}_{"train" if index else "val"}_{index:06}.bin'


def groups(reader: TextReader, update: Callable[[int], None], file: int = 0, piece: int = 0) -> Iterator[Group]:
    """
    Yields the reader's documents in groups of about GROUP characters, starting at piece number `piece` of file number
    `file`. Calls update with the bytes read.
    """
    start = done = reader.bytes_before(file)
    group = None

    def count(n):
        nonlocal done
        done += n
        update(n)

    for index in range(file, len(reader.paths)):
        number, path = 0, reader.fetch(index)
        for _, pieces in reader.read(path, count):
            first = True
            for text in pieces:
                if index > file or number >= piece:
                    group = group or Group(index, number, start)
                    group.pieces += [None, text] if first else [text]
                    group.characters += len(text)
                number, first = number + 1, False
                if group and group.characters >= GROUP:
                    start = group.end_bytes = done
                    yield group
                    group = None
    if group:
        group.end_bytes = done
        yield group


class ShardFolder:
    """
    The shards of one preparation in a folder, with the state that lets it continue. .shards is the number of complete
    shards and .tokens lists their sizes. (.file, .piece, .skip) is the position after them: the group that starts at a
    piece of a file, without its first `skip` tokens. .documents and .characters count the contents of the shards.

    source: a dict that identifies input and options. Raises UserError if the folder holds other data, or damaged
    shards.
    """

    def __init__(self, folder: str, name: str, source: dict):
        self.folder, self.name, self.source = folder, name, json.loads(json.dumps(source))
        self.shards, self.tokens, self.finished = 0, [], False
        self.file = self.piece = self.skip = self.documents = self.characters = 0
        self._load()

    def path(self, name):
        return os.path.join(self.folder, name)

    def _load(self):
        names = [name for name in os.listdir(self.folder) if name.endswith('.bin') and re.search('train|val', name)]
        others = [self.path(name) for name in sorted(names)]
        try:
            with open(self.path(STATE), encoding='utf-8') as f:
                state = json.load(f)
            theirs, shards = state.pop('source'), state['shards']
            types = {key: type(value) for key, value in vars(self).items() if key not in ('folder', 'name')}
            found = {key: type(value) for key, value in {**state, 'source': theirs}.items()}
            numbers = [value for value in (*state.values(), *state['tokens']) if isinstance(value, int)]
            if found != types or len(state['tokens']) != shards or min(numbers) < 0:
                raise ValueError
        except FileNotFoundError:
            theirs, shards = None, 0
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f'{self.path(STATE)} is damaged. {self._elsewhere()}') from None
        if shards == 0:  # at most the first shard exists, from a preparation that was killed right after writing it
            if others and (theirs is None or others != [self.path(shard_name(self.name, 0))]):
                raise UserError(f'{others[0]} was not made by this preparation. {self._elsewhere()}')
            self.save()
            return
        for key in {**self.source, **theirs}:
            if self.source.get(key) != theirs.get(key):
                difference = f'{key} was {theirs.get(key)!r:.200} and is {self.source.get(key)!r:.200}'
                raise UserError(
                    f'the shards in {self.folder} come from another preparation: {difference}. {self._elsewhere()}'
                )
        vars(self).update(state)
        for index, tokens in enumerate(self.tokens):
            path = self.path(shard_name(self.name, index))
            if not os.path.exists(path):
                raise UserError(f'{path} is missing. {self._elsewhere()}')
            try:
                changed = read_header(path) != tokens
            except UserError as error:
                raise UserError(f'{error}. {self._elsewhere()}') from None
            if changed:
                raise UserError(f'{path} has changed since it was written. {self._elsewhere()}')

    def _elsewhere(self):
        folder = quote_path(shortest_path(self.folder))
        return f'Choose another folder with --out, or remove these files:\n  rm -f {folder}/*.bin {folder}/{STATE}'

    def save(self):
        state = {key: value for key, value in vars(self).items() if key not in ('folder', 'name')}
        self._write(STATE, json.dumps(state).encode())

    def _write(self, name, *contents):
        """Writes a file atomically: it appears complete, or not at all."""
        path = self.path(name)
        try:
            with open(f'{path}.tmp', 'wb') as f:
                for content in contents:
                    f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(f'{path}.tmp', path)
        except OSError as error:
            with suppress(OSError):
                os.remove(f'{path}.tmp')
            raise UserError(
                f'cannot write {path}: {error.strerror}. The complete shards are kept, and the same command continues '
                'after them'
            ) from error

    def add(self, tokens: np.ndarray, characters: int) -> None:
        """Writes tokens as the next shard. characters: length of their text."""
        self._write(shard_name(self.name, self.shards), header(len(tokens)), tokens.data)
        self.shards += 1
        self.tokens.append(len(tokens))
        self.documents += int(np.count_nonzero(tokens == ENDOFTEXT))
        self.characters += characters
        self.save()

    def report(self) -> None:
        """Prints the contents of the folder and the command that trains on them."""
        print_written(self.documents, self.characters, sum(self.tokens))
        train = sum(self.tokens[1:])
        print(
            f'{self.folder}: {self.shards} shards of {self.name}, {train:,} tokens for train, '
            f"{sum(self.tokens[:1]):,} for val (llm.c's format, uint16, GPT-2 vocabulary)"
        )
        longest = max(self.tokens[1:], default=0)  # a window lies within one shard
        print_training_command(self.folder, {'train': train, 'val': self.tokens[0]}, None, min(longest, self.tokens[0]))


def write_shards(
    reader: TextReader,
    folder: str,
    name: str,
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.1,
    num_shards: int | None = None,
) -> None:
    """
    Writes the reader's documents as shards into folder, and prints a summary and the command that trains on the shards.

    The validation shard holds the first tokens: val_fraction of the input, but at most one shard. It ends with a
    document if one ends soon. num_shards: training shards to write; None for all. A later call with more shards, or
    after a kill, continues. Raises UserError like ShardFolder, for input that cannot be read, and if there is too
    little text.
    """
    source = {'name': name, 'shard_tokens': shard_tokens, 'val_fraction': val_fraction, **reader.identity()}
    wanted = 1 + num_shards if num_shards else float('inf')
    with locked(folder):
        out = ShardFolder(folder, name, source)
        if out.shards:
            print(f'{folder}: {out.shards} shards are complete{"" if out.finished else ", continuing after them"}')
        if not out.finished and out.shards < wanted:
            _write(reader, out, shard_tokens, val_fraction, wanted)
            reader.report_documents()
    out.report()


def _write(reader, out, shard_tokens, val_fraction, wanted):
    """Writes shards after the existing ones, until there are `wanted` shards or the input ends."""
    update = progress('encoding', reader.bytes)
    update(reader.bytes_before(out.file))
    shard, filled, characters = np.empty(shard_tokens, '<u2'), 0, 0  # the unfinished shard
    start = out.file, out.piece
    encode = lambda group: (group, gpt2_encode_pieces(group.pieces))
    for group, ids in in_parallel(encode, groups(reader, update, *start)):
        used = out.skip if (group.file, group.piece) == start else 0
        while used < len(ids):
            end = min(len(ids), used + shard_tokens - filled)
            if out.shards == 0:
                end = min(end, val_end(group, ids, val_fraction * reader.bytes))
            shard[filled : filled + end - used] = ids[used:end]
            characters += group.characters if end - used == len(ids) else count_characters(ids[used:end])
            filled, used = filled + end - used, end
            if filled == shard_tokens or (out.shards == 0 and used < len(ids)):
                out.file, out.piece, out.skip = group.file, group.piece, used
                out.add(shard[:filled], characters)
                filled = characters = 0
                reader.release(out.file)
                if out.shards == wanted:
                    return
    if out.shards == 0:
        raise UserError(f'the text is too short: val would take all of its {filled:,} tokens. Nothing was written')
    out.file, out.piece, out.skip, out.finished = len(reader.paths), 0, 0, True
    if filled:
        out.add(shard[:filled], characters)
    out.save()
    reader.release(out.file)


def count_characters(ids: np.ndarray) -> int:
    """Returns the number of characters that begin in these tokens, without <|endoftext|>."""
    text = np.frombuffer(gpt2_encoding().decode_bytes(ids[ids != ENDOFTEXT].tolist()), np.uint8)
    return int(np.count_nonzero(text & 0xC0 != 0x80))  # the other bytes continue a character of UTF-8


def val_end(group: Group, ids: np.ndarray, target_bytes: float) -> int:
    """
    Returns how many tokens of the group belong to the validation split, which ends at about target_bytes of the input:
    at the start of the next document if that is near, else in the middle of a document.
    """
    if group.end_bytes < target_bytes:
        return len(ids)
    share = (target_bytes - group.start_bytes) / max(group.end_bytes - group.start_bytes, 1)
    end = max(1, int(len(ids) * min(max(share, 0), 1)))
    starts = np.flatnonzero(ids[end : 2 * end] == ENDOFTEXT)
    return end + int(starts[0]) if len(starts) else end
