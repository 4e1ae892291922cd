"""Micro-steps under FSDP as CUDA graphs, with all that the ranks send: see cuda_graph.py."""

import torch

from cuda_graph import WARMUP, MicroStepGraph
from distributed import mean_over_ranks


class ShardedMicroStepGraph(MicroStepGraph):
    """
    MicroStepGraph for a model that sharding.shard() has sharded, with its set_last_micro_step() called before each micro-step. What is
    gathered, and gradients that are yet to be reduced, stay in the graphs' memory from one micro-step to the next, and FSDP's Python code,
    which knows of them, runs in recordings only: so an iteration is recorded as a whole, and replayed as a whole.
    """

    def __init__(self, step, model):
        super().__init__(step, model)
        self.made, self.at_start, self.replays, self.records = {}, True, False, False

    def __call__(self, X, Y):
        kind = first, last = self.at_start, self.model.last_micro_step
        self.at_start = last
        if first:
            self.iterations += 1
            self.replays = self.iterations > WARMUP and (not self.graphs or X.shape == self.X.shape)
            self.records = kind not in self.graphs
            if self.records:
                self.release()  # what was recorded is of another number of micro-steps
        if not self.replays:
            return self.step(X, Y)
        if kind not in self.graphs and not self.records:
            raise RuntimeError('there are more micro-steps than were recorded: release() the graphs before')
        loss = self.replay(kind, X, Y)
        for p, grad in self.made[kind]:
            p.grad = grad
        return loss

    def record(self, kind, X, Y):
        if self.graphs:  # a recording waits for the replays before it, in which ranks wait for each other; only this has a time limit, dist_timeout
            mean_over_ranks(torch.zeros((), device=X.device))
        before = [p for p in self.parameters if p.grad is None]
        super().record(kind, X, Y)
        self.made[kind] = [(p, p.grad) for p in before if p.grad is not None]

    def settle_gradients(self):
        """FSDP adds to a gradient where it is."""

    def release(self):
        super().release()
        self.made = {}
