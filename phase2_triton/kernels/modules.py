"""torch.nn's layers, computed by the functions of this package; with use_triton=False by PyTorch's own."""

import torch
from torch import nn
from torch.nn import functional as F

from .add_layer_norm import add_layer_norm
from .gelu import gelu
from .linear import autocast_dtype, linear


class Linear(nn.Linear):
    def __init__(self, in_features, out_features, bias, use_triton):
        super().__init__(in_features, out_features, bias=bias)
        self.use_triton = use_triton

    def forward(self, input):
        return (linear if self.use_triton else F.linear)(input, self.weight, self.bias)


class GELU(nn.Module):
    def __init__(self, use_triton):
        super().__init__()
        self.use_triton = use_triton

    def forward(self, input):
        return (gelu if self.use_triton else F.gelu)(input)


class AddLayerNorm(nn.Module):
    """
    Adds a branch to the residual stream and normalizes it, with an optional bias: (x, branch) -> (x + branch, layer_norm(x + branch)), all of
    shape (..., ndim). Under autocast the second is in its dtype at once, for the matmul that follows.
    """

    def __init__(self, ndim, bias, use_triton):
        super().__init__()
        self.use_triton = use_triton
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x, branch=None):
        if not self.use_triton:
            x = x if branch is None else x + branch
            return x, F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        return add_layer_norm(x, branch, self.weight, self.bias, 1e-5, autocast_dtype(x))
