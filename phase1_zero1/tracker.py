"""
Sends losses to a tracker in addition to the log: wandb, trackio or tensorboard.

    tracker = Tracker(config, enabled=master_process)
    tracker.log({'iter': 250, 'val/loss': 1.98})

A tracker cannot harm a run. Its calls run in a separate thread, so that a slow tracker costs no time. An exception, or
a call that does not return, becomes one warning, and training continues.
"""

import importlib
import os
import queue
import sys
import threading
from contextlib import suppress

from end_of_run import at_end
from errors import UserError, first_line
from shell import pip_install

INIT_SECONDS = 10  # wait for the tracker to start, so that a login prompt appears before the training's lines
FINISH_SECONDS = 20  # less than the 30 s after which torchrun kills the other ranks of a failed run


def open_wandb(module, config):
    """Starts a run and returns its functions log and finish. trackio has wandb's interface."""
    module.init(project=config['wandb_project'], name=config['wandb_run_name'], config=config)
    return module.log, module.finish


def open_tensorboard(module, config):
    """Opens out_dir/tensorboard and returns functions log and finish."""
    writer = module.SummaryWriter(os.path.join(config['out_dir'], 'tensorboard'))

    def log(record):
        for name, value in record.items():
            if name != 'iter':
                writer.add_scalar(name, value, record['iter'])
        writer.flush()

    return log, writer.close


TRACKERS = {
    'wandb': ('wandb', open_wandb),
    'trackio': ('trackio', open_wandb),
    'tensorboard': ('torch.utils.tensorboard', open_tensorboard),
}


class Tracker:
    """
    Sends records to the tracker that the flags select. config: wandb_log, tracker, wandb_project, wandb_run_name,
    out_dir and all other flags, which the tracker records. Raises UserError if the tracker is unknown or its package is
    not installed.
    """

    def __init__(self, config: dict, enabled: bool = True):
        self.name = 'wandb' if config['wandb_log'] else config.get('tracker', '')
        self.queue = None  # holds records, then None as the end mark; self.queue is None if there is no tracker
        self.warned = False
        if self.name and self.name not in TRACKERS:
            raise UserError(f"tracker is '{self.name}', but it can be {', '.join(TRACKERS)} or empty")
        if not self.name or not enabled:
            return
        self.queue, started, self.missing = queue.SimpleQueue(), threading.Event(), False
        self.thread = threading.Thread(target=self._work, args=(dict(config), started), name='tracker', daemon=True)
        self.thread.start()
        at_end('tracker', self._finish)
        if not started.wait(INIT_SECONDS):
            self._warn(f'it has not started within {INIT_SECONDS} s, and its records wait until it has')
        if self.missing:
            raise UserError(f'{self.name} is the tracker, but its package is not installed: {pip_install(self.name)}')

    def log(self, record: dict) -> None:
        """
        Sends the record, {name: number}, with the iteration under the name 'iter'. Returns at once and never raises.
        """
        records = self.queue  # the thread may set it to None
        if records is not None:
            records.put(record)

    def _work(self, config, started):
        hook, (package, open_tracker) = sys.excepthook, TRACKERS[self.name]
        try:
            log, finish = open_tracker(importlib.import_module(package), config)
        except BaseException as error:  # sys.exit() too
            self.queue = None
            self.missing = isinstance(error, ModuleNotFoundError) and error.name == self.name
            if not self.missing:
                self._warn(error)
            return
        finally:
            sys.excepthook = hook  # wandb wraps it and prints a traceback for every error
            started.set()
        while (record := self.queue.get()) is not None:
            self._attempt(log, record)
        self._attempt(finish)

    def _attempt(self, function, *args):
        try:
            function(*args)
        except BaseException as error:
            self._warn(error)

    def _finish(self, error):
        if self.queue is not None:
            self.queue.put(None)
            self.thread.join(FINISH_SECONDS)
            if self.thread.is_alive():
                self._warn(f'it has not finished within {FINISH_SECONDS} s')
                raise TimeoutError

    def _warn(self, problem):
        if not self.warned:
            self.warned = True
            text = f'{type(problem).__name__}: {first_line(problem)}' if isinstance(problem, BaseException) else problem
            with suppress(Exception):
                print(f'WARNING: {self.name}: {text}; training continues', file=sys.stderr, flush=True)
