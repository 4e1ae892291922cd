"""
Tests of the Gluon matmul (kernels/matmul_hopper.py) on a Hopper GPU, the only place where it runs.
test_hopper_compile.py compiles it without one.
"""

import pytest
import torch
from numerics import bf16, bound, device, f32, f64, gpu, leaf
from torch.nn import functional as F

if not gpu or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip('the kernel needs a Hopper GPU', allow_module_level=True)

from kernels import hopper, matmul_hopper
from kernels.device import num_multiprocessors

# one tile; edges in every direction; fewer and more tiles than multiprocessors; an odd number of tiles of a program;
# the last strip narrower than the others
shapes = [(128, 128, 64), (1, 8, 8), (130, 136, 72), (1000, 1088, 768), (4096, 4000, 200), (12288, 1160, 1600)]


def operands(M, N, K):
    generator = torch.Generator(device).manual_seed(M)
    a = torch.randn(M, K, generator=generator, device=device, dtype=bf16)
    b = (torch.randn(N, K, generator=generator, device=device) * K**-0.5).to(bf16)
    return a, b


@pytest.mark.parametrize('programs', [None, 1, 7])
@pytest.mark.parametrize('M, N, K', shapes)
def test_product_against_float64(M, N, K, programs):
    a, b = operands(M, N, K)
    ours = matmul_hopper.matmul(a, b, programs or num_multiprocessors(a.device))
    bound(f'{M} {N} {K}', ours, a.to(f64) @ b.to(f64).t(), a @ b.t())


@pytest.mark.parametrize('M, N, K', shapes)
def test_product_with_rows_and_columns_exchanged(M, N, K):
    a, b = operands(M, N, K)
    b = b.t().contiguous()
    ours = matmul_hopper.matmul(a, b, num_multiprocessors(a.device), b_rows=False)
    bound(f'{M} {N} {K}', ours, a.to(f64) @ b.to(f64), a @ b)


@pytest.mark.parametrize('shape', hopper.FEWEST_ROWS)
def test_where_it_is_faster(shape, monkeypatch):
    """linear() and input_gradient(), with rows in two dimensions, for each shape of the table."""
    calls, matmul = [], matmul_hopper.matmul
    monkeypatch.setattr(matmul_hopper, 'matmul', lambda *args, **more: calls.append(more) or matmul(*args, **more))
    for gradient, rows in enumerate(hopper.FEWEST_ROWS[shape]):
        w = torch.randn(shape, device=device).to(bf16)
        x = torch.randn(2, max(min(rows, 24_576) // 2, 520), shape[1 - gradient], device=device).to(bf16)
        function = hopper.input_gradient if gradient else hopper.linear
        w_t = w if gradient else w.t()
        bound(f'{shape} {gradient}', function(x, w), x.to(f64) @ w_t.to(f64), x @ w_t)
        assert len(calls) == (rows < float('inf')) and function(x[:, :8], w).shape == (x @ w_t)[:, :8].shape
        assert len(calls) == (rows < float('inf'))  # 16 rows are too few
        calls.clear()


@pytest.mark.parametrize('M, N, K', shapes)
def test_exponentials_and_their_sums(M, N, K):
    a, b = operands(M, N, K)
    shifts = torch.randn(M, device=device)
    ours, sums = matmul_hopper.exponentials(a, b, shifts, 100, num_multiprocessors(a.device))
    truth = torch.exp2(a.to(f64) @ b.to(f64).t() * 1.4426950408889634 - shifts.to(f64)[:, None])
    theirs = torch.exp2((a.float() @ b.float().t()) * 1.4426950408889634 - shifts[:, None])
    bound('exponentials', ours, truth, theirs.to(bf16))
    total = sums.sum(0)
    # the exponent, up to about 10, is rounded by 1e-6, and float32 sums of up to 4000 numbers by about 1e-6
    torch.testing.assert_close(total.to(f64), truth.sum(1), rtol=1e-5, atol=0)
    again, sums_again = matmul_hopper.exponentials(a, b, shifts, 100, num_multiprocessors(a.device))
    assert torch.equal(again, ours) and torch.equal(sums_again, sums)


@pytest.mark.parametrize('M, N, K', shapes)
def test_gelu_of_the_product(M, N, K):
    """Over the range in which GELU bends: products of these operands lie mostly between -4 and 4."""
    a, b = operands(M, N, K)
    x, y = matmul_hopper.matmul_gelu(a, b, num_multiprocessors(a.device))
    bound('x', x, a.to(f64) @ b.to(f64).t(), a @ b.t())
    bound('gelu(x)', y, F.gelu(x.to(f64)), F.gelu(x))
    # for negative x, PyTorch's 1 + erf cancels; the formula of gelu.py does not
    error = (y.to(f64) - x.to(f64) * torch.special.erfc(-x.to(f64) / 2**0.5) / 2).abs()
    assert (error <= 1.5e-7 * x.abs() + 2**-8 * y.abs()).all()
    again = matmul_hopper.matmul_gelu(a, b, num_multiprocessors(a.device))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)


@pytest.mark.parametrize('M, N, K', shapes)
def test_gradient_of_gelu(M, N, K):
    a, b = operands(M, N, K)
    b = b.t().contiguous()
    x = 3 * torch.randn(M, N, device=device).to(bf16)
    ours = matmul_hopper.matmul_gelu_gradient(a, b, x, num_multiprocessors(a.device))
    x64, x32 = leaf(x, f64), leaf(x)
    truth = torch.autograd.grad(F.gelu(x64), x64, a.to(f64) @ b.to(f64))[0]
    theirs = torch.autograd.grad(F.gelu(x32), x32, a @ b)[0]
    bound('dx', ours, truth, theirs)
    assert torch.equal(matmul_hopper.matmul_gelu_gradient(a, b, x, num_multiprocessors(a.device)), ours)


def test_large_exponents_are_clamped_and_nan_stays():
    a, b = operands(256, 256, 64)
    a[3, 5], a[7] = float('nan'), 3e4
    ours, sums = matmul_hopper.exponentials(a, b, torch.zeros(256, device=device), 100, 132)
    assert ours[3].isnan().all() and sums[:, 3].isnan().all() and not ours[4:].isnan().any()
    assert ours[7].max() == 2.0**100 and sums.dtype == f32


def test_nothing_is_written_behind_the_edges():
    a, b = operands(130, 136, 72)
    room = torch.full((200, 136), 7.0, device=device, dtype=bf16)
    matmul_hopper.launch(132, a, b, room[:130])
    assert (room[130:] == 7).all() and not (room[:130] == 7).any()
