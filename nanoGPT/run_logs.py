"""
Reads the JSON logs of training runs, written by training_logger.py (schema: LOGGING_GUIDE.md), for
visualize_training.py and other programs: `from run_logs import load_log`. A resumed run is read together with its
predecessors.
"""

import glob
import json
import math
import os
import time
from datetime import UTC, datetime

import numpy as np

from regular_file import check_regular

# a 'running' log without a new record for this long (and for 20 of its slowest steps, and 3 records) is from a dead
# process
DEAD_AFTER_S = 600
LISTS = {'iterations': list, 'evaluations': list, 'checkpoints': list}
METRICS = ('loss', 'lr', 'time_ms', 'tokens_per_sec', 'grad_norm', 'peak_memory_bytes')  # fields of a step
STATE = ('parameters', 'gradients', 'optimizer')  # the parts of state_bytes
COMPARED = (  # with the first of several runs
    'tokens_per_sec_median',
    'peak_memory_bytes',
    'final_val_loss',
    'state_bytes_total',
)
# folders of trainers: the technique, and the flag that turns it off
TECHNIQUES = {'nanoGPT': ('DDP', None), 'phase2_triton': ('DDP', None)}
TECHNIQUES |= {'phase1_zero1': ('ZeRO-1', 'use_zero1'), 'phase3_fsdp': ('FSDP', 'use_fsdp')}


class LogError(ValueError):
    """A problem with a log, an argument or an output, described for the user."""


def load_log(path: str) -> dict:
    """
    Returns the log at `path` as a dict, with the records of the runs it was resumed from before its own. `segments`
    lists the paths of all these logs, oldest first, and `parts` the first iteration and the `run` block of each. Drops
    a predecessor's records at and after the iteration of the resume. `notes` lists what could not be read. Raises
    LogError.
    """
    log = part = _read(path)
    log |= {'segments': [path], 'parts': [], 'notes': []}
    if log.get('schema_version', 1) != 1:
        log['notes'].append(f'{path} has schema_version {log["schema_version"]!r:.20}, and only 1 is known here')
    while True:
        origin = part['run'].get('resumed_from') or {'iter': 0, 'log': None}
        log['parts'].insert(0, (origin['iter'], part['run']))
        before = os.path.join(os.path.dirname(path), os.path.basename(origin['log'] or 'none'))
        if before in log['segments'] or not os.path.isfile(before):
            break  # a log that was copied without its predecessor can still be plotted
        try:
            part = _read(before)
        except LogError as error:
            log['notes'].append(f'{error}; {path} is drawn without it')
            break
        log['segments'].insert(0, before)
        for name in LISTS:
            end = origin['iter'] + (name == 'checkpoints')  # the run resumed from the checkpoint of this iteration
            log[name] = [record for record in part[name] if record['iter'] < end] + log[name]
    return log


def _read(path):
    for attempt in range(5):
        try:
            check_regular(path)
            with open(path, 'rb') as file:
                log = json.loads(file.read())
            break
        except OSError as error:
            raise LogError(f'{path}: {error.strerror}') from error
        except (ValueError, RecursionError) as error:  # a record may be being written at this moment
            if attempt == 4:
                raise LogError(f'{path} is not a JSON document: {error}') from error
            time.sleep(0.05)
    problems = [f'it is a {type(log).__name__}'] if not isinstance(log, dict) else []
    for key, kind in {} if problems else {'run': dict, 'config': dict, **LISTS}.items():
        if key not in log:
            problems.append(f'it has no {key}')
        elif not isinstance(log[key], kind):
            problems.append(f'its {key} is a {type(log[key]).__name__}, not a {kind.__name__}')
    if problems:
        raise LogError(
            f'{path} is not a training log as training_logger.py writes them: {", ".join(problems)}'.replace(
                'NoneType', 'null'
            )
        )
    if not all(
        isinstance(record, dict) and isinstance(record.get('iter'), (int, float))
        for name in LISTS
        for record in log[name]
    ):
        raise LogError(f'{path} is not a training log as training_logger.py writes them: it has a record without iter')
    origin = log['run'].get('resumed_from') or {'iter': 0}
    if (
        not isinstance(origin, dict)
        or not isinstance(origin.get('iter'), (int, float))
        or not isinstance(origin.get('log') or '', str)
    ):
        raise LogError(
            f'{path} is not a training log as training_logger.py writes them: its resumed_from is {origin!r}'
        )
    return log


def _column(records, key):
    """Returns a field as floats; NaN for null and for values too large for an axis."""
    values = np.array([record.get(key) for record in records], float)
    if values.ndim != 1:
        raise ValueError(f'{key} is a list in a record')
    return np.where(np.abs(values) < 1e100, values, math.nan)


def positive(fact):
    """Returns fact if it is a positive number that fits an axis, else None."""
    return fact if isinstance(fact, (int, float)) and 0 < fact < 1e100 else None


class Run:
    """
    A log as numpy columns: `iterations` and `evaluations` map a field to a float array, NaN for null. Raises LogError.
    """

    def __init__(self, path: str):
        try:
            log = load_log(path)
            self.path, self.segments, self.run, self.config = path, log['segments'], log['run'], log['config']
            self.parts, self.notes = log['parts'], log['notes']
            self.results = {}  # evaluate.py's results, the latest of each kind
            for record in log.get('results', []):
                self.results |= record
            self.iterations = {key: _column(log['iterations'], key) for key in ('iter', *METRICS, 'mfu')}
            self.evaluations = {key: _column(log['evaluations'], key) for key in ('iter', 'train_loss', 'val_loss')}
            # bytes is null for a failed save
            self.checkpoints = _column([r for r in log['checkpoints'] if r.get('bytes', 0) is not None], 'iter')
            if np.isnan(np.concatenate((self.iterations['iter'], self.evaluations['iter'], self.checkpoints))).any():
                raise ValueError('a record without iter')
            last = datetime.fromisoformat(self.run.get('last_record_time') or self.run['start_time'])
            silent_s = (datetime.now(UTC) - last).total_seconds()
        except LogError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise LogError(f'{path} is not a training log as training_logger.py writes them: {error!r}') from error
        phase = str(self.run.get('phase', 'run'))
        model = str(self.run.get('model') or self.config.get('model_dir') or '.')
        model = os.path.basename(os.path.normpath(model))
        self.phase = phase if model in ('.', phase) else f'{phase} with {model}'
        self.label = self._technique(phase, phase if model == '.' else model) or self.phase
        state = self.run.get('state_bytes')
        state = state if isinstance(state, dict) else {}
        self.state_bytes = {part: positive(state.get(part)) or 0 for part in STATE}  # per rank
        # a record has the time of one step; assume that the steps since the previous record took as long
        times = np.nan_to_num(self.iterations['time_ms'])
        self.seconds = (
            np.cumsum(times * np.diff(self.iterations['iter'], prepend=self.iterations['iter'][:1] - 1)) / 1e3
        )
        tokens = self.iterations['tokens_per_sec'] * self.iterations['time_ms'] / 1e3
        tokens = np.median(tokens[np.isfinite(tokens)]) if np.isfinite(tokens).any() else 0
        # tokens per step of each part
        self.tokens = [positive(run.get('tokens_per_iter')) or round(float(tokens)) for _, run in self.parts]
        own = self.iterations['iter'] >= self.parts[-1][0]
        # the records of a resumed run itself, without its predecessors', which may come from other devices
        self.own = own if own.any() else np.full(len(own), True)
        self.status, self.silence = str(self.run.get('status')), f'last record {duration(max(0, silent_s))} ago'
        # steps between two records
        spacing = positive(self.config.get('log_interval')) or np.diff(self.iterations['iter']).max(initial=1)
        if self.status == 'running' and silent_s > max(DEAD_AFTER_S, max(20, 3 * spacing) * times.max(initial=0) / 1e3):
            self.status = 'died'

    def _technique(self, phase, model):
        """Returns 'DDP', 'ZeRO-1', 'FSDP', 'Triton', 'ZeRO-1 + Triton', ...; None for folders of another name."""
        if phase not in TECHNIQUES or model not in (phase, *TECHNIQUES):
            return None
        name, flag = TECHNIQUES[phase]
        kernels = model == 'phase2_triton' and self.config.get('use_triton') is not False
        if self.run.get('world_size') == 1:
            name = 'one process'
        elif flag and self.config.get(flag) is not True:  # FSDP's trainer runs the reference trainer, without the flag
            name = 'DDP'
        return name if not kernels else 'Triton' if name in ('DDP', 'one process') else f'{name} + Triton'

    def x(self, iters, axis):
        """
        Returns iteration numbers as positions on the x axis: 'iter', 'tokens' or 'time' (seconds of training steps).
        """
        if axis == 'tokens':
            if not all(self.tokens):
                raise LogError(f'{self.path} does not record the tokens per step, so --x tokens cannot be drawn')
            starts = np.array([0, *(start for start, _ in self.parts[1:])])
            # a resumed run may have another batch size
            before = np.cumsum([0, *np.diff(starts) * self.tokens[:-1]])
            part = np.searchsorted(starts, iters, side='right') - 1
            return before[part] + (iters - starts[part]) * np.array(self.tokens)[part]
        if axis == 'time' and iters.any():
            if not len(self.seconds):
                raise LogError(f'{self.path} has no records of iterations, so --x time cannot be drawn')
            return np.interp(iters, self.iterations['iter'], self.seconds)
        return iters

    def summary(self) -> dict:
        """
        Returns one row of the table. Medians and memory cover the run's own records, without its predecessors'. Medians
        leave out the first 5 of more than 10 records, like the log's own summary.
        """
        iters, val = self.evaluations['iter'], self.evaluations['val_loss']

        def pick(function, values):
            return float(function(values[np.isfinite(values)])) if np.isfinite(values).any() else None

        def last(values):
            return pick(np.max, values[-1:])

        def median(key):
            return pick(np.median, self.iterations[key][self.own][5 if self.own.sum() > 10 else 0 :])

        return {
            'label': self.label,
            'path': self.path,
            'phase': self.run.get('phase'),
            'status': self.status,
            'world_size': self.run.get('world_size'),
            # the log counts a save one iteration after the step
            'last_iter': int(max(x.max(initial=0) for x in (self.iterations['iter'], iters, self.checkpoints - 1))),
            'final_loss': last(self.iterations['loss']),
            'final_train_loss': last(self.evaluations['train_loss']),
            'final_val_loss': last(val),
            'best_val_loss': pick(np.min, val),
            'best_val_loss_iter': int(iters[np.nanargmin(val)]) if np.isfinite(val).any() else None,
            'time_ms_median': median('time_ms'),
            'tokens_per_sec_median': median('tokens_per_sec'),
            'mfu_median': median('mfu'),
            'peak_memory_bytes': pick(np.max, self.iterations['peak_memory_bytes'][self.own]),
            'state_bytes': self.state_bytes if any(self.state_bytes.values()) else None,
            'state_bytes_total': sum(self.state_bytes.values()) or None,
        }


def label_runs(runs):
    """
    Labels each run by its technique, and where that is ambiguous also by its world size, out_dir, file and path, as far
    as they tell runs apart.
    """
    for extra in (
        lambda run: f'{run.run.get("world_size")} ranks',
        lambda run: os.path.basename(os.path.normpath(str(run.config.get('out_dir')))),
        lambda run: os.path.basename(run.path),
        lambda run: run.path,
    ):
        labels = [run.label for run in runs]
        for run, label in zip(runs, labels):
            alike = {extra(other) for other, same in zip(runs, labels) if same == label}
            run.label += f', {extra(run)}' if len(alike) > 1 else ''


def summarize(runs: list[Run]) -> list[dict]:
    """Returns the rows of all runs, with ratios to the first run."""
    rows = [run.summary() for run in runs]
    for row in rows[: len(rows) if len(rows) > 1 else 0]:
        row.update(
            {
                f'{key}_ratio': row[key] / rows[0][key] if row[key] is not None and rows[0][key] else None
                for key in COMPARED
            }
        )
    return rows


def find_logs(paths: list[str]) -> list[str]:
    """Returns the logs for files, folders (their newest run) and globs; for no paths, the newest run under out*/."""

    def newest(logs, where):
        logs = [log for log in logs if os.path.isfile(log)]  # skip broken links
        if not logs:
            raise LogError(f'no run_*.json in {where}: train with --json_log=True, or name a log')
        # sort by the start time in the names: copies may have lost the files' own times
        logs = sorted(logs, key=lambda log: (os.path.basename(log), os.path.getmtime(log)), reverse=True)
        return next((log for log in logs if not _only_evaluates(log)), logs[0])

    found = []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise LogError(f'{path}: no such file or folder')
        found += [
            newest(glob.glob(os.path.join(glob.escape(match), '**', 'run_*.json'), recursive=True), match)
            if os.path.isdir(match)
            else match
            for match in matches
        ]
    found = found or [newest(glob.glob('out*/**/run_*.json', recursive=True), f'out*/ of {os.getcwd()}')]
    return list({os.path.realpath(path): path for path in found}.values())


def _only_evaluates(path):
    """Returns whether the log is from an --eval_only run, which trained nothing. Reads only the start of other logs."""
    try:
        with open(path, 'rb') as file:
            return b'"eval_only": true' in file.read(2**16) and not _read(path)['iterations']
    except (LogError, OSError):
        return False  # whoever reads the log reports it


def load_runs(paths: list[str]) -> list[Run]:
    """
    Returns the runs of find_logs(paths), without those that are part of another run. A log that cannot be read becomes
    a note of the first run. Raises LogError if no log can be read.
    """
    runs, unread = [], []
    for path in find_logs(paths):
        try:
            runs.append(Run(path))
        except LogError as error:
            unread.append(error)
    if not runs:
        raise LogError('\n'.join(map(str, unread)))
    drawn = []
    for run in runs:  # skip runs that are drawn as an earlier part of a resumed run
        after = [
            (one, i)
            for one in runs
            for i, path in enumerate(one.segments[:-1], 1)
            if os.path.realpath(path) == os.path.realpath(run.path)
        ]
        drawn += [] if after else [run]
        last = run.summary()['last_iter']
        if after and all(one.parts[i][0] <= last for one, i in after):
            one, i = after[0]
            one.notes.append(
                f'{one.path} continues from iteration {one.parts[i][0]} of {run.path}, whose own later '
                f'iterations up to {last} are left out'
            )
    runs = drawn
    runs[0].notes += [f'{error}; the other logs are drawn without it' for error in unread]
    label_runs(runs)
    return runs


def duration(seconds: float) -> str:
    """Returns a duration with one unit, such as '1.5 h' or '45.0 s'."""
    for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'min')):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.1f} s' if math.isfinite(seconds) else 'never'
