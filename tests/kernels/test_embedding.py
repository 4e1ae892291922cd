"""Token and position embeddings in one kernel: values and gradients, added to what is there, and what falls back."""

import pytest
import torch
from numerics import bf16, bound, device, f32, f64, gpu
from torch import nn
from torch.nn import functional as F

from kernels.embedding import embeddings

VOCABULARY, POSITIONS = 50, 9


def tables(N):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(rows, N, generator=generator).to(device)) for rows in (VOCABULARY, POSITIONS)]


def tokens(B, T):
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1)).to(device)


def by_pytorch(idx, wte, wpe):
    return F.embedding(idx, wte) + F.embedding(torch.arange(idx.size(1), device=device), wpe)


@pytest.mark.parametrize('dtype', [f32, bf16])
@pytest.mark.parametrize('B, T, N', [(3, 9, 768), (2, 5, 70), (1, 1, 1)] + [(12, 9, 1600)] * gpu)
def test_values_and_gradients(B, T, N, dtype):
    """Twice in a row: the second backward adds to the gradients of the first. Positions from T on have a gradient of zero."""
    results = []
    for function, to in ((embeddings, f32), (by_pytorch, f64), (by_pytorch, f32)):
        wte, wpe = [nn.Parameter(p.detach().to(to)) for p in tables(N)]
        for seed in (1, 2):
            x = function(tokens(B, T), wte, wpe, dtype) if function is embeddings else function(tokens(B, T), wte, wpe)
            dx = torch.randn(B, T, N, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
            x.backward(dx if function is embeddings else dx.to(to))
        results.append((x.detach() if to == f64 else x.detach().to(dtype), wte.grad, wpe.grad))
    for name, *three in zip(('x', 'dwte', 'dwpe'), *results):
        bound(name, *three)


def test_positions_are_summed_in_a_fixed_order():
    grads = []
    for _ in range(2):
        wte, wpe = tables(768)
        embeddings(tokens(7, 9), wte, wpe).backward(torch.ones(7, 9, 768, device=device) / 3)
        grads.append(wpe.grad)
    assert torch.equal(*grads)


def test_a_token_outside_the_vocabulary_is_nan():
    """And moves no gradient."""
    wte, wpe = tables(16)
    idx = tokens(2, 3)
    idx[0, 1], idx[1, 2] = VOCABULARY, -1
    x = embeddings(idx, wte, wpe)
    assert x.isnan().any(-1).tolist() == [[False, True, False], [False, False, True]]
    x.backward(torch.ones_like(x))
    assert wte.grad.sum() == 4 * 16


@pytest.mark.parametrize('frozen', [0, 1])
def test_a_frozen_table(frozen):
    both = tables(16)
    both[frozen].requires_grad_(False)
    embeddings(tokens(2, 3), *both).sum().backward()
    assert both[frozen].grad is None and both[1 - frozen].grad.sum() == 6 * 16


def test_other_weights_are_pytorchs():
    wte, wpe = tables(16)
    idx, expected = tokens(2, 3), by_pytorch(tokens(2, 3), wte, wpe)
    assert torch.equal(embeddings(idx, wte, wpe, use_triton=False), expected)
    assert torch.equal(embeddings(idx, wte * 1.0, wpe), expected), 'weights that are no leaves'
    wide = embeddings(idx, nn.Parameter(wte.detach().double()), nn.Parameter(wpe.detach().double()))
    assert wide.dtype == f64
    compiled = torch.compile(embeddings, fullgraph=True, backend='inductor' if gpu else 'aot_eager')
    torch.testing.assert_close(compiled(idx, wte, wpe), expected)


def test_double_backward_raises():
    wte, wpe = tables(16)
    (grad,) = torch.autograd.grad(embeddings(tokens(2, 3), wte, wpe).square().sum(), wpe, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()
