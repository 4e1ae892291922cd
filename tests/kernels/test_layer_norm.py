"""Tests of LayerNorm's kernels against float64, and of its function with every kind of input."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from numerics import bf16, bound, device, digest, f16, f32, f64, gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import kernels
from kernels import layer_norm

ours = importlib.import_module('kernels.layer_norm')


def tensors(M, N, x_dtype=f32, w_dtype=f32, bias=True, mean=1.0, seed=0):
    """Returns x (M, N), dy, and a weight and a bias for which a kernel that ignores them fails."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(M, N, generator=generator) for _ in range(2))
    weight, b = (torch.randn(N, generator=generator) for _ in range(2))
    leaves = [(x * 2 + mean).to(device, x_dtype), weight.to(device, w_dtype), b.to(device, w_dtype) if bias else None]
    return [None if t is None else t.requires_grad_() for t in leaves], dy.to(device, x_dtype)


def run(function, leaves, dy):
    """Returns y and the gradients of x, weight and bias, from a fresh graph."""
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def truth(leaves, dy):
    """Returns the same in float64, from the rounded inputs."""
    leaves = [None if t is None else t.detach().to(f64).requires_grad_() for t in leaves]
    return run(lambda x, w, b: F.layer_norm(x, w.shape, w, b), leaves, dy.to(f64))


def check(got, expected, torchs, what='', terms=None):
    """Applies bound() to y, dx, dweight and dbias. terms: the summands of dx, which cancel completely at N = 1."""
    for name, a, b, c in zip(('y', 'dx', 'dweight', 'dbias'), got, expected, torchs):
        bound(f'{what} {name}', a, b, c, terms if name == 'dx' else None)


def compare(leaves, dy, what='', got=None):
    x, w, _ = leaves
    terms = dy.to(f64) * w.detach().to(f64) * (x.detach().to(f64).var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    check(got or run(layer_norm, leaves, dy), truth(leaves, dy), run(ours.reference, leaves, dy), what, terms)


mixes = (
    [(f32, f32), (bf16, bf16), (bf16, f32), (f16, f16), (f16, f32)] if gpu else [(f32, f32), (bf16, f32), (f16, f16)]
)
widths = [1, 3, 64, 768, 770, 1024, 1280, 1600, 5120, 8192, 12288, 65536] if gpu else [1, 3, 64, 770]
heights = [1, 7, 131, 4095, 12288] if gpu else [1, 37]


@pytest.mark.parametrize('N', widths)
@pytest.mark.parametrize('mix', mixes, ids=lambda m: '-'.join(str(d)[6:] for d in m))
def test_widths(N, mix):
    leaves, dy = tensors(131 if gpu else 3, N, *mix)
    compare(leaves, dy, f'{N} {mix}')


@pytest.mark.parametrize('M', heights)
@pytest.mark.parametrize('bias', [True, False])
def test_heights_with_and_without_bias(M, bias):
    for N, dtype in ((768, bf16), (1600, f32), (64, f32)) if gpu else ((64, f32),):
        compare(*tensors(M, N, dtype, dtype, bias), f'{M} x {N}')


@pytest.mark.skipif(not gpu, reason='too large for the interpreter')
def test_a_million_rows():
    compare(*tensors(1_000_000, 64, bf16, f32))


@pytest.mark.parametrize('mix', mixes, ids=lambda m: '-'.join(str(d)[6:] for d in m))
@pytest.mark.parametrize('N', [12289, 65536 if gpu else 33000])
def test_rows_wider_than_registers(N, mix):
    """PyTorch computes the gradients of both widths. The forward reads the wider row three times."""
    compare(*tensors(5 if gpu else 2, N, *mix, bias=N == 12289))


@pytest.mark.parametrize('shape', [(768,), (2, 3, 768), (2, 1, 3, 768)])
def test_ranks(shape):
    x, dy = (torch.randn(shape, device=device) for _ in range(2))
    leaves = [
        x.requires_grad_(),
        torch.randn(768, device=device).requires_grad_(),
        torch.randn(768, device=device).requires_grad_(),
    ]
    compare(leaves, dy)


def test_no_rows():
    (x, w, b), dy = tensors(0, 768)
    y, dx, dw, db = run(layer_norm, (x, w, b), dy)
    assert y.shape == dx.shape == (0, 768)
    assert not dw.any() and not db.any()


@pytest.mark.parametrize('mean', [1e3, 1e4])
def test_a_mean_far_from_zero(mean):
    """E[x^2] - mean^2 would have a relative error of 0.07 here."""
    for dtype in (f32, bf16):
        compare(*tensors(37 if gpu else 4, 770, dtype, f32, mean=mean), f'mean {mean}')


def test_constant_rows():
    for dtype in (f32, bf16, f16):
        (x, w, b), dy = tensors(7, 770, dtype, f32)
        constants = torch.tensor([0.0, 3.0, 0.1, -1000.1, 1e-7, 12345.67, 1 / 3], device=device).to(dtype)
        x = constants[:, None].expand_as(x).contiguous().requires_grad_()
        y, dx, _, _ = run(layer_norm, (x, w, b), dy)
        # a row without variance is the bias, which the interpreter truncates to bfloat16 instead of rounding
        torch.testing.assert_close(
            y, b.detach().to(dtype).expand_as(y), rtol=0.0 if gpu or dtype != bf16 else 8e-3, atol=0.0
        )
        assert dx.isfinite().all()


def test_nan_stays_in_its_row():
    (x, w, b), dy = tensors(9, 768 if gpu else 96)
    clean = run(layer_norm, (x, w, b), dy)
    with torch.no_grad():
        x[4, 70] = float('nan')
    dirty = run(layer_norm, (x, w, b), dy)
    others = [i for i in range(9) if i != 4]
    for a, c in zip(dirty[:2], clean[:2]):
        assert a[4].isnan().all() and torch.equal(a[others], c[others])
    assert dirty[2].isnan().all(), 'dweight sums over the NaN'
    assert torch.equal(dirty[3], clean[3]), 'dbias does not see x'


def strided(name, M, N):
    """Returns x (M, N) with its own values in an unusual layout."""
    base = torch.randn(2 * M + 1, 2 * N + 3, device=device)
    return {
        'columns of wider rows': base[:M, :N],
        'columns that are not aligned': base[:M, 1 : N + 1],
        'every other row': base[: 2 * M : 2, :N],
        'every other column': base[:M, : 2 * N : 2],
        'transposed': torch.randn(N, M, device=device).t(),
        'one row, expanded': base[:1, :N].expand(M, N),
        'one column, expanded': base[:M, :1].expand(M, N),
        'an odd start in memory': base.flatten()[1 : 1 + M * N].view(M, N),
        'leading dimensions swapped': base[:M, :N].reshape(1, M, N).transpose(0, 1),
    }[name]


@pytest.mark.parametrize(
    'name',
    list(
        {
            **dict.fromkeys(
                [
                    'columns of wider rows',
                    'columns that are not aligned',
                    'every other row',
                    'every other column',
                    'transposed',
                    'one row, expanded',
                    'one column, expanded',
                    'an odd start in memory',
                    'leading dimensions swapped',
                ]
            )
        }
    ),
)
def test_strides_of_x_and_dy(name):
    torch.manual_seed(0)
    M, N = (131, 768) if gpu else (5, 96)
    (_, w, b), _ = tensors(1, N)
    x, dy = strided(name, M, N), strided(name, M, N)
    y, dx = layer_norm(x.requires_grad_(), w, b), None
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    leaves = [x.detach().contiguous().requires_grad_(), w, b]
    compare(leaves, dy, name, (y.detach(), dx, dw, db))


def test_eps():
    (x, w, b), dy = tensors(5, 96)
    expected = run(lambda *leaves: F.layer_norm(leaves[0], w.shape, *leaves[1:], 0.5), (x, w, b), dy)
    got = run(lambda *leaves: layer_norm(*leaves, 0.5), (x, w, b), dy)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_parameters_with_strides():
    """Every second element, one element for all, and a column."""
    (x, _, _), dy = tensors(5, 96)
    base = torch.randn(192, 3, generator=torch.Generator().manual_seed(1)).to(device)
    views = [base[::2, 0], base[:1, 1].expand(96), base[:96, 2]]
    for w in views:
        for b in views:
            leaves = [x, *(t.detach().requires_grad_() for t in (w, b))]
            assert leaves[1].stride() == w.stride() != (1,)
            theirs = run(lambda x, w, b: F.layer_norm(x, w.shape, w, b), leaves, dy)
            # float32 sums in another order differ
            torch.testing.assert_close(run(layer_norm, leaves, dy), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('N', [768 if gpu else 96, 12289])
def test_frozen_parameters(N):
    (x, w, b), dy = tensors(7 if N < 12289 else 2, N)
    full = dict(zip('xwb', run(layer_norm, (x, w, b), dy)[1:]))
    for wanted in ('x', 'w', 'b', 'xw', 'xb', 'wb'):
        leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in zip('xwb', (x, w, b))}
        grads = torch.autograd.grad(layer_norm(*leaves.values()), [leaves[k] for k in wanted], dy)
        for k, grad in zip(wanted, grads):
            assert torch.equal(grad, full[k]), f'gradient of {k} when only {wanted} train'
    assert not layer_norm(x.detach(), w.detach(), b.detach()).requires_grad


def test_double_backward_raises():
    (x, w, b), dy = tensors(4, 64)
    (dx,) = torch.autograd.grad(layer_norm(x, w, b), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.sum().backward()


def test_the_same_bits_every_time():
    """100 runs here and one in another process (3 runs in the serial interpreter)."""
    M, N = (4095, 770) if gpu else (37, 96)
    first = digest_of_a_run(M, N)
    assert all(digest_of_a_run(M, N) == first for _ in range(100 if gpu else 3))
    if not gpu:
        return
    program = f'import test_layer_norm as tests; print(tests.digest_of_a_run({M}, {N}))'
    env = os.environ | {'PYTHONPATH': os.path.dirname(os.path.dirname(kernels.__file__))}
    command = [sys.executable, '-c', program]
    other = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__), env=env)
    assert other.stdout.strip() == first, other.stderr


def digest_of_a_run(M, N):
    return digest(run(layer_norm, *tensors(M, N)))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('out_dtype', [None, bf16])
def test_compiles_without_a_graph_break(bias, out_dtype):
    leaves, dy = tensors(8, 96, bias=bias)
    function = lambda x, w, b: layer_norm(x * 2, w, b, out_dtype=out_dtype) + 1
    compiled = torch.compile(function, fullgraph=True, backend='inductor' if gpu else 'aot_eager')
    # PyTorch sums in another order, and may round to the other neighbour among bfloat16's 8 bits
    tolerance = 1e-5 if out_dtype is None else 8e-3
    for a, b in zip(run(compiled, leaves, dy), run(function, leaves, dy), strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= tolerance * b.norm()


def test_fake_tensors_get_a_shape():
    with FakeTensorMode():
        y = layer_norm(torch.randn(3, 8, device=device), torch.randn(8, device=device), out_dtype=bf16)
    assert y.shape == (3, 8) and y.dtype == bf16


def test_output_dtypes():
    (x, w, b), dy = tensors(5, 96)
    full = layer_norm(x, w, b)
    half = layer_norm(x, w, b, out_dtype=bf16)
    assert half.dtype == bf16
    # one rounding (interpreter: truncation) to 8 bits
    torch.testing.assert_close(half.float(), full, rtol=8e-3, atol=0)
    dx, dw, _ = torch.autograd.grad(half, (x, w, b), dy.to(bf16))
    assert dx.dtype == dw.dtype == f32
    with torch.autocast(device, dtype=bf16):
        for t in (x, x.detach().to(bf16)):
            assert (
                layer_norm(t, w, b).dtype
                == ours.reference_dtype(t)
                == F.layer_norm(t, w.shape, w.to(t.dtype), b.to(t.dtype)).dtype
            )


def test_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    leaves, dy = tensors(8, 96)
    plain = run(layer_norm, leaves, dy)
    for use_reentrant in (False, True):
        y = checkpoint(layer_norm, *leaves, use_reentrant=use_reentrant)
        y.backward(dy)  # the reentrant one does not work with autograd.grad
        for a, b in zip([y, *(t.grad for t in leaves)], plain, strict=True):
            assert torch.equal(a, b)
        for t in leaves:
            t.grad = None


def test_what_the_kernels_do_not_take_falls_back():
    x = torch.randn(2, 65537, device=device)
    w = torch.randn(65537, device=device)
    assert torch.equal(layer_norm(x, w), F.layer_norm(x, w.shape, w))
    x, w = torch.randn(2, 8, device=device, dtype=f64), torch.randn(8, device=device, dtype=f64)
    assert torch.equal(layer_norm(x, w), F.layer_norm(x, w.shape, w))
    assert layer_norm(torch.randn(2, 8, device='meta'), torch.randn(8, device='meta')).shape == (2, 8)


def test_mistakes_are_named():
    x, w = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    with pytest.raises(ValueError, match=r'weight has shape \(4,\), but the last dimension of x is \(8,\)'):
        layer_norm(x, w[:4])
    with pytest.raises(ValueError, match='bias is on meta'):
        layer_norm(x, w, w.to('meta'))
    with pytest.raises(TypeError, match='narrower'):
        layer_norm(x, w.to(bf16))


@pytest.mark.skipif(not gpu, reason='needs 20 GB')
def test_more_than_2_to_the_31_elements():
    M, N = 2**31 // 768 + 1000, 768
    x = torch.randn(M, N, device=device, dtype=bf16)
    w, b = (torch.randn(N, device=device, dtype=bf16) for _ in range(2))
    y, stats, _ = ours.launch_forward(x, None, w, b, 1e-5, bf16)
    tail, tail_stats, _ = ours.launch_forward(x[-500:], None, w, b, 1e-5, bf16)
    assert torch.equal(y[-500:], tail) and torch.equal(stats[:, -500:], tail_stats)
    dx, dw, db, _ = ours.launch_backward(x, x, w, bf16, stats, True, True, True)
    assert torch.equal(dx[-500:], ours.launch_backward(x[-500:], x[-500:], w, bf16, tail_stats, True, True, True)[0])
    torch.testing.assert_close(db.float(), x.sum(0, dtype=f32), rtol=1e-2, atol=1.0)  # bfloat16 has 8 bits


def test_kernels_run_here():
    assert kernels.available(device) and kernels.unavailable_reason(device) is None
