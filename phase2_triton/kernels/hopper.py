"""Where the Gluon matmul (matmul_hopper.py) can run."""

from functools import cache

import torch

from .device import interpreted, triton
from .linear import capability

MIN_ROWS = 1024  # fewer would not keep the GPU busy


@cache
def matmul_hopper():
    """
    Returns the module matmul_hopper, or None, after a printed line, if this Triton's Gluon, which is experimental,
    lacks what it imports.
    """
    try:
        from . import matmul_hopper
    except (ImportError, AttributeError) as error:
        print(
            'not using the matmul for Hopper GPUs, so training is slower: kernels/matmul_hopper.py does not fit Triton '
            f'{triton.__version__} ({error})'
        )
        return None
    return matmul_hopper


def fits(x, *weights, dtype):
    """Returns whether the Gluon matmul can multiply x (..., K) and the weights, 2-D, all rounded to dtype."""
    if interpreted or not x.is_cuda or dtype != torch.bfloat16 or capability(x.device) != (9, 0):
        return False
    # the GPU's copy engine wants rows that start at multiples of 16 bytes
    aligned = all(size % 8 == 0 for w in weights for size in w.shape)
    aligned = aligned and all(t.data_ptr() % 16 == 0 and t.is_contiguous() for t in (x, *weights))
    return aligned and x.numel() // x.shape[-1] >= MIN_ROWS and matmul_hopper() is not None
