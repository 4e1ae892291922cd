"""Captures micro-steps under FSDP as CUDA graphs, communication included; see cuda_graph.py."""

import torch

from cuda_graph import WARMUP, MicroStep
from distributed import mean_over_ranks


class ShardedMicroStep(MicroStep):
    """
    MicroStep for a model sharded by sharding.shard(). Call sharding.set_last_micro_step() before each micro-step: it
    sets model.last_micro_step, a bool that this class reads. Gathered weights and unreduced gradients stay in the
    graphs' memory from one micro-step to the next, and FSDP's Python code, which tracks them, runs during a capture
    only. An iteration is therefore captured as a whole and replayed as a whole.
    """

    def __init__(self, forward_backward, model, capture):
        super().__init__(forward_backward, model, capture)
        self.gradients_of, self.at_start, self.replays, self.captures = {}, True, False, False

    def _capture_or_replay(self, X, Y):
        kind = first, last = self.at_start, self.model.last_micro_step
        self.at_start = last
        if first:
            self.iterations += 1
            self.replays = self.iterations > WARMUP and (not self.graphs or X.shape == self.X.shape)
            self.captures = kind not in self.graphs
            if self.captures:
                self.release()  # these graphs belong to another number of micro-steps
        if not self.replays:
            return self.forward_backward(X, Y)
        if kind not in self.graphs and not self.captures:
            raise RuntimeError('there are more micro-steps than were captured: call release() first')
        loss = self._replay(kind, X, Y)
        for p, grad in self.gradients_of[kind]:
            p.grad = grad
        return loss

    def _capture(self, kind, X, Y):
        if self.graphs:
            # a capture waits for earlier replays, in which ranks wait for each other; only this wait ends after
            # dist_timeout
            mean_over_ranks(torch.zeros((), device=X.device))
        before = [p for p in self.parameters if p.grad is None]
        super()._capture(kind, X, Y)
        self.gradients_of[kind] = [(p, p.grad) for p in before if p.grad is not None]

    def _settle_gradients(self):
        """Does nothing: FSDP adds to a gradient in place."""

    def release(self):
        super().release()
        self.gradients_of = {}
