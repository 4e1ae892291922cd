"""Tests of GELU and its derivative against float64, over the whole number line."""

import pytest
import torch
from numerics import bf16, bound, device, dtypes, f16, f32, f64, gpu, leaf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kernels.gelu import gelu


def exact_gelu(x):
    """Returns gelu and its derivative in float64, from erfc, which does not cancel for negative x."""
    x = x.to(f64)
    below = torch.special.erfc(-x / 2**0.5) / 2
    return x * below, below + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


@pytest.mark.parametrize('dtype', dtypes)
def test_gelu_on_a_dense_grid(dtype):
    """
    The error is at most twice PyTorch's largest error, and everywhere within a rounding plus the formula's error,
    1.5e-7 of |x| / 2. The second bound matters below -4, where PyTorch, which computes 1 + erf in float32, loses all
    digits.
    """
    x = torch.linspace(-30, 30, 600_001 if gpu else 60_001, device=device, dtype=f64).to(dtype)
    ours, theirs = leaf(x), leaf(x)
    y, their_y = gelu(ours), F.gelu(theirs)
    y.sum().backward()
    their_y.sum().backward()
    assert y.dtype == ours.grad.dtype == dtype
    # half a unit in the last place; the interpreter truncates bfloat16
    rounding = {f32: 2**-23, bf16: 2**-8 if gpu else 2**-7, f16: 2**-10}[dtype]
    for what, got, torchs, truth in zip(('y', 'dx'), (y, ours.grad), (their_y, theirs.grad), exact_gelu(x)):
        bound(what, got.detach(), truth, torchs.detach())
        error = (got.detach().to(f64) - truth).abs()
        allowed = (
            1.5e-7 * (x.to(f64).abs() / 2 + 1) + (2 * rounding) * truth.abs() + {f32: 2e-7, bf16: 0, f16: 2**-24}[dtype]
        )
        worst = (error / allowed).argmax()
        assert error[worst] <= allowed[worst], (
            f'{what} at {x[worst]}: error {error[worst]:.2e}, allowed {allowed[worst]:.2e}'
        )


@pytest.mark.parametrize('dtype', dtypes)
def test_tanh_gelu_on_a_dense_grid(dtype):
    """
    The error against float64 is at most twice PyTorch's largest, and everywhere within a rounding of the result plus
    3e-7 of |x| + 1, a few roundings of float32 arithmetic. At +-60,000, where float32 cubes are still finite but
    float16 squares are not, the function is x or 0.
    """
    x = torch.linspace(-30, 30, 600_001 if gpu else 60_001, device=device, dtype=f64).to(dtype)
    ours, theirs, truth = leaf(x), leaf(x), leaf(x.to(f64))
    results = [gelu(ours, approximate='tanh'), F.gelu(theirs, approximate='tanh'), F.gelu(truth, approximate='tanh')]
    for y in results:
        y.sum().backward()
    assert results[0].dtype == ours.grad.dtype == dtype
    rounding = {f32: 2**-23, bf16: 2**-8 if gpu else 2**-7, f16: 2**-10}[dtype]
    for what, got, torchs, exact in (('y', *results), ('dx', ours.grad, theirs.grad, truth.grad)):
        got, torchs, exact = got.detach(), torchs.detach(), exact.detach()
        bound(what, got, exact, torchs)
        allowed = 3e-7 * (x.to(f64).abs() + 1) + 2 * rounding * exact.abs() + (2**-24 if dtype == f16 else 0)
        assert ((got.to(f64) - exact).abs() <= allowed).all(), what
    far = leaf(torch.tensor([6e4, -6e4], device=device, dtype=dtype))
    y = gelu(far, approximate='tanh')
    y.sum().backward()
    assert y.tolist() == [far[0].item(), 0] and far.grad.tolist() == [1, 0]


@pytest.mark.parametrize('dtype', dtypes)
def test_gelu_of_special_numbers(dtype):
    """NaN, infinities, signed zeros, the smallest and the largest numbers. -inf is multiplied by 0, as in PyTorch."""
    info = torch.finfo(dtype)
    x = torch.tensor(
        [
            float('nan'),
            float('inf'),
            -float('inf'),
            0.0,
            -0.0,
            info.smallest_normal / 4,
            -info.smallest_normal / 4,
            info.max,
            info.min,
        ],
        device=device,
        dtype=dtype,
    )
    x.requires_grad_()
    y = gelu(x)
    y.sum().backward()
    nan, tiny = float('nan'), info.smallest_normal
    expected = [nan, float('inf'), nan, 0, 0, tiny / 8, -tiny / 8, info.max, 0]
    for got, values in ((y, expected), (x.grad, [nan, nan, nan, 0.5, 0.5, 0.5, 0.5, 1, 0])):
        values = torch.tensor(values, device=device, dtype=dtype)
        # a GPU may flush smaller numbers to 0
        torch.testing.assert_close(got, values, rtol=0, atol=tiny, equal_nan=True)
    assert y[3:5].signbit().tolist() == [False, True]


def test_layouts_of_gelu():
    generator = torch.Generator().manual_seed(0)
    base, dbase = (torch.randn(10, 12, generator=generator).to(device) for _ in range(2))
    for view in (
        lambda t: t.t(),
        lambda t: t[:, 1:8],
        lambda t: t[::2, ::3],
        lambda t: t[:1].expand(5, 12),
        lambda t: t.flatten()[1:],
        lambda t: t.view(2, 5, 3, 4),
        lambda t: t[0, 0],
        lambda t: t[:0],
    ):
        x, dy = leaf(base), view(dbase)
        y = gelu(view(x))
        (dx,) = torch.autograd.grad(y, x, dy)
        theirs = leaf(base)
        expected = F.gelu(view(theirs))
        (their_dx,) = torch.autograd.grad(expected, theirs, dy)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # 1 + erf cancels, in float32
        torch.testing.assert_close(dx, their_dx, rtol=1e-6, atol=1e-6)


def test_gelu_of_more_than_a_program():
    """Sizes around a program's block. Nothing is written beyond the last element."""
    for size in (4095, 4096, 4097, 65535, 65537):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
        torch.testing.assert_close(gelu(x), F.gelu(x), rtol=1e-6, atol=1e-6)  # 1 + erf cancels, in float32


def test_double_backward_of_gelu_raises():
    x = leaf(torch.randn(64), device)
    (dx,) = torch.autograd.grad((gelu(x) * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.sum().backward()


def test_gelu_elsewhere_is_pytorchs():
    x = torch.randn(64, device=device, dtype=f64)
    assert torch.equal(gelu(x), F.gelu(x))
    assert gelu(torch.randn(3, device='meta')).shape == (3,)
    compiled = torch.compile(gelu, fullgraph=True, backend='aot_eager')
    x = x.float()
    assert torch.equal(compiled(x), F.gelu(x))
    with FakeTensorMode():
        assert gelu(torch.randn(3, device=device)).shape == (3,)


@pytest.mark.skipif(not gpu, reason='needs 17 GB')
def test_gelu_of_more_than_2_to_the_31_elements():
    x = torch.randn(2**31 + 5000, device=device, dtype=bf16).requires_grad_()
    y = gelu(x)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    tail = leaf(x[-5000:])
    tail_y = gelu(tail)
    assert torch.equal(y[-5000:], tail_y) and torch.equal(
        dx[-5000:], torch.autograd.grad(tail_y, tail, tail_y.detach())[0]
    )
