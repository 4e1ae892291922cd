"""
Captures forward and backward of a micro-step as CUDA graphs and replays each with a single call. Without CUDA graphs,
the CPU launches about 500 kernels per micro-step, too slowly for a fast GPU.

A replay repeats the captured kernels on the captured addresses, so everything it reads and writes must keep its
address. The batch is copied into the graphs' own tensors. Gradients stay where the first graph allocated them, or under
DDP in its buckets. Source: docs.pytorch.org, CUDA semantics, "CUDA Graphs".
"""

import gc

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from errors import UserError, first_line, out_of_memory

WARMUP = 2  # iterations before the capture, in which libraries choose kernels and torch.compile compiles
WARMUP_DDP = 11  # DDP orders its buckets in the second iteration and times the first ten on the GPU for its logger


def resolve_cuda_graph(config: dict, world_size: int, cpu_offload: bool = False) -> bool:
    """
    Returns config's cuda_graph as True or False; 'auto' becomes True on a GPU that can capture. cpu_offload: the
    trainer keeps weights in CPU memory. Raises UserError if the flag is True and a capture is impossible.
    """
    wanted, device, backend = config['cuda_graph'], config['device'], config['backend']
    if wanted not in ('auto', True, False):
        raise UserError(f"cuda_graph is '{wanted}', but it can be auto, True or False")
    several = world_size > 1
    obstacles = {
        f'needs a CUDA device, but device is {device}': not device.startswith('cuda'),
        # the recomputation asks the generator for its state, which a capture may refuse: pytorch #162504
        'with dropout under activation_checkpointing is not supported: leave out one of the three': (
            config.get('activation_checkpointing') and config['dropout'] > 0
        ),
        f'works over NCCL only, but backend is {backend}: leave out one of the two': several and backend != 'nccl',
        'with CPU offload, where the CPU takes part in backward, is not supported: leave out one of the two': (
            several and cpu_offload
        ),
    }
    found = [text for text, applies in obstacles.items() if applies]
    if wanted is True and found:
        raise UserError(f'cuda_graph=True {found[0]}')
    return wanted is True or (wanted == 'auto' and not found)


def use_side_stream(device: str) -> None:
    """Makes a new CUDA stream current: a capture must stay off the default stream. Call it before building DDP."""
    torch.cuda.set_stream(torch.cuda.Stream(device))


class MicroStep:
    """
    Calls forward_backward(X, Y), a function that adds to the gradients of model's parameters and returns the detached
    loss. With capture=False it does nothing else.

    With capture=True it captures one CUDA graph for the first micro-step of an iteration, which allocates the
    gradients; one for the micro-steps that add to them; and under DDP one for the last, which averages them over the
    ranks. Whenever weights change, zero_grad must drop the gradients, as set_to_none=True does: this is how MicroStep
    recognizes a new iteration. X and Y must have the same shapes and dtypes in each call. Everything else that
    forward_backward reads must keep its address, and its Python code runs during the capture only. The returned loss is
    valid until the next call.
    """

    def __init__(self, forward_backward, model: nn.Module, capture: bool):
        self.forward_backward, self.model, self.capture = forward_backward, model, capture
        self.parameters = list(model.parameters())
        self.ddp = isinstance(model, DDP)
        self.iterations, self.graphs, self.losses, self.gradients = 0, {}, {}, []
        if self.ddp and capture:
            model._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # no timing after the first ten iterations

    def __call__(self, X, Y):
        return self._capture_or_replay(X, Y) if self.capture else self.forward_backward(X, Y)

    def _capture_or_replay(self, X, Y):
        first = all(p.grad is None for p in self.parameters)
        last = self.ddp and self.model.require_backward_grad_sync
        self.iterations += first
        in_place = bool(self.gradients) and all(
            p.grad is not None and p.grad.data_ptr() == grad.data_ptr() for p, grad in self.gradients
        )
        ready = self.iterations > (WARMUP_DDP if self.ddp else WARMUP) and (first or in_place)
        if not ready or (self.graphs and X.shape != self.X.shape):
            loss = self.forward_backward(X, Y)
            if last and self.iterations >= WARMUP_DDP:
                # gradients are now in DDP's final buckets, where the graphs must write them
                self.gradients = [(p, p.grad.detach()) for p in self.parameters if p.grad is not None]
            return loss
        loss = self._replay((first, last), X, Y)
        if first:
            for p, grad in self.gradients:
                # a new tensor on the same memory: autograd would copy a gradient that is also referenced here
                p.grad = grad.detach()
        return loss

    def _replay(self, kind, X, Y):
        if kind not in self.graphs:
            self._capture(kind, X, Y)
        self.X.copy_(X)
        self.Y.copy_(Y)
        self.graphs[kind].replay()
        return self.losses[kind]

    def _capture(self, kind, X, Y):
        """Captures the graph of this kind, (first, last). Computes nothing."""
        if not self.graphs:
            self.X, self.Y = X.clone(), Y.clone()
        graph = torch.cuda.CUDAGraph()
        # the graphs share one pool for their temporary tensors
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        gc.collect()  # if it ran during the capture and destroyed an old graph, the capture would fail: pytorch #161037
        try:
            # thread_local: NCCL's watchdog thread may query the GPU meanwhile
            with torch.cuda.graph(
                graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode='thread_local'
            ):
                self.losses[kind] = self.forward_backward(self.X, self.Y)
                self._settle_gradients()
        except RuntimeError as error:
            cause = out_of_memory(error) or error.__context__ or error  # ending the capture raises a second error
            if not isinstance(cause, RuntimeError) or out_of_memory(cause):  # Ctrl-C, or too large a batch
                raise cause from None
            raise UserError(
                f'a micro-step cannot be captured as a CUDA graph ({first_line(cause)}): train with --cuda_graph=False'
            ) from error
        self.graphs[kind] = graph

    def _settle_gradients(self):
        """
        Moves gradients back to their addresses: autograd may put a tied weight's sum, or DDP's buckets, elsewhere.
        """
        for p, grad in self.gradients:
            if p.grad.data_ptr() != grad.data_ptr():
                p.grad = grad.copy_(p.grad).detach()
        if not self.gradients:
            self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]

    def release(self) -> None:
        """Frees the graphs' memory, if any. Call it between two iterations; the next iteration captures again."""
        if not self.capture:
            return
        self.graphs, self.losses = {}, {}
        if not self.ddp:  # DDP's buckets stay
            self.gradients = []
        for module in self.model.modules():
            if hasattr(module, 'release_graph_state'):  # tensors that a model keeps in the graphs' memory
                module.release_graph_state()
