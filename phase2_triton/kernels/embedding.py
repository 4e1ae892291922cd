"""Embedding whose gradient is added where the output layer, which has the same weight, has left its own (see linear.py)."""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .device import available
from .linear import can_leave_gradient, take_gradient


class EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, weight):
        ctx.save_for_backward(idx)
        ctx.weight = weight
        return F.embedding(idx, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (idx,) = ctx.saved_tensors
        grad = take_gradient(ctx.weight)
        if grad is None:
            grad = torch.zeros_like(ctx.weight)
        return None, grad.index_add_(0, idx.flatten(), dy.flatten(0, -2).to(grad.dtype))


def embedding(idx, weight):
    """torch.nn.functional.embedding(idx, weight): int64 idx (...), weight (V, C) -> (..., C)."""
    if torch.compiler.is_compiling() or not (available(idx.device) and can_leave_gradient(weight)):
        return F.embedding(idx, weight)
    return EmbeddingFunction.apply(idx, weight)
