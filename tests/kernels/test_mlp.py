"""
Tests of the MLP whose matmuls compute GELU (kernels/mlp.py), and of when matmuls for Hopper GPUs are used. On a CPU,
PyTorch computes these matmuls, and the tests check what is around them; on a Hopper GPU they also check the matmuls.
"""

import sys

import pytest
import torch
from numerics import bf16, bound, device, digest, f32, f64, gpu, leaf
from torch.nn import functional as F

import kernels
from kernels import hopper, mlp
from kernels.modules import Gelu, Linear

on_hopper = gpu and torch.cuda.get_device_capability() == (9, 0)


def plain_matmul_gelu(a, b):
    x = (a.float() @ b.float().t()).to(a.dtype)
    return x, F.gelu(x)


def plain_matmul_gelu_gradient(a, b, x):
    return torch.ops.aten.gelu_backward(a.float() @ b.float(), x.float()).to(a.dtype)


@pytest.fixture(autouse=True)
def matmuls_by_pytorch(monkeypatch):
    if not on_hopper:
        monkeypatch.setattr(mlp, 'matmul_gelu', plain_matmul_gelu)
        monkeypatch.setattr(mlp, 'matmul_gelu_gradient', plain_matmul_gelu_gradient)
        monkeypatch.setattr(hopper, 'fits', lambda *_, dtype: dtype == bf16)


def layers(width=64, bias=False, approximate='none'):
    torch.manual_seed(0)
    fc, proj = Linear(width, 4 * width, bias, True), Linear(4 * width, width, bias, True)
    return [module.to(device) for module in (fc, Gelu(approximate, True), proj)]


def separately(x, fc, gelu, proj):
    return proj(gelu(fc(x)))


def results(function, x, modules, dtype=bf16):
    """Returns the output and the gradients of x and of the weights; those of the weights are added to ones."""
    x, weights = leaf(x), [modules[0].weight, modules[2].weight]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with torch.autocast(device, dtype=dtype, enabled=dtype != f64):
        y = function(x, *modules)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator).to(y))
    return [y.detach(), x.grad, *(weight.grad - 1 for weight in weights)]


@pytest.mark.parametrize('width', [64, 768, 1600] if gpu else [64])
def test_output_and_gradients_against_float64(width):
    modules = layers(width)
    x = torch.randn(2, 1056 if gpu else 40, width).to(device, bf16)
    ours = results(mlp.mlp, x, modules)
    assert mlp.fuses_gelu(x, *modules, bf16)
    theirs = results(separately, x, modules)
    truth = results(separately, x.to(f64), [module.to(f64) for module in modules], f64)
    for name, a, b, c in zip(('y', 'dx', 'fc', 'proj'), ours, truth, theirs):
        bound(name, a, b, c)
    again = results(mlp.mlp, x, layers(width))
    assert digest(again) == digest(ours)


@pytest.mark.parametrize('needs', ['x', 'fc', 'proj'])
def test_each_gradient_alone(needs):
    """Equal, bit for bit, to the one that is computed together with the others."""
    modules = layers()
    x = torch.randn(1, 1024, 64).to(device, bf16)
    _, *all_gradients = results(mlp.mlp, x, modules)
    x, leaves = leaf(x), {'x': None, 'fc': modules[0].weight, 'proj': modules[2].weight}
    leaves['x'] = x
    for name, tensor in leaves.items():
        tensor.requires_grad_(name == needs)
        tensor.grad = None if name == 'x' else torch.ones_like(tensor)
    with torch.autocast(device, dtype=bf16):
        y = mlp.mlp(x, *modules)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    gradient = leaves[needs].grad - (0 if needs == 'x' else 1)
    assert torch.equal(gradient, all_gradients[list(leaves).index(needs)])


def test_where_it_computes_gelu():
    def fuses(modules=None, x=torch.zeros(2, 512, 64, dtype=bf16, device=device), dtype=bf16):
        return mlp.fuses_gelu(x, *(modules or layers()), dtype)

    assert fuses() and not fuses(dtype=torch.float16) and not fuses(dtype=f32)
    assert not fuses(layers(bias=True)) and not fuses(layers(approximate='tanh'))
    with torch.no_grad():
        assert not fuses()
    for i in range(3):
        modules = layers()
        handle = modules[i].register_forward_hook(lambda *_: None)
        assert not fuses(modules)
        handle.remove()
        assert fuses(modules)
        modules[i].register_full_backward_hook(lambda *_: None)
        assert not fuses(modules)
    fc, gelu, proj = layers()
    gelu.use_triton = False
    assert not fuses((fc, gelu, proj))
    assert not fuses((fc, torch.nn.GELU(), proj)) and not fuses(
        (torch.nn.Linear(64, 256, False), Gelu('none', True), proj)
    )


def test_hooks_of_parameters_see_their_gradient():
    fc, gelu, proj = layers()
    seen = []
    for weight in (fc.weight, proj.weight):
        weight.register_hook(lambda gradient: seen.append(gradient.shape) or gradient * 0)
    x = torch.randn(1, 1024, 64).to(device, bf16).requires_grad_()
    with torch.autocast(device, dtype=bf16):
        mlp.mlp(x, fc, gelu, proj).sum().backward()
    assert sorted(seen) == sorted([fc.weight.shape, proj.weight.shape])
    assert not fc.weight.grad.any() and not proj.weight.grad.any() and x.grad.any()


class OnHopper(torch.Tensor):
    is_cuda = True


def test_where_the_matmul_is_used(monkeypatch):
    monkeypatch.undo()  # the real fits()
    found = [(9, 0)]
    monkeypatch.setattr(hopper, 'interpreted', False)
    monkeypatch.setattr(hopper, 'capability', lambda device: found[0])
    monkeypatch.setattr(hopper, 'matmul_hopper', lambda: 'the module')

    def fits(rows=hopper.MIN_ROWS, V=48, C=16, dtype=bf16, offset=0):
        x, w = torch.zeros(rows, C), torch.zeros(V * C + offset)[offset:].view(V, C)
        return hopper.fits(x.as_subclass(OnHopper), w, dtype=dtype)

    assert fits() and fits(rows=1337, V=8, C=1600)
    assert not fits(rows=hopper.MIN_ROWS - 1) and not fits(V=50257) and not fits(C=20)
    assert not fits(dtype=torch.float16) and not fits(dtype=torch.float32) and not fits(offset=1)
    assert hopper.fits(
        torch.zeros(2, 512, 16).as_subclass(OnHopper), torch.zeros(8, 16), torch.zeros(16, 8), dtype=bf16
    )
    monkeypatch.setattr(hopper, 'matmul_hopper', lambda: None)
    assert not fits()
    monkeypatch.setattr(hopper, 'matmul_hopper', lambda: 'the module')
    for found[0] in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert not fits()


def test_a_triton_with_another_gluon(monkeypatch, capsys):
    monkeypatch.setattr(kernels, 'matmul_hopper', None, raising=False)
    monkeypatch.delattr(kernels, 'matmul_hopper')
    monkeypatch.delitem(sys.modules, 'kernels.matmul_hopper', raising=False)
    monkeypatch.setitem(sys.modules, 'triton.experimental.gluon.nvidia.hopper', None)
    hopper.matmul_hopper.cache_clear()
    for _ in range(2):
        assert hopper.matmul_hopper() is None
    hopper.matmul_hopper.cache_clear()
    assert capsys.readouterr().out.count('not using the matmul for Hopper GPUs') == 1
