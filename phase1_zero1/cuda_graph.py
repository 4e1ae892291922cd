"""
Forward and backward of a micro-step as a CUDA graph: recorded once, then replayed by a single call. Otherwise the CPU launches
some 500 kernels in each micro-step, and a fast GPU waits for it.

A replay repeats the recorded kernels on the recorded addresses, so what it reads and writes must stay where it is: the batch is
copied into tensors of the graph's own, and the gradients, which the optimizer's zero_grad drops, are put back, as zeros, before
the next. Source: docs.pytorch.org, CUDA semantics, "CUDA Graphs".
"""

import torch

from errors import UserError

WARMUP = 3  # micro-steps before the recording, in which libraries choose their kernels and torch.compile compiles


def use_side_stream(device):
    """Call before anything is built that lasts, such as DDP: what is to be recorded may not touch the default stream."""
    if not device.startswith('cuda'):
        raise UserError(f'cuda_graph=True needs a CUDA device, but device is {device}')
    torch.cuda.set_stream(torch.cuda.Stream(device))


class MicroStepGraph:
    """
    step(X, Y) -> detached loss, a function that adds to the gradients of model's parameters, as a graph. X and Y: tensors of the same
    shapes and dtypes in each call. The returned loss is valid until the next call.
    """

    def __init__(self, step, model):
        self.step = step
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.calls, self.graph = 0, None

    def __call__(self, X, Y):
        self.calls += 1
        if self.calls <= WARMUP:
            return self.step(X, Y)
        if self.graph is None:
            self.record(X, Y)
        elif self.parameters[0].grad is None or self.parameters[0].grad.data_ptr() != self.grads[0].data_ptr():
            torch._foreach_zero_(self.grads)
            self.put_back_gradients()
        self.X.copy_(X)
        self.Y.copy_(Y)
        self.graph.replay()
        return self.loss

    def record(self, X, Y):
        self.X, self.Y = X.clone(), Y.clone()
        self.grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        self.put_back_gradients()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):  # records, and computes nothing
            self.loss = self.step(self.X, self.Y)
        self.put_back_gradients()

    def put_back_gradients(self):
        for p, grad in zip(self.parameters, self.grads):
            p.grad = grad.detach()  # a tensor of its own with the same memory: autograd would copy one that is also held here
