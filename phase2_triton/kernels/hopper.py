"""Where the Gluon matmul (matmul_hopper.py) can run, and where it is faster than cuBLAS."""

import math
from functools import cache

import torch
from torch.nn import functional as F

from .device import capability, interpreted, num_multiprocessors, triton

MIN_ROWS = 1024  # fewer would not keep the GPU busy

# Shape (out, in) of a weight -> the fewest rows (tokens) from which the Gluon matmul computes x @ weight.T, and from
# which it computes dy @ weight, faster than cuBLAS. Measured on an H200 with 12,288 and 32,768 rows, and for the last
# four with 8,192 (bench_phase2.py hopper). The table is fixed: a choice by timing could differ between runs.
FEWEST_ROWS = {
    (2304, 768): (0, 24_576),
    (768, 768): (24_576, 24_576),
    (3072, 768): (0, 24_576),
    (768, 3072): (24_576, 0),
    (4800, 1600): (0, 0),
    (1600, 1600): (0, 0),
    (6400, 1600): (0, 0),
    (1600, 6400): (math.inf, 0),
}


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


def gluon_is_faster(x, weight, gradient):
    """
    Returns whether the Gluon matmul computes x @ weight.T faster than cuBLAS, or with gradient x @ weight, and can. x
    and weight have the same dtype.
    """
    fewest = FEWEST_ROWS.get(tuple(weight.shape), (math.inf, math.inf))[gradient]
    return x.numel() // x.shape[-1] >= fewest and fits(x, weight, dtype=x.dtype)


def linear(x, weight):
    """Returns x @ weight.T (..., out) for x (..., in) and weight (out, in) of the same dtype."""
    if gluon_is_faster(x, weight, gradient=False):
        return matmul_hopper().matmul(x, weight, num_multiprocessors(x.device))
    return F.linear(x, weight)


def input_gradient(dy, weight):
    """Returns dy @ weight (..., in) for dy (..., out) and weight (out, in) of the same dtype."""
    if gluon_is_faster(dy, weight, gradient=True):
        return matmul_hopper().matmul(dy, weight, num_multiprocessors(dy.device), b_rows=False)
    return dy @ weight
