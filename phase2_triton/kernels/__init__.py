"""Triton kernels of phase 2, one file each, every one with a PyTorch fallback.

from kernels import layer_norm          # like torch.nn.functional.layer_norm, differentiable
kernels.available('cuda')               # can Triton run there?
kernels.unavailable_reason('cpu')       # 'Triton does not run on cpu tensors ...', or None
"""

from .device import available, unavailable_reason
from .layer_norm import layer_norm

__all__ = ['available', 'layer_norm', 'unavailable_reason']
