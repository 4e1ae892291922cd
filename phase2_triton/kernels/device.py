"""The one place that decides whether Triton kernels can run on a device, and that survives a missing Triton.

Kernel files take `triton`, `tl` and `jit` from here: where Triton is not installed, `jit` leaves the function alone, so the
package still imports and its functional layer falls back to PyTorch.
"""

import math
from functools import cache
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError as error:  # CPU-only wheels, Windows, macOS
    triton, tl, missing = (
        None,
        SimpleNamespace(constexpr=None),
        str(error),
    )  # tl only for the annotations of the kernels
    interpreted = False
else:
    missing = None
    interpreted = knobs.runtime.interpret  # TRITON_INTERPRET=1; read now, because jit() below reads it now too

min_capability = (
    8,
    0,
)  # Ampere: the oldest with bfloat16 and with cp.async, and the oldest these kernels are compiled for in tests


def jit(fn):
    """triton.jit where Triton is installed; elsewhere the function itself, never to be launched."""
    return fn if triton is None else triton.jit(fn)


def unavailable_reason(device):
    """Why Triton kernels cannot run on `device` (torch.device, str or None for the current GPU), in words; None if they can."""
    device = torch.device('cuda' if device is None else device)
    return _unavailable_reason(device.type, device.index)


@torch.compiler.assume_constant_result  # asked once per trace: probing the driver is nothing to compile
def available(device=None):
    """Whether Triton kernels can run on `device`: a CUDA GPU that Triton supports, or, under TRITON_INTERPRET=1, a CPU."""
    return unavailable_reason(device) is None


@cache
def _unavailable_reason(kind, index):
    if missing is not None:
        return f'Triton is not installed ({missing})'
    if interpreted and kind in ('cpu', 'cuda'):
        return None
    if kind != 'cuda':
        return f'Triton does not run on {kind} tensors' + (
            ' (TRITON_INTERPRET=1 was not set at import)' if kind == 'cpu' else ''
        )
    if not torch.cuda.is_available():
        return 'no CUDA device is available'
    if torch.version.hip:
        return 'these kernels are tuned and tested for NVIDIA GPUs only'
    capability = torch.cuda.get_device_capability(index)
    if capability < min_capability:
        have, need = ('.'.join(map(str, c)) for c in (capability, min_capability))
        return f'{torch.cuda.get_device_name(index)} has compute capability {have}, the kernels need {need}'
    try:
        triton.runtime.driver.active.get_current_target()  # builds Triton's launcher: fails without a C compiler or Python headers
    except Exception as error:
        return f'Triton cannot start on this machine: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}'
    return None


@cache
def num_multiprocessors(device):
    """Streaming multiprocessors of a GPU; 2 in the interpreter, where programs run one after another and only cost time."""
    return 2 if interpreted else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def l2_bytes(device):
    """L2 cache of a GPU in bytes; no limit in the interpreter."""
    return math.inf if interpreted else torch.cuda.get_device_properties(device).L2_cache_size


@cache
def programmatic_launch(device):
    """Whether a kernel may start while the one before it drains: Hopper and later."""
    return not interpreted and torch.cuda.get_device_capability(device) >= (9, 0)


answers = {}


@torch.compiler.assume_constant_result  # torch.compile asks while it traces, so neither the question nor the print breaks the graph
def announce_triton(use_triton, device):
    """Prints, once, whether Triton's kernels compute the model on this device, and if not why. Returns whether they do."""
    asked = use_triton, device
    if asked not in answers:
        reason = unavailable_reason(device) if use_triton else 'use_triton is off'
        line = f'not using Triton-accelerated LayerNorm: {reason}' if reason else 'using Triton-accelerated LayerNorm'
        line += '' if reason else ', GELU and cross-entropy'
        if line not in answers.values():
            print(line)
        answers[asked] = line
    return answers[asked].startswith('using')
