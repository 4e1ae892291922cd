"""
Reads and writes checkpoints of a sharded model, in two formats.

full: out_dir/ckpt.pt, the file that every trainer and nanoGPT can read. Rank 0 collects it in CPU memory, shard by
shard.

sharded: out_dir/ckpt_sharded/, for models that fit on no single machine. Each rank writes its own shards
(torch.distributed.checkpoint) in the background, from a copy in CPU memory. The files `latest` and `best` name the
folders of those two checkpoints. The ranks write to a folder `saving_*`. Once all of them have finished, it gets its
final name, and then `latest` names it, so `latest` always names a complete checkpoint. All machines must see
out_dir, through a shared file system.

To convert one format to the other, in one process and with all state:
$ python sharded_checkpoint.py full OUT_DIR       # out_dir/ckpt.pt from out_dir/ckpt_sharded
$ python sharded_checkpoint.py sharded OUT_DIR    # and back
"""

from errors import UserError  # isort: skip  first: it also reports a missing package

import glob
import operator
import os
import pickle
import shutil
import sys
import time
import warnings
from contextlib import suppress

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

import checkpoint as full_checkpoint
from checkpoint import iteration_of, write_checkpoint
from checkpoint_crc import add_crc, crc32_of_chunks
from checkpoint_fields import check_fields
from errors import reason
from out_dir import make_again, make_out_dir, own_ending, set_aside, set_best_aside
from regular_file import check_regular
from shell import python_command, quote

FOLDER = 'ckpt_sharded'
UNSHARDED = 'unsharded.pt'  # in a sharded checkpoint: everything but the tensors of weights and of AdamW's state
UNSHARDED_BEFORE = 'rest.pt'  # its name in older checkpoints
README = f"""It is sharded: only the FSDP trainer reads it, with several processes. To make a ckpt.pt from it,
which every trainer reads, run:
  {quote(sys.executable)} {quote(os.path.abspath(__file__))} full OUT_DIR
"""


def named_by(pointer: str, folder: str) -> str | None:
    """
    Returns the path of the checkpoint that the file `pointer` in folder names, or None if there is no such file. Raises
    UserError if the file is unreadable.
    """
    try:
        check_regular(os.path.join(folder, pointer))
        with open(os.path.join(folder, pointer), errors='replace') as f:
            return os.path.join(folder, os.path.basename(f.read().strip()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise UserError(f'{os.path.join(folder, pointer)} cannot be read: {e.strerror}') from None


def latest_in(folder: str) -> str | None:
    """
    Returns the path of the latest sharded checkpoint in folder, or None if there is none. `latest` or the checkpoint
    that it names may be missing, after a kill or in a partial copy: then returns the checkpoint of the highest
    iteration, with a printed line.
    """
    named = named_by('latest', folder)
    if named and os.path.exists(unsharded_file(named)):
        return named
    complete = [path for path in _all_in(folder) if os.path.exists(unsharded_file(path))]
    if not complete:
        return named
    found = max(complete, key=os.path.basename)
    print(f'{named or os.path.join(folder, "latest")} is missing, so {found} takes its place')
    return found


def _all_in(folder):
    return glob.glob(os.path.join(glob.escape(folder), 'iter_*'))


def find_checkpoint(out_dir: str) -> str:
    """
    Returns the path of the latest checkpoint in out_dir, a file or the folder of a sharded one: the one with the later
    iteration, or the newer of two with the same. Returns out_dir/ckpt.pt if there is none.
    """
    full, sharded = full_checkpoint.find_file(out_dir), latest_in(os.path.join(out_dir, FOLDER))
    if not sharded or not os.path.exists(full):
        return sharded or full
    # time alone is not enough: a copy of out_dir may have lost the files' times
    pointer = os.path.join(out_dir, FOLDER, 'latest')
    newer = not os.path.exists(pointer) or os.path.getmtime(full) >= os.path.getmtime(pointer)
    ours, theirs = iteration_of(full), iteration_of(unsharded_file(sharded))
    if newer and ours < theirs:
        reason = f'of an earlier iteration ({ours} of {theirs})' if ours >= 0 else 'unreadable'
        print(f'{full} is newer than {sharded}, but {reason}: resuming from the latter')
    return full if (ours, newer) >= (theirs, not newer) else sharded


def unsharded_file(folder):
    """Returns the path of the unsharded part of the sharded checkpoint in folder."""
    older = os.path.join(folder, UNSHARDED_BEFORE)
    return older if os.path.exists(older) else os.path.join(folder, UNSHARDED)


def load_checkpoint(path: str, fsdp: bool) -> dict:
    """
    Returns a checkpoint to resume from, like checkpoint.load_checkpoint. With fsdp, path may also be a folder; then
    checkpoint['model'] maps each name to the name of its saved tensor, and own_part() reads the tensors. Raises
    UserError if the checkpoint is missing, damaged or not a checkpoint.
    """
    if path.endswith('.pt'):
        return full_checkpoint.load_checkpoint(path, to_resume=True)
    if not fsdp:
        out_dir = os.path.dirname(os.path.dirname(os.path.abspath(path)))
        raise UserError(f'{path} is a folder. {README.strip().replace("OUT_DIR", quote(out_dir))}')
    unsharded = unsharded_file(path)
    checkpoint = check_fields(full_checkpoint.read_file(unsharded), unsharded, to_resume=True, tensors=False)
    return {**checkpoint, 'folder': path}


def saved_names(model) -> dict[str, str]:
    """Returns {name: the first name of the same parameter}; the output layer's is that of the token embeddings."""
    first = {p: name for name, p in model.named_parameters()}
    return {name: first[p] for name, p in model.named_parameters(remove_duplicate=False)}


def split(checkpoint: dict, names: dict) -> tuple[dict, dict]:
    """
    Splits a checkpoint into ({name: tensor} for torch.distributed.checkpoint, the rest as a small dict). rest['model']
    maps each name to the name of its tensor.
    """
    state = checkpoint['optimizer']['state']
    tensors = {f'model.{name}': p for name, p in checkpoint['model'].items() if names[name] == name}
    tensors |= {f'optimizer.{i}.{k}': v for i, s in state.items() for k, v in s.items() if v.dim()}
    # step counts, cloned because training changes them
    small = {i: {k: v.cpu().clone() for k, v in s.items() if not v.dim()} for i, s in state.items()}
    return tensors, {**checkpoint, 'model': names, 'optimizer': {**checkpoint['optimizer'], 'state': small}}


def prepare(folder: str) -> str:
    """
    Makes an empty folder in `folder` to write to, and returns its name, always a new one, because a rank may still be
    writing to that of a save that failed. Ignores errors: whoever writes to it finds and reports them.
    """
    name = f'saving_{time.time_ns()}'
    with suppress(OSError):
        make_again(os.path.dirname(folder))
        discard_unfinished(folder)
        name = f'saving{own_ending(os.path.dirname(folder))}_{time.time_ns()}'
        set_aside(os.path.dirname(folder))
        os.makedirs(os.path.join(folder, name))
    return name


def discard_unfinished(folder: str) -> None:
    """Removes what this run, or a killed one, could not finish. Ignores errors."""
    with suppress(OSError):
        for left in glob.glob(f'saving{own_ending(os.path.dirname(folder))}_*', root_dir=folder):
            shutil.rmtree(os.path.join(folder, left), ignore_errors=True)


class Writer(dcp.FileSystemWriter):
    """
    Gives the reason why a write failed, such as a full disk. torch raises a RuntimeError about positions in the file,
    whose cause is lost on the way to other ranks.
    """

    def write_data(self, *args, **kwargs):
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as e:
            raise RuntimeError(reason(e)) from None


def write_sharded(
    tensors: dict, rest: dict, folder: str, unfinished: str, best: bool, group=None
) -> tuple[str | None, int | None, float]:
    """
    Writes this rank's part to folder/unfinished, which prepare() has made on rank 0, and, once all ranks have finished,
    makes it the latest checkpoint. Returns (path, bytes, end time); the first two are None on ranks other than 0.
    """
    saving = os.path.join(folder, unfinished)
    with suppress(OSError):
        make_again(folder)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # copying ahead would wait for GPU 0 every 10 MB, which on all ranks but one is another rank's GPU
        writer = Writer(saving, per_thread_copy_ahead=0)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    rank = 0 if group is None else dist.get_rank()
    try:
        crcs = {name: crc32_of_chunks(os.path.join(saving, name)) for name in glob.glob(f'__{rank}_*', root_dir=saving)}
    except Exception as e:
        crcs = e  # raised below, because rank 0 waits for it
    everyone = [crcs]
    if group is not None:
        everyone = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(crcs, everyone, group=group)
    for part in everyone or [crcs]:
        if isinstance(part, Exception):
            raise part
    if rank != 0:
        return None, None, time.monotonic()
    crcs = {name: crc for part in everyone for name, crc in part.items()}
    crcs['.metadata'] = crc32_of_chunks(os.path.join(saving, '.metadata'))
    with open(os.path.join(saving, UNSHARDED), 'wb+') as f:
        torch.save({**rest, 'crc32_of_chunks': crcs}, f)
        add_crc(f)
        f.flush()
        os.fsync(f.fileno())
    open_sharded(saving)  # detects parts that another machine wrote to its own disk
    path = os.path.join(folder, f'iter_{rest["iter_num"]:07d}_{time.time_ns()}')  # always a new name
    size = sum(os.path.getsize(os.path.join(saving, name)) for name in os.listdir(saving))
    os.rename(saving, path)
    name = os.path.basename(path)
    if best:
        set_best_aside(os.path.dirname(folder), os.path.join(folder, 'best'))
    for file, text in (('README', README), ('latest', name), *([('best', name)] if best else [])):
        with open(os.path.join(folder, file + '.tmp'), 'w') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(os.path.join(folder, file + '.tmp'), os.path.join(folder, file))
    full_checkpoint.sync(folder)
    # best_before, best_before_2, ... name checkpoints that were set aside
    kept = {named_by(pointer, folder) for pointer in ('latest', 'best', *glob.glob('best_before*', root_dir=folder))}
    for old in _all_in(folder):
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return path, size, time.monotonic()


class SafeReader(dcp.FileSystemReader):
    """
    Reads checkpoints without executing code: torch's own reader unpickles .metadata. Reads tensors with weights_only.
    """

    def read_metadata(self, *args, **kwargs):
        check_regular(os.path.join(self.path, '.metadata'))
        with open(os.path.join(self.path, '.metadata'), 'rb') as f:
            metadata = _MetadataUnpickler(f).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Loads only the plain records that .metadata consists of."""

    RECORDS = {
        'torch.distributed.checkpoint.metadata': (
            'Metadata',
            'TensorStorageMetadata',
            'ChunkStorageMetadata',
            'TensorProperties',
            '_MEM_FORMAT_ENCODING',
            'MetadataIndex',
            'StorageMeta',
        ),
        'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
        'torch': ('Size', 'float32'),
        'torch.serialization': ('_get_layout',),
        'pathlib': ('PosixPath',),
        'pathlib._local': ('PosixPath',),
    }

    def find_class(self, module, name):
        if (module, name) == ('builtins', 'getattr'):  # early versions of Python 3.11 pickle enums so
            return operator.getitem  # finds members by name, but no other attributes
        if name not in self.RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f'it imports {module}.{name}, which could run code')
        return super().find_class(module, name)


def open_sharded(folder, crcs=None, rank=0, world_size=1):
    """
    Returns (reader, metadata) of the sharded checkpoint in folder. Raises UserError if a part is missing or damaged.
    crcs: {file: CRC-32 of each of its chunks}, or None in older checkpoints; each rank checks its share of the files.
    """
    names = sorted(crcs or ())  # the first is .metadata, which every rank checks

    def check_crcs(names):
        for name in names:
            if crc32_of_chunks(os.path.join(folder, os.path.basename(name))) != crcs[name]:
                raise UserError(f'the sharded checkpoint {folder} is damaged: the checksum (CRC-32) of {name} is wrong')

    try:
        reader = SafeReader(folder)
        metadata = reader.read_metadata()
        needed = {}
        for info in metadata.storage_data.values():
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    except FileNotFoundError as e:
        raise UserError(f'the sharded checkpoint {folder} is incomplete: {e.filename} is missing') from None
    except Exception as e:  # damaged bytes can raise any error
        raise UserError(f'the sharded checkpoint {folder} was not loaded, its .metadata is damaged: {e}') from None
    check_crcs(names[:1])
    for name, size in needed.items():
        path = os.path.join(folder, os.path.basename(name))
        if not os.path.exists(path):
            raise UserError(
                f'the sharded checkpoint {folder} is incomplete: {name} is missing. Do all machines see the same '
                'out_dir?'
            )
        if os.path.getsize(path) < size:
            raise UserError(f'the sharded checkpoint {folder} is incomplete: {name} has been cut short')
    check_crcs(names[1:][rank::world_size])
    return reader, metadata


def read_tensors(tensors, reader, no_dist):
    """Reads the tensors in place, {name: tensor or DTensor}. Collective unless no_dist. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            dcp.load(tensors, storage_reader=reader, no_dist=no_dist)
    except (CheckpointException, OSError, RuntimeError) as e:
        raise UserError(
            f'the sharded checkpoint {reader.path} cannot be read; it may be damaged ({first_cause(e)})'
        ) from None


def first_cause(error):
    """
    Returns one line about an exception; for a CheckpointException, which holds those of all ranks, about the first.
    """
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f'{type(error).__name__}: {reason(error)}'


def as_full(path):
    """Returns the sharded checkpoint at path with whole tensors, in CPU memory."""
    checkpoint = load_checkpoint(path, fsdp=True)
    reader, metadata = open_sharded(checkpoint.pop('folder'), checkpoint.pop('crc32_of_chunks', None))
    tensors = {name: torch.empty(record.size) for name, record in metadata.state_dict_metadata.items()}
    read_tensors(tensors, reader, no_dist=True)
    state = {i: dict(s) for i, s in checkpoint['optimizer']['state'].items()}
    for name, tensor in tensors.items():
        if name.startswith('optimizer.'):
            _, i, k = name.split('.')
            state[int(i)][k] = tensor
    checkpoint['model'] = {name: tensors[f'model.{first}'] for name, first in checkpoint['model'].items()}
    checkpoint['optimizer'] = {**checkpoint['optimizer'], 'state': state}
    return checkpoint


def convert(to, out_dir):
    """
    Writes the checkpoint in out_dir in the other format and returns its path. to: 'full' (also converts the best
    checkpoint) or 'sharded'. Needs CPU memory for the whole state. Raises UserError, also if it would replace a
    checkpoint of a later iteration.
    """
    folder, full = os.path.join(out_dir, FOLDER), os.path.join(out_dir, 'ckpt.pt')
    latest = latest_in(folder)
    if latest and os.path.exists(full):
        found = [iteration_of(full), iteration_of(unsharded_file(latest))][:: 1 if to == 'sharded' else -1]
        if found[0] < found[1]:
            kept = latest if to == 'sharded' else full
            raise UserError(
                f'{kept} is of iteration {found[1]}, but the checkpoint that would replace it of {found[0]}: move away '
                'the one you do not need'
            )
        replaced = full if to == 'full' else latest
        print(f'{replaced}, of iteration {found[1]}, is replaced by the one of iteration {found[0]}')
    if to == 'sharded':
        checkpoint = load_checkpoint(full, fsdp=False)
        first = {}
        names = {name: first.setdefault(v.data_ptr(), name) for name, v in checkpoint['model'].items()}
        tensors, rest = split(checkpoint, names)
        make_out_dir(out_dir, 'resume')  # a run may be writing there
        unfinished = prepare(folder)
        try:
            return write_sharded(tensors, rest, folder, unfinished, best=False, group=None)[0]
        except (CheckpointException, OSError, RuntimeError) as e:  # a full disk
            shutil.rmtree(os.path.join(folder, unfinished), ignore_errors=True)
            problem = f'{folder} could not be written ({first_cause(e)}); the earlier checkpoint is untouched'
            raise UserError(problem) from None
    if not latest:
        raise UserError(f'there is no sharded checkpoint in {out_dir}')
    best, best_full = named_by('best', folder), os.path.join(out_dir, 'ckpt_best.pt')
    if best and best != latest:
        if iteration_of(best_full) < iteration_of(unsharded_file(best)):
            write_checkpoint(as_full(best), out_dir, best=False, required=True, name='ckpt_best.pt')
    return write_checkpoint(as_full(latest), out_dir, best=best == latest, required=True)['path']


if __name__ == '__main__':
    if len(sys.argv) != 3 or sys.argv[1] not in ('full', 'sharded'):
        raise UserError(
            'sharded_checkpoint.py needs two arguments, the format to convert to (full or sharded) and the out_dir:\n'
            f'  {python_command(__file__, "full", "OUT_DIR")}'
        )
    print(f'wrote {convert(*sys.argv[1:])}')
