"""
What the tests of the kernels share. The numbers are compared with float64, in the manner of quack's tests: whatever is asked of
our kernel is asked of PyTorch's own in the same dtype, and ours may be at most twice as far from the truth.
"""

import hashlib

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')

from kernels import device as kernel_device

gpu = not kernel_device.interpreted
device = 'cuda' if gpu else 'cpu'
f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# the interpreter truncates float32 to bfloat16 instead of rounding it: up to one unit in the last of 8 bits
interpreter_slack = {bf16: 8e-3, f16: 0.0, f32: 0.0}
dtypes = [f32, bf16, f16]


def leaf(t, *to):
    return None if t is None else t.detach().to(*to).requires_grad_()


def digest(tensors):
    return hashlib.sha256(b''.join(t.detach().cpu().float().numpy().tobytes() for t in tensors)).hexdigest()


def same(a, b):
    """Equal bits; in the interpreter, which truncates to bfloat16 what PyTorch's casts round, up to the last of its 8 bits."""
    return torch.equal(a, b) or (not gpu and a.dtype == b.dtype == bf16 and torch.allclose(a, b, rtol=8e-3, atol=1e-6))


def bound(name, a, b, c, terms=None, rounded_to=None, factor=2):
    """
    err(a) < factor * err(c) + tiny against the truth b, by norm and by largest element; a is ours, c PyTorch's. tiny is what summing in another
    order may change: 2e-6 of the result, or of `terms`, the size of what is subtracted there, which may cancel.
    rounded_to: the dtype in which kernels wrote it, or what it is made of, if that is not a's.
    """
    assert a.shape == b.shape and a.dtype == c.dtype, (
        f'{name}: {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {c.dtype}'
    )
    assert not a.isnan().any(), f'{name}: NaN'
    slack = 0.0 if gpu else interpreter_slack[rounded_to or a.dtype]
    for norm in (torch.Tensor.norm, lambda t: t.abs().max()) if a.numel() else ():
        scale = norm(b if terms is None else terms) + 1e-30
        error, theirs = norm(a.to(f64) - b) / scale, norm(c.to(f64) - b) / scale
        assert error <= factor * theirs + max(2e-6, slack), f'{name}: error {error:.2e}, PyTorch {theirs:.2e}'
