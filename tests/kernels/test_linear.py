"""Tests of which library computes a weight's gradient, and that the choice ends with the call."""

import pytest
import torch
from numerics import bf16, bound, device, f64, gpu

from kernels import linear
from kernels.modules import Linear


@pytest.mark.parametrize(
    'shape, rows, expected',
    [
        ((3072, 768), 12_288, True),
        ((768, 3072), 32_768, True),
        ((768, 768), 12_288, True),
        ((768, 768), 32_768, False),
        ((2304, 768), 12_288, False),
        ((2304, 768), 32_768, True),
        ((50304, 768), 12_288, False),
        ((6400, 1600), 8_192, False),
    ],
)
def test_the_table_of_hopper(shape, rows, expected, monkeypatch):
    monkeypatch.setattr(linear, 'capability', lambda device: (9, 0))
    assert linear.takes_cublaslt(torch.empty(shape, device='meta'), rows) == expected
    monkeypatch.setattr(linear, 'capability', lambda device: (8, 0))
    assert not linear.takes_cublaslt(torch.empty(shape, device='meta'), rows), 'another GPU'


def test_the_users_library_is_back_after_an_error(monkeypatch):
    chosen = ['the user chose this']
    monkeypatch.setattr(torch._C, '_get_blas_preferred_backend', lambda: chosen[-1])
    monkeypatch.setattr(torch._C, '_set_blas_preferred_backend', chosen.append)
    with pytest.raises(RuntimeError, match='out of memory'), linear.cublaslt():
        assert chosen[-1] == torch._C._BlasBackend.Cublaslt
        raise RuntimeError('out of memory')
    assert chosen[-1] == 'the user chose this'


@pytest.mark.parametrize('use_triton', [True, False])
@pytest.mark.parametrize('compiled', [True, False])
def test_the_output_without_autocast_may_change_in_place(use_triton, compiled):
    """FSDP gathers the weights in the compute dtype and needs no autocast."""
    layer = Linear(8, 16, bias=True, use_triton=use_triton).to(device, bf16)
    run = torch.compile(layer, fullgraph=True, backend='aot_eager') if compiled else layer
    x = torch.randn(2, 3, 8, device=device, dtype=bf16)
    y = run(x)
    assert not y._is_view() and torch.equal(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    y.mul_(2).sum().backward()
    assert (layer.bias.grad == 12).all()


@pytest.mark.parametrize('bias', [True, False])
def test_the_output_may_change_in_place(bias):
    """Hooks may do so; FSDP warns if a block returns a view."""
    layer = torch.nn.Linear(8, 16, bias=bias, device=device)
    with torch.autocast(device, dtype=bf16):
        y = linear.linear(torch.randn(2, 3, 8, device=device), layer.weight, layer.bias)
    assert not y._is_view() and 'LinearFunction' in type(y.grad_fn).__name__
    y.mul_(2).sum().backward()
    assert (layer.bias is None or (layer.bias.grad == 12).all()) and layer.weight.grad.isfinite().all()


if gpu:

    @pytest.mark.parametrize('shape', [(768, 768), (3072, 768), (768, 3072)])
    def test_gradients_of_both_libraries(shape, monkeypatch, recwarn):
        """
        Both add to float32 gradients, are no further from float64 than cuBLAS, give the same bits every time, and print
        no warning.
        """
        linear.ignore_cublaslt_warning.cache_clear()  # pytest has taken back the filter that an earlier test made
        generator = torch.Generator(device).manual_seed(0)
        random = lambda *shape: torch.randn(*shape, device=device, generator=generator)
        weight = random(*shape).requires_grad_()
        x, dy = random(4096, shape[1]).to(bf16), random(4096, shape[0]).to(bf16)
        before, grads = torch.backends.cuda.preferred_blas_library(), []
        for takes in (lambda *_: True, lambda *_: True, lambda *_: False):
            monkeypatch.setattr(linear, 'takes_cublaslt', takes)
            weight.grad = torch.ones_like(weight)
            with torch.autocast(device, dtype=bf16):
                linear.linear(x, weight).backward(dy)
            grads.append(weight.grad)
        assert torch.backends.cuda.preferred_blas_library() == before and not recwarn.list
        assert torch.equal(grads[0], grads[1])
        bound('dweight', grads[0], 1 + dy.to(f64).T @ x.to(f64), grads[2])
