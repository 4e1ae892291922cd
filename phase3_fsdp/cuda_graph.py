"""
Forward and backward of a micro-step as CUDA graphs: recorded once, then replayed by a single call. Otherwise the CPU launches
some 500 kernels in each micro-step, and a fast GPU waits for it.

A replay repeats the recorded kernels on the recorded addresses, so what it reads and writes must stay where it is: the batch is
copied into tensors of the graphs' own, and gradients lie where the first graph has made them, or under DDP in its buckets (under FSDP: see
sharded_cuda_graph.py in phase3_fsdp/).
Source: docs.pytorch.org, CUDA semantics, "CUDA Graphs".
"""

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from errors import UserError, out_of_memory

WARMUP = 2  # iterations before the recording: libraries choose their kernels, torch.compile compiles
WARMUP_DDP = (
    11  # DDP orders its buckets in the second iteration, and in the first ten its logger asks the GPU for times
)


def use_cuda_graph(config, world_size):
    """
    config's cuda_graph as True or False; 'auto' becomes True on a GPU, except where a recording is not possible. Call before anything is
    built that lasts, such as DDP. Raises UserError where it cannot be.
    """
    wanted, device = config['cuda_graph'], config['device']
    if wanted not in ('auto', True, False):
        raise UserError(f"cuda_graph is '{wanted}', but it can be auto, True or False")
    on_gpu = device.startswith('cuda')
    # what is computed again in backward repeats its random numbers, by questions to the generator that a recording may refuse: pytorch #162504
    draws_again = config.get('activation_checkpointing') and config['dropout'] > 0
    if wanted is True and not on_gpu:
        raise UserError(f'cuda_graph=True needs a CUDA device, but device is {device}')
    if wanted is True and draws_again:
        raise UserError(
            'cuda_graph=True with dropout under activation_checkpointing is not supported: leave out one of the three'
        )
    several = world_size > 1
    over_cpu = several and config['backend'] != 'nccl'
    if wanted is True and over_cpu:
        raise UserError(
            f'cuda_graph=True works over NCCL only, but backend is {config["backend"]}: leave out one of the two'
        )
    offload = several and config.get('use_fsdp') and config.get('fsdp_cpu_offload')
    if wanted is True and offload:
        raise UserError(
            'cuda_graph=True with fsdp_cpu_offload, where the CPU takes part in backward, is not supported: leave out one of the two'
        )
    use = on_gpu and not (over_cpu or offload or draws_again) if wanted == 'auto' else wanted
    if use:
        use_side_stream(device)
    return use


def use_side_stream(device):
    """What is to be recorded may not touch the default stream."""
    torch.cuda.set_stream(torch.cuda.Stream(device))


class MicroStepGraph:
    """
    step(X, Y) -> detached loss, a function that adds to the gradients of model's parameters, as graphs: of the first micro-step of an
    iteration, which finds no gradients and makes them; of those that add to them; and under DDP of the last, which averages them over the
    ranks. So zero_grad must drop gradients, as set_to_none=True does, whenever weights change: fused optimizers leave no trace by which that
    could be noticed here. X and Y: tensors of the same shapes and dtypes in each call. What else step reads must stay where it is, and what
    it does in Python, such as an if, is done while recording only. The returned loss is valid until the next call.
    """

    def __init__(self, step, model):
        self.step, self.model = step, model
        self.parameters = list(model.parameters())
        self.ddp = isinstance(model, DDP)
        self.iterations, self.graphs, self.losses, self.gradients = 0, {}, {}, []
        if self.ddp:
            model._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # no more times after the first ten iterations

    def __call__(self, X, Y):
        first = all(p.grad is None for p in self.parameters)
        last = self.ddp and self.model.require_backward_grad_sync
        self.iterations += first
        ours = bool(self.gradients) and all(
            p.grad is not None and p.grad.data_ptr() == grad.data_ptr() for p, grad in self.gradients
        )
        recordable = self.iterations > (WARMUP_DDP if self.ddp else WARMUP) and (first or ours)
        if not recordable or (self.graphs and X.shape != self.X.shape):
            loss = self.step(X, Y)
            if (
                last and self.iterations >= WARMUP_DDP
            ):  # gradients are in DDP's last buckets: that is where the graphs' are to be
                self.gradients = [(p, p.grad.detach()) for p in self.parameters if p.grad is not None]
            return loss
        loss = self.replay((first, last), X, Y)
        if first:
            for p, grad in self.gradients:
                p.grad = (
                    grad.detach()
                )  # a tensor of its own with the same memory: autograd would copy one that is also held here
        return loss

    def replay(self, kind, X, Y):
        if kind not in self.graphs:
            self.record(kind, X, Y)
        self.X.copy_(X)
        self.Y.copy_(Y)
        self.graphs[kind].replay()
        return self.losses[kind]

    def record(self, kind, X, Y):
        """Computes nothing."""
        if not self.graphs:
            self.X, self.Y = X.clone(), Y.clone()
        graph = torch.cuda.CUDAGraph()
        # each may use the memory that the others use in passing
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        try:
            # thread_local: NCCL's watchdog, in a thread of its own, may go on asking the GPU how far it is
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode='thread_local'
            ):
                self.losses[kind] = self.step(self.X, self.Y)
                self.settle_gradients()
        except RuntimeError as error:
            cause = out_of_memory(error) or error.__context__ or error  # the end of the recording complains, too
            if not isinstance(cause, RuntimeError) or out_of_memory(cause):  # Ctrl-C, say, or too large a batch
                raise cause from None
            reason = str(cause).split('\n')[0]
            raise UserError(
                f'a micro-step cannot be recorded as a CUDA graph ({reason}): --cuda_graph=False trains without'
            ) from error
        self.graphs[kind] = graph

    def settle_gradients(self):
        """Where a weight is used twice, or DDP has buckets, autograd may have put the sum elsewhere."""
        for p, grad in self.gradients:
            if p.grad.data_ptr() != grad.data_ptr():
                p.grad = grad.copy_(p.grad).detach()
        if not self.gradients:
            self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]

    def release(self):
        """Gives back the memory of the graphs, between two iterations; the next one records anew."""
        self.graphs, self.losses = {}, {}
        if not self.ddp:  # whose buckets stay
            self.gradients = []
        for p in self.parameters:
            vars(p).pop(
                'rounded', None
            )  # a weight in 16 bits, which phase 2's model keeps in a graph's memory for the next one
