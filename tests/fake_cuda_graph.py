"""
CUDA graphs for tests without a GPU: notes each operation of PyTorch and each launch of a kernel with its tensors, and repeats them on the
same memory. Like the real ones it knows nothing of the Python code between them, and recording changes no tensor that was there before.
Unlike them it never uses memory twice.
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


def noted(launch):
    def launch_and_note(kernel, grid, tensors, *args, **kwargs):
        args = kernel, grid, tensors, *args
        if recording is not None:
            recording.before += [(tensor, tensor.detach().clone()) for tensor in tensors]  # a kernel may write to any
        with _disable_current_modes():  # Triton's interpreter is made of PyTorch's operations, too, and so is gloo
            launch(*args, **kwargs)
        if recording is not None:
            recording.calls.append(lambda: launch(*args, **kwargs))

    return launch_and_note


def install(monkeypatch):
    """For the length of a test."""
    for name in ('cross_entropy', 'embedding', 'gelu', 'layer_norm', 'layer_norm_gradients'):
        module = importlib.import_module(f'kernels.{name}')
        monkeypatch.setattr(module, 'launch', noted(module.launch))
    linear = importlib.import_module('kernels.linear')
    monkeypatch.setattr(linear, 'capturing', lambda weight: recording is not None)
    install_in_torch(monkeypatch)


def install_in_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', CUDAGraph)
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: None)
