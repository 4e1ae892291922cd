"""
torch.nn's layers, computed by the functions of this package, or by PyTorch's own with use_triton=False.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .add_layer_norm import add_layer_norm
from .fp8_linear import active, fp8_linear, slot_of_gradient, slot_of_input
from .gelu import gelu
from .linear import autocast_dtype, linear, plain_linear


class Linear(nn.Linear):
    fp8 = None  # or an fp8_linear.Layer, which selects the matmuls in FP8

    def __init__(self, in_features, out_features, bias, use_triton):
        super().__init__(in_features, out_features, bias=bias)
        self.use_triton = use_triton

    def forward(self, input):
        if active(self.fp8):
            return fp8_linear(input, self.weight, self.bias, autocast_dtype(input) or input.dtype, self.fp8)
        return (linear if self.use_triton else plain_linear)(input, self.weight, self.bias)


class Gelu(nn.Module):
    fp8 = fp8_before = None  # or the Layers of the Linear that follows and of the one before

    def __init__(self, approximate, use_triton):
        super().__init__()
        self.approximate, self.use_triton = approximate, use_triton

    def forward(self, input):
        if self.use_triton:
            return gelu(input, self.approximate, slot_of_input(self.fp8), slot_of_gradient(self.fp8_before))
        return F.gelu(input, approximate=self.approximate)


class AddLayerNorm(nn.Module):
    """
    Adds a branch to the residual stream and normalizes the sum, with an optional bias. Maps (x, branch), both (...,
    ndim), to (x + branch, layer_norm(x + branch)). Under autocast the second result is in autocast's dtype, for the
    matmul that follows.
    """

    fp8 = fp8_before = None  # or the Layers of the Linear that follows and of the one that computes the branch

    def __init__(self, ndim, bias, use_triton):
        super().__init__()
        self.use_triton = use_triton
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x, branch=None):
        if not self.use_triton:
            x = x if branch is None else x + branch
            return x, F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        slots = slot_of_input(self.fp8), slot_of_gradient(self.fp8_before)
        return add_layer_norm(x, branch, self.weight, self.bias, 1e-5, autocast_dtype(x), *slots)
