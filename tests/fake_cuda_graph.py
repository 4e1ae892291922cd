"""
CUDA graphs for tests without a GPU: a capture records each PyTorch operation and each kernel launch with its tensors,
and a replay repeats them on the same memory. As with real graphs, Python code in between is not captured, and a capture
changes no existing tensor. Unlike real graphs, they never reuse memory.
"""

import importlib
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

recording = None


class CUDAGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [
                    (tensor, tensor.clone())
                    for tensor in (value if isinstance(value, list) else [value])
                    if tensor.numel()
                ]
        result = function(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else [result]

        def again():
            repeated = function(*args, **kwargs)
            for old, new in zip(outputs, repeated if isinstance(repeated, (tuple, list)) else [repeated]):
                if isinstance(old, torch.Tensor) and new.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return result

    def pool(self):
        return None

    @torch.no_grad()
    def replay(self):
        for call in self.calls:
            call()


@contextmanager
def graph(graph, pool=None, stream=None, capture_error_mode='global'):
    global recording
    recording = graph
    try:
        with graph:
            yield
    finally:
        recording = None
    with torch.no_grad():
        for tensor, value in reversed(graph.before):
            tensor.copy_(value)


def noted(function):
    """Wraps the function so that its calls are recorded."""

    def call_and_note(*args, **kwargs):
        with _disable_current_modes():  # Triton's interpreter and gloo consist of PyTorch operations too
            function(*args, **kwargs)
        if recording is not None:
            recording.calls.append(lambda: function(*args, **kwargs))

    return call_and_note


def noted_launch(launch):
    """Wraps a kernel's launch so that its calls are recorded. A kernel may write to any of its tensors."""
    note = noted(launch)

    def launch_and_note(kernel, grid, tensors, *args, **kwargs):
        if recording is not None:
            recording.before += [(tensor, tensor.detach().clone()) for tensor in tensors]
        note(kernel, grid, tensors, *args, **kwargs)

    return launch_and_note


def install(monkeypatch):
    """Installs the fake CUDA graphs for one test."""
    for name in ('cross_entropy', 'embedding', 'fp8', 'gelu', 'layer_norm', 'layer_norm_gradients'):
        module = importlib.import_module(f'kernels.{name}')
        monkeypatch.setattr(module, 'launch', noted_launch(module.launch))
    linear = importlib.import_module('kernels.linear')
    monkeypatch.setattr(linear, 'capturing', lambda weight: recording is not None)
    install_in_torch(monkeypatch)


def install_in_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', CUDAGraph)
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: None)
