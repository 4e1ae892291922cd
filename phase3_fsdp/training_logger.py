"""
Writes the JSON log of a training run, out_dir/run_YYYYmmdd_HHMMSS.json, which is valid JSON at every moment.

    log = TrainingLogger(out_dir, config, run, enabled=json_log and master_process)
    log.iteration(0, loss=10.8, lr=6e-4, time_ms=21.3, tokens_per_sec=23000.0)
    log.evaluation(0, train_loss=10.8, val_loss=10.9, lr=6e-4)
    log.checkpoint(0, path='out/ckpt.pt', bytes=1_492_000_000, seconds=1.2)
    log.close('completed')

Each call returns at once, and a thread writes the record. An iteration's record is held until flush(): call flush()
where the CPU is about to wait for the GPU, so that writing costs the training no time. Each call first waits for the
previous records, so a kill -9 loses at most one. If the disk does not answer within PATIENCE_S, the records are kept in
memory until it does, because other ranks would not wait longer than dist_timeout. (Values are read after the call
returns: pass numbers, not tensors that change.)

Each list in the document is followed by a reserve of spaces, which JSON ignores; adding a record overwrites some of
them. No write crosses a 4 KiB page, because a kill -9 can cut a write between two pages, but not within one. A list
that outgrows its reserve is copied to a new file with a reserve half as large again, and a rename replaces the old
file. The mean cost of a record is therefore independent of the length of the run. Nothing here raises, because a log is
not worth a training run. LOGGING_GUIDE.md has the schema.
"""

import functools
import itertools
import json
import math
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

from end_of_run import at_end

PAGE, MIB, PATIENCE_S = 4096, 2**20, 10
# bytes reserved at the start, in the order of the file
RESERVE = {'evaluations': 2 * PAGE, 'checkpoints': 2 * PAGE, 'iterations': 16 * PAGE}
SUMMARY = """
    last_iter first_loss best_loss best_loss_iter final_loss final_train_loss first_val_loss best_val_loss
    best_val_loss_iter final_val_loss time_ms_mean time_ms_median tokens_per_sec_mean tokens_per_sec_median mfu_mean
    mfu_median peak_memory_bytes total_time_s
""".split()
encode = json.JSONEncoder(allow_nan=False).encode


def utc_now():
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())


def jsonable(value):
    """
    Returns `value` in a form that JSON can hold: None for NaN and Infinity, numbers for 0-d arrays and tensors, lists
    for tuples, strings for unknown types.
    """
    if value is None or isinstance(value, (int, float, str)):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return jsonable(value.item()) if getattr(value, 'ndim', None) == 0 else str(value)


def pad(text, multiple):
    return text.encode() + b' ' * (-len(text.encode()) % multiple)


def write_all(fd, data, at):
    """Writes all of `data` at offset `at`, also after short writes, and returns the offset of its end."""
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written
    return at


class Speed:
    """
    Mean and median of a stream at constant cost. Once there are more than 10 values, leaves out the first 5
    (compilation, warm-up). The median is exact for up to 10 values; beyond, it is the middle of a bin 0.4% wide, so
    within 0.2%.
    """

    def __init__(self):
        self.first, self.bins, self.mean, self.median = [], {}, None, None
        self.count = self.total = 0
        self.middle = self.below = 0  # the middle bin, and the number of values in bins below it

    def add(self, value):
        if not isinstance(value, (int, float)) or value <= 0:
            return
        if len(self.first) < 10:
            self.first.append(value)
            ordered, middle = sorted(self.first), len(self.first) // 2
            self.mean, self.median = sum(ordered) / len(ordered), (ordered[middle] + ordered[-1 - middle]) / 2
            return
        for item in [value] if self.count else [*self.first[5:], value]:
            key = round(math.log(item) * 250)
            self.bins[key] = self.bins.get(key, 0) + 1
            self.count, self.total, self.below = self.count + 1, self.total + item, self.below + (key < self.middle)
        while 2 * self.below >= self.count:
            self.middle -= 1
            self.below -= self.bins.get(self.middle, 0)
        while 2 * (self.below + (in_bin := self.bins.get(self.middle, 0))) < self.count:
            self.below, self.middle = self.below + in_bin, self.middle + 1
        above = self.middle
        if 2 * (self.below + in_bin) == self.count:  # the median lies between two values, which may be far apart
            above = min(key for key in self.bins if key > above)
        self.mean, self.median = self.total / self.count, (math.exp(self.middle / 250) + math.exp(above / 250)) / 2


def in_background(at_once):
    """
    Runs the method on the log's thread, at once or at the next flush. The caller waits only for earlier calls, for
    PATIENCE_S at most, and sees no exception.
    """

    def decorate(method):
        @functools.wraps(method)
        def hand_over(self, *args, **kwargs):
            self.flush()
            self.stuck = not self.last.wait(0 if self.stuck else PATIENCE_S)
            self.pending = method, args, kwargs
            if at_once:
                self.flush()

        return hand_over

    return decorate


class TrainingLogger:
    """
    The log of one run. Its methods must be called from one thread. With enabled=False (ranks other than 0) every method
    does nothing.

    config: dict of every flag. run: dict of facts (phase, command, world_size, device, versions, ...). resumed_from:
    None or {'log': file name of the predecessor, 'iter': first iteration of this run}; a reader drops the predecessor's
    records from that iteration on. `path` is the file, or None if there is none. The first error of any kind becomes
    one warning on stderr; summary.dropped_records counts the records that could not be written.
    """

    def __init__(self, out_dir: str, config: dict, run: dict, enabled: bool = True, resumed_from: dict | None = None):
        self.path, self.fd, self.warned, self.torn, self.second, self.retry_at = None, None, False, None, 0, 0.0
        self.jobs, self.last = queue.SimpleQueue(), threading.Event()  # calls to the thread; set once the last is done
        self.last.set()
        self.pending, self.stuck = None, False  # a call that is held until flush(); whether earlier ones take too long
        if enabled:
            try:
                self._open(out_dir, config, run, resumed_from)
            except Exception as error:
                self.fd = None
                self._warn(error)

    def wait(self) -> None:
        """Returns once every record so far is in the file."""
        self.flush()
        self.last.wait()

    def flush(self) -> None:
        """Has the thread write the last iteration's record now. Does not wait for it."""
        pending, self.pending = self.pending, None
        if pending is not None and self.fd is not None:
            done = threading.Event()
            self.jobs.put((*pending, done))
            self.last = done  # after put: a Ctrl-C between the two must not leave an event that nobody sets

    @in_background(at_once=False)
    def iteration(
        self, iter_num, *, loss, lr, time_ms, tokens_per_sec, mfu=None, grad_norm=None, peak_memory_bytes=None, **extra
    ):
        """Records a training step. mfu is a fraction of 1. Extra keywords are logged unchanged."""
        fields = {
            'loss': loss,
            'lr': lr,
            'time_ms': time_ms,
            'tokens_per_sec': tokens_per_sec,
            'mfu': mfu,
            'grad_norm': grad_norm,
        }
        self._append('iterations', {'iter': iter_num, **fields, 'peak_memory_bytes': peak_memory_bytes, **extra})

    @in_background(at_once=True)
    def evaluation(self, iter_num, *, train_loss, val_loss, lr=None, **extra):
        self._append(
            'evaluations', {'iter': iter_num, 'train_loss': train_loss, 'val_loss': val_loss, 'lr': lr, **extra}
        )

    @in_background(at_once=True)
    def checkpoint(self, iter_num, *, path, bytes=None, seconds=None, **extra):
        self._append('checkpoints', {'iter': iter_num, 'path': path, 'bytes': bytes, 'seconds': seconds, **extra})

    def close(self, status: str) -> None:
        """
        Writes the final status ('completed', 'stopped' or 'failed') and removes the reserves. Later calls do nothing.
        """
        self._close(status)
        self.wait()

    @in_background(at_once=True)
    def _close(self, status):
        try:
            self.state['status'], self.state['end_time'] = status, utc_now()
            self._mend()
            self._overwrite(0, self._head(PAGE))
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._write_file(self.path + '.new', os.O_TRUNC, reserve=False)
        finally:
            os.close(self.fd)
            self.fd = None

    def _work(self):
        while self.fd is not None:
            method, args, kwargs, done = self.jobs.get()
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self._warn(error)
            done.set()

    def _warn(self, error):
        if not self.warned:
            with suppress(Exception):  # stderr may be closed too
                print(
                    f'training_logger: {self.path}: {error}; training continues, the log is incomplete',
                    file=sys.stderr,
                    flush=True,
                )
        self.warned = True
        self.path = self.path if self.fd is not None else None

    def _open(self, out_dir, config, run, resumed_from):
        stem = self.path = os.path.join(os.path.abspath(out_dir), time.strftime('run_%Y%m%d_%H%M%S'))
        os.makedirs(out_dir, exist_ok=True)
        self.started, self.speed = time.monotonic(), {key: Speed() for key in ('time_ms', 'tokens_per_sec', 'mfu')}
        self.state = {'status': 'running', 'start_time': utc_now(), 'end_time': None, 'last_record_time': None}
        self.summary = dict.fromkeys(
            ('iterations', 'evaluations', 'checkpoints', 'dropped_records'), 0
        ) | dict.fromkeys(SUMMARY)
        facts = {key: value for key, value in jsonable(run).items() if key not in self.state} | {
            'resumed_from': jsonable(resumed_from)
        }
        # continues the "run" block, which the head page leaves open
        self.facts = f'{encode(facts)[1:]},\n"config": {encode(jsonable(config))}'
        self.regions = {name: SimpleNamespace(start=0, size=size, used=0) for name, size in RESERVE.items()}
        for n in itertools.count(1):
            self.path = f'{stem}.json' if n == 1 else f'{stem}_{n}.json'
            with suppress(FileExistsError):
                self._write_file(self.path + '.tmp', os.O_EXCL, reserve=True)
                break
        threading.Thread(target=self._work, name='training_logger', daemon=True).start()
        # a forked child has no such thread and must not write to the file
        os.register_at_fork(after_in_child=functools.partial(self.__init__, None, None, None, enabled=False))
        at_end('log', lambda error: self.close('failed'))  # no-op after close()

    def _head(self, page):
        """Returns the first page: everything that changes with a record, and nothing else."""
        head = pad(f'{encode({"schema_version": 1, "summary": self.summary, "run": self.state})[:-2]}, ', page)
        if len(head) > PAGE:
            raise ValueError(f'a head of {len(head):,} bytes is longer than a page of {PAGE:,}')
        return head

    def _append(self, name, fields):
        summary, region = self.summary, self.regions[name]
        summary['dropped_records'] += 1  # undone below
        if self.second != (second := int(time.time())):  # check the clock and the folder once a second
            self.second, self.state['last_record_time'] = second, utc_now()
            if os.fstat(self.fd).st_nlink == 0:  # deleted, perhaps with its folder, but open and so still readable
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                self._write_file(self.path + '.new', os.O_TRUNC, reserve=True)
        self._mend()
        fields = jsonable(fields)
        text = f'{"," if region.used else ""}\n{encode(fields)}'.encode()
        if len(text) > PAGE:
            raise ValueError(f'a record of {len(text):,} bytes is longer than a page of {PAGE:,}')
        at = region.used if region.used % PAGE + len(text) <= PAGE else -(-region.used // PAGE) * PAGE
        if at + len(text) > region.size:
            self._grow(region)
        self._overwrite(region.start + at, text)
        region.used = at + len(text)
        summary['dropped_records'] -= 1
        self._tally(name, fields)  # a kill before the next line leaves the summary one record behind
        self._overwrite(0, self._head(PAGE))

    def _tally(self, name, record):
        summary = self.summary
        # the head page has room for numbers only
        record = {
            key: value if isinstance(value, (int, float)) and abs(value) < 1e100 else None
            for key, value in record.items()
        }
        summary[name] += 1
        summary['total_time_s'] = round(time.monotonic() - self.started, 3)
        if name == 'iterations':
            summary['last_iter'] = record['iter']
            summary['peak_memory_bytes'] = (
                max(summary['peak_memory_bytes'] or 0, record['peak_memory_bytes'] or 0) or None
            )
            for key, speed in self.speed.items():
                speed.add(record[key])
                summary[f'{key}_mean'], summary[f'{key}_median'] = speed.mean, speed.median
            self._tally_loss('loss', record)
        elif name == 'evaluations':
            summary['final_train_loss'] = record['train_loss']
            self._tally_loss('val_loss', record)

    def _tally_loss(self, key, record):
        summary, loss = self.summary, record[key]
        summary[f'final_{key}'] = loss
        if loss is not None:
            if summary[f'first_{key}'] is None:
                summary[f'first_{key}'] = loss
            if summary[f'best_{key}'] is None or loss < summary[f'best_{key}']:
                summary[f'best_{key}'], summary[f'best_{key}_iter'] = loss, record['iter']

    def _overwrite(self, at, data):
        """Writes `data` at offset `at`; if that fails half-way, restores the previous bytes."""
        self.torn = (os.pread(self.fd, len(data), at), at)
        try:
            write_all(self.fd, data, at)
            self.torn = None
        finally:
            self._mend()

    def _mend(self):
        if self.torn:  # if the disk refuses these bytes now, the next record tries again
            write_all(self.fd, *self.torn)
            self.torn = None

    def _grow(self, region):
        if time.monotonic() < self.retry_at:
            raise OSError('no space left')
        old, region.size = region.size, -(-region.size * 3 // 2 // PAGE) * PAGE
        try:
            self._write_file(self.path + '.new', os.O_TRUNC, reserve=True)
        except OSError:
            region.size, self.retry_at = old, time.monotonic() + 60  # records are dropped for a minute
            raise

    def _write_file(self, temporary, flag, reserve):
        """
        Writes the whole document to `temporary`, with the records of the present file, and renames it to self.path.
        With O_EXCL self.path must be new, too: the temporary file reserves the name until the rename, so that no two
        runs get the same one.
        """
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | flag, 0o666)
        page, starts, opening = PAGE if reserve else 1, [], self.facts
        try:
            if flag == os.O_EXCL and os.path.exists(self.path):
                raise FileExistsError(self.path)
            at = write_all(fd, self._head(page), 0)
            for name, region in self.regions.items():
                at = write_all(fd, pad(f'{opening},\n"{name}": [', page), at)
                starts.append(at)
                for done in range(0, region.used, MIB):
                    at = write_all(fd, os.pread(self.fd, min(MIB, region.used - done), region.start + done), at)
                for done in range(region.used, region.size if reserve else 0, MIB):
                    at = write_all(fd, b' ' * min(MIB, region.size - done), at)
                opening = ']'
            write_all(fd, b']}\n', at)
            os.replace(temporary, self.path)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                os.unlink(temporary)
            raise
        if self.fd is not None:
            os.close(self.fd)
        self.fd = fd
        for region, start in zip(self.regions.values(), starts, strict=True):
            region.start = start
