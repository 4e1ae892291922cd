"""
The model's Triton kernels, one file per function, each with a PyTorch fallback.

from kernels import layer_norm          # like torch.nn.functional.layer_norm, differentiable
kernels.available('cuda')               # True if Triton's kernels run there
kernels.unavailable_reason('cpu')       # 'Triton does not run on CPUs, ...'; None where they run
"""

from .device import available, unavailable_reason
from .layer_norm import layer_norm

__all__ = ['available', 'layer_norm', 'unavailable_reason']
