"""Tests of the decode step of sampling: matmuls of a few rows with what surrounds them, and attention to a cache."""

import pytest
import torch
from numerics import bf16, bound, device, f32, f64, gpu
from torch.nn import functional as F

from kernels.decode import attention, gemv
from kernels.modules import AddLayerNorm


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize('dtype', [f32, bf16])
@pytest.mark.parametrize('B, K, N', [(1, 768, 70), (3, 72, 30), (2, 3072, 64)] + [(16, 1600, 6400)] * gpu)
@pytest.mark.parametrize(
    'norm, bias, gelu, add', [(True, True, 'none', False), (True, False, 'tanh', False), (False, True, '', True)]
)
def test_matmul(B, K, N, norm, bias, gelu, add, dtype):
    """In 16 bits, PyTorch rounds between the operations and the kernel only before and after the matmul."""
    x, weight, b, y = randn(0, B, K) + 1, randn(1, N, K) / K**0.5, randn(2, N), randn(3, B, N)
    layer = AddLayerNorm(K, bias=bias, use_triton=True).to(device)
    layer.weight.data = randn(4, K)
    x = x if norm else x.to(dtype)

    def by_pytorch(to, half):
        h = x.to(to)
        if norm:
            h = F.layer_norm(h, (K,), layer.weight.to(to), layer.bias.to(to) if bias else None, 1e-5)
        h = F.linear(h.to(half), weight.to(dtype).to(half), b.to(dtype).to(half) if bias else None)
        h = F.gelu(h, approximate=gelu) if gelu else h
        return y.to(to) + h.to(to) if add else h

    out = y.clone() if add else torch.empty(B, N, dtype=dtype, device=device)
    gemv(x, weight.to(dtype), b.to(dtype) if bias else None, out, layer if norm else None, gelu, add)
    bound('y', out, by_pytorch(f64, f64), by_pytorch(f32, dtype))


@pytest.mark.parametrize('dtype', [f32, bf16])
@pytest.mark.parametrize('B, H, D, length, position', [(1, 2, 64, 32, 0), (2, 3, 24, 640, 517), (1, 1, 64, 300, 299)])
def test_attention_to_a_cache(B, H, D, length, position, dtype):
    """Keys and values from `position` on do not count; the new token's are added there."""
    qkv, cache = randn(0, B, 3 * H * D).to(dtype), randn(1, 2, B, H, length, D).to(dtype)
    expected = cache.clone()
    q, kv = qkv.view(B, 3, H, 1, D)[:, 0], qkv.view(B, 3, H, D)[:, 1:].transpose(0, 1)
    expected[:, :, :, position] = kv
    cache[:, :, :, position:] = float('nan')
    y = torch.empty(B, H * D, dtype=dtype, device=device)
    attention(qkv, cache, torch.tensor([position], device=device), y, H)
    assert torch.equal(cache[:, :, :, : position + 1], expected[:, :, :, : position + 1])
    assert cache[:, :, :, position + 1 :].isnan().all()
    filled = expected[:, :, :, : position + 1]
    exact, theirs = (F.scaled_dot_product_attention(q.to(to), *filled.to(to)).flatten(1) for to in (f64, dtype))
    bound('y', y, exact, theirs)
