"""
Decides whether Triton kernels can run on a device, and tells what the kernels need to know about that device.

Kernel files import `triton`, `tl` and `jit` from here, not from Triton. If Triton is not installed, `jit` returns the
function unchanged, so the package can still be imported and its functions fall back to PyTorch.
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
    triton, missing = None, str(error)
    tl = SimpleNamespace(constexpr=None)  # for the annotations in the kernels' signatures
    interpreted = False
else:
    missing = None
    interpreted = knobs.runtime.interpret  # TRITON_INTERPRET=1; triton.jit also reads it at import

# Ampere is the oldest GPU with bfloat16 and cp.async, and the oldest for which tests compile the kernels
MIN_CAPABILITY = (8, 0)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # those that the kernels compute with


def jit(fn):
    """Returns triton.jit(fn), or fn itself, which is then never launched, if Triton is not installed."""
    return fn if triton is None else triton.jit(fn)


def unavailable_reason(device):
    """Returns why Triton kernels cannot run on device (None: the current GPU), or None if they can."""
    device = torch.device('cuda' if device is None else device)
    return _unavailable_reason(device.type, device.index)


@torch.compiler.assume_constant_result  # torch.compile must not trace into queries of the driver
def available(device=None):
    """
    Returns whether Triton kernels can run on device: a CUDA GPU that Triton supports, or a CPU if TRITON_INTERPRET=1.
    """
    return unavailable_reason(device) is None


@cache
def _unavailable_reason(kind, index):
    if missing is not None:
        return f'Triton is not installed ({missing})'
    if interpreted and kind in ('cpu', 'cuda'):
        return None
    if kind == 'cpu':
        return 'Triton does not run on CPUs, apart from its slow interpreter (TRITON_INTERPRET=1)'
    if kind != 'cuda':
        return f'Triton does not run on {kind} devices'
    if not torch.cuda.is_available():
        return 'no CUDA device is available'
    if torch.version.hip:
        return 'these kernels are tuned and tested for NVIDIA GPUs only'
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        have, need = ('.'.join(map(str, c)) for c in (capability, MIN_CAPABILITY))
        return f'{torch.cuda.get_device_name(index)} has compute capability {have}, the kernels need {need}'
    try:
        # builds Triton's launcher, which needs a C compiler and Python's headers
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f'Triton cannot start on this machine: {reason}'
    return None


@cache
def num_multiprocessors(device):
    """
    Returns the number of streaming multiprocessors of a GPU; 2 in the interpreter, where programs run one by one.
    """
    return 2 if interpreted else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def l2_bytes(device):
    """Returns the size of a GPU's L2 cache in bytes; infinity in the interpreter."""
    return math.inf if interpreted else torch.cuda.get_device_properties(device).L2_cache_size


@cache
def programmatic_launch(device):
    """Returns whether a kernel can start while the one before it drains, as on Hopper and later GPUs."""
    return not interpreted and torch.cuda.get_device_capability(device) >= (9, 0)


answers = {}  # (use_triton, device) -> the line that was printed


@torch.compiler.assume_constant_result  # called while torch.compile traces, so that the print breaks no graph
def announce_triton(use_triton, device):
    """
    Prints, once, whether Triton's kernels compute the model on this device, or else why not. Returns whether they do.
    """
    asked = use_triton, device
    if asked not in answers:
        reason = unavailable_reason(device) if use_triton else 'use_triton is off'
        line = f'not using Triton-accelerated LayerNorm: {reason}' if reason else 'using Triton-accelerated LayerNorm'
        line += '' if reason else ', GELU and cross-entropy'
        if line not in answers.values():
            print(line)
        answers[asked] = line
    return answers[asked].startswith('using')
