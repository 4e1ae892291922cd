"""Reports a run: each iteration or evaluation becomes a printed line, a log entry and a record for the tracker."""

import math
import os

from distributed import max_over_ranks, sum_over_ranks
from errors import UserError
from tracker import Tracker
from training_logger import TrainingLogger


class RunReport:
    """
    Prints, logs and tracks a run. config: all flags. facts: the log's `run` block. model: its rank_state, if it has
    one, adds counts to each iteration's record. enabled: True on rank 0; on other ranks the methods print and write
    nothing. Every rank must call iteration(), which sums the counts, and close(). resumed_from: see TrainingLogger.
    """

    def __init__(self, config: dict, facts: dict, model, enabled: bool, first_iter: int, resumed_from: dict | None):
        self.log = TrainingLogger(config['out_dir'], config, facts, enabled and config['json_log'], resumed_from)
        self.tracker = Tracker(config, enabled)
        # without its own log, a checkpoint refers to the predecessor's
        self.log_name = os.path.basename(self.log.path or (resumed_from or {}).get('log') or '')
        self.max_iters, self.first_iter, self.running_mfu = config['max_iters'], first_iter, None
        self.rank_state, self.device = getattr(model, 'rank_state', None), config['device']
        self.for_tracker = {}  # sent after the save that may follow, or with the next iteration
        self.out_dir, self.saved_iter = config['out_dir'], (resumed_from or {}).get('iter', -1)  # -1: nothing is saved

    def evaluation(self, iter_num: int, losses: dict, lr: float) -> None:
        """Reports an evaluation. losses: {'train': nats, 'val': nats, ...}; further entries are logged unchanged."""
        more = {k: v for k, v in losses.items() if k not in ('train', 'val') and v is not None}
        text = f', val {more["val_bits_per_byte"]:.4f} bits per byte' if 'val_bits_per_byte' in more else ''
        print(f'step {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}{text}')
        if not math.isfinite(losses['val']):
            print('note: a state whose validation loss is not finite is not saved')
        self.log.evaluation(iter_num, train_loss=losses['train'], val_loss=losses['val'], lr=lr, **more)
        self.for_tracker = {'train/loss': losses['train'], 'val/loss': losses['val'], **more}
        self.for_tracker |= {'iter': iter_num, 'lr': lr, 'mfu': (self.running_mfu or 0) * 100}

    def checkpoint(self, iter_num: int, **written) -> None:
        if written['bytes'] is not None:
            self.saved_iter = iter_num
        self.log.checkpoint(iter_num, **written)
        self._track()

    def iteration(self, iter_num: int, *, skipped_steps: int, **record) -> None:
        """
        Reports an iteration. record: loss, lr, time_ms, tokens_per_sec, mfu (a fraction, or None), grad_norm,
        peak_memory_bytes.
        """
        counts = sum_over_ranks(self.rank_state.log(), self.device) if self.rank_state else {}
        mfu = record['mfu']
        if mfu is not None and iter_num >= self.first_iter + 5:  # the first iterations compile and warm up
            self.running_mfu = mfu if self.running_mfu is None else 0.9 * self.running_mfu + 0.1 * mfu
        line = f'iter {iter_num}: loss {record["loss"]:.4f}, time {record["time_ms"]:.2f}ms'
        line += f', mfu {"n/a" if self.running_mfu is None else f"{self.running_mfu * 100:.2f}%"}'
        line += f', {record["tokens_per_sec"]:,.0f} tokens/s'
        line += f', {skipped_steps} steps skipped' if skipped_steps else ''
        print(line + f', {duration((self.max_iters - iter_num) * record["time_ms"] / 1000)} left')
        self.log.iteration(iter_num, **record, skipped_steps=skipped_steps, **counts)
        self._track()

    def flush(self) -> None:
        """Writes the last record to the log in the background, while the GPU works."""
        self.log.flush()

    def close(self, status: str, unsaved: str | None = None) -> None:
        """
        Ends the log. status: completed or stopped. unsaved: why the last state is not saved; raises UserError with it
        instead, which ends the log as failed.
        """
        self._track()
        if unsaved:
            saved_iter = int(max_over_ranks(self.saved_iter))  # only rank 0 learns when a sharded save ends
            latest = 'This run has saved no checkpoint. Train again'
            if saved_iter >= 0:
                latest = f'The latest checkpoint in {self.out_dir} continues at iteration {saved_iter}. Resume from it'
            raise UserError(f'{unsaved}. {latest} with a lower --learning_rate, more --warmup_iters or --grad_clip=1.0')
        self.log.close(status)

    def _track(self):
        if self.for_tracker:
            self.tracker.log(self.for_tracker)
            self.for_tracker = {}


def duration(seconds: float) -> str:
    """Returns a duration such as '2 d 3 h', '1 h 40 min', '12 min' or '45 s'."""
    if not math.isfinite(seconds):
        return 'n/a'
    minutes = seconds / 60
    if minutes < 2:
        return f'{max(seconds, 0):.0f} s'
    if minutes < 60:
        return f'{minutes:.0f} min'
    if minutes < 48 * 60:
        return f'{minutes // 60:.0f} h {minutes % 60:.0f} min'
    return f'{minutes // 1440:.0f} d {minutes % 1440 / 60:.0f} h'
