"""
Tests of the Gluon matmul (kernels/matmul_hopper.py) on a Hopper GPU, the only place where it runs.
test_hopper_compile.py compiles it without one.
"""

import pytest
import torch
from numerics import bf16, bound, device, f32, f64, gpu

if not gpu or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip('the kernel needs a Hopper GPU', allow_module_level=True)

from kernels import matmul_hopper
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
