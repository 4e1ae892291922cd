"""Tests of residual addition and LayerNorm in one kernel, against float64."""

import importlib

import pytest
import torch
from numerics import bf16, bound, device, digest, f16, f32, f64, gpu, leaf, same
from torch.nn import functional as F

from kernels.add_layer_norm import add_layer_norm

norm = importlib.import_module('kernels.layer_norm')


def residuals(M, N, x_dtype=f32, branch_dtype=None, w_dtype=f32, bias=True, seed=0):
    """Returns x and branch (M, N), weight and bias (N,), and the gradients of the two results."""
    generator = torch.Generator().manual_seed(seed)
    x, branch, dtotal, dy = (torch.randn(M, N, generator=generator) for _ in range(4))
    w, b = (torch.randn(N, generator=generator) for _ in range(2))
    leaves = [
        leaf(x * 2 + 1, device, x_dtype),
        leaf(branch, device, branch_dtype or x_dtype),
        leaf(w, device, w_dtype),
        leaf(b, device, w_dtype) if bias else None,
    ]
    return leaves, [dtotal.to(device, x_dtype), dy.to(device)]


def separately(x, branch, w, b, out_dtype=None):
    total = x + branch
    return total, norm.reference(total, w, b, 1e-5, out_dtype or norm.reference_dtype(x))


def run(function, leaves, grads, **options):
    """Returns the results of function, and the gradients of the leaves."""
    results = function(*leaves, **options)
    grads = [grad.to(y.dtype) for y, grad in zip(results, grads)]
    return [y.detach() for y in results], list(
        torch.autograd.grad(results, [t for t in leaves if t is not None], grads)
    )


def compare(leaves, grads, what='', got=None, out_dtype=None):
    x, branch, w, _ = leaves
    grads = [grads[0], grads[1].to(out_dtype or x.dtype)]
    ours, our_grads = got or run(add_layer_norm, leaves, grads, out_dtype=out_dtype)
    theirs, their_grads = run(separately, leaves, grads, out_dtype=out_dtype)
    exact = [leaf(t, f64) for t in leaves]
    truths, true_grads = run(
        lambda x, branch, w, b: (x + branch, F.layer_norm(x + branch, w.shape, w, b)), exact, [t.to(f64) for t in grads]
    )
    # the terms that add up, and may cancel, in the gradient of x
    rstd = (truths[0].var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    terms = grads[0].to(f64).abs() + (grads[1].to(f64) * exact[2] * rstd).detach().abs()
    assert ours[0].is_contiguous() and ours[1].is_contiguous()
    for name, *three in zip(('sum', 'y'), ours, truths, theirs):
        bound(f'{what} {name}', *three)
    for name, *three in zip(('dx', 'dbranch', 'dweight', 'dbias'), our_grads, true_grads, their_grads):
        bound(f'{what} {name}', *three, terms if name in ('dx', 'dbranch') else None)


# dtypes of x, branch, weight, result: as in the model in float32, under autocast, with half_residual; and the rest
residual_mixes = [
    (f32, f32, f32, f32),
    (f32, bf16, f32, bf16),
    (bf16, bf16, f32, bf16),
    (f32, f16, f32, f16),
    (f16, f16, f32, f16),
    (bf16, bf16, bf16, f32),
    (f32, bf16, f32, f32),
    (f16, f16, f16, f16),
]
residual_widths = [1, 3, 64, 768, 770, 1024, 1280, 1600, 4096, 12288] if gpu else [1, 3, 64, 768, 770, 1600, 12288]


@pytest.mark.parametrize('N', residual_widths)
def test_sums_and_norms_of_every_width(N):
    for mix in residual_mixes if gpu or N <= 770 else residual_mixes[:3]:
        leaves, grads = residuals(131 if gpu else 3, N, *mix[:3])
        compare(leaves, grads, f'{N} {mix}', out_dtype=mix[3])


@pytest.mark.parametrize('bias', [True, False])
def test_sums_and_norms_of_every_height(bias):
    for M in (1, 7, 131, 4095, 12288) if gpu else (1, 7, 131):
        for mix in residual_mixes[:2]:
            leaves, grads = residuals(M, 768 if gpu else 64, *mix[:3], bias=bias)
            compare(leaves, grads, f'{M} {mix}', out_dtype=mix[3])


def test_sums_and_norms_of_no_rows():
    leaves, grads = residuals(0, 64)
    (total, y), (dx, dbranch, dw, db) = run(add_layer_norm, leaves, grads)
    assert total.shape == y.shape == dx.shape == dbranch.shape == (0, 64) and not dw.any() and not db.any()


@pytest.mark.parametrize(
    'layout', ['transposed', 'sliced', 'expanded rows', 'expanded columns', 'unaligned', 'every other row']
)
def test_strides_of_x_branch_and_gradients(layout):
    M, N = (131, 768) if gpu else (5, 96)
    generator = torch.Generator().manual_seed(0)

    def unusual():
        base = torch.randn(2 * M + 1, 2 * N + 3, generator=generator).to(device)
        return {
            'transposed': base[:N, :M].t() if N <= 2 * M else base.flatten()[: M * N].view(N, M).t(),
            'sliced': base[:M, 5 : N + 5],
            'expanded rows': base[:1, :N].expand(M, N),
            'expanded columns': base[:M, :1].expand(M, N),
            'unaligned': base.flatten()[1 : 1 + M * N].view(M, N),
            'every other row': base[: 2 * M : 2, : 2 * N : 2],
        }[layout]

    (_, _, w, b), _ = residuals(1, N)
    x, branch, dtotal, dy = (unusual() for _ in range(4))
    got = run(add_layer_norm, [x.requires_grad_(), branch.requires_grad_(), w, b], [dtotal, dy])
    # rows of 'expanded columns' are constant: their y is rounding error only, which bound() compares with PyTorch's
    compare([leaf(x.contiguous()), leaf(branch.contiguous()), w, b], [dtotal, dy], layout, got)


@pytest.mark.parametrize('mix', residual_mixes[:3], ids=['float32', 'autocast', 'half'])
def test_only_one_of_the_two_results_is_used(mix):
    """The gradients equal those with a zero gradient for the unused result."""
    leaves, (dtotal, dy) = residuals(7, 96, *mix[:3])
    dy = dy.to(mix[3])
    for used, zero in ((0, 1), (1, 0)):
        result = add_layer_norm(*leaves, out_dtype=mix[3])[used]
        wanted = leaves[:2] if used == 0 else leaves
        got = torch.autograd.grad(result, leaves, (dtotal, dy)[used], allow_unused=True)
        both = [dtotal, dy]
        both[zero] = torch.zeros_like(both[zero])
        expected = torch.autograd.grad(add_layer_norm(*leaves, out_dtype=mix[3]), leaves, both)
        for a, b, t in zip(got, expected, leaves):
            assert a.dtype == t.dtype if a is not None else used == 0 and not b.any()
        for a, b in zip(got[: len(wanted)], expected):
            assert same(a, b)


def test_gradients_of_x_and_branch_are_two_tensors():
    """They are equal, but changing one in place, as clipping does, must not change the other."""
    leaves, grads = residuals(4, 64)
    torch.autograd.backward(add_layer_norm(*leaves), grads)
    before = leaves[1].grad.clone()
    leaves[0].grad.zero_()
    assert torch.equal(leaves[1].grad, before) and before.any()


def test_frozen_parts_of_sum_and_norm():
    leaves, grads = residuals(7, 96, f32, bf16)
    full = run(add_layer_norm, leaves, grads)[1]
    for wanted in ('x', 'r', 'w', 'b', 'xr', 'wb', 'xw', 'rb'):
        some = [t.detach().requires_grad_(k in wanted) for k, t in zip('xrwb', leaves)]
        got = torch.autograd.grad(add_layer_norm(*some), [t for t in some if t.requires_grad], grads)
        for a, b in zip(got, [g for k, g in zip('xrwb', full) if k in wanted]):
            assert a.dtype == b.dtype and torch.equal(a, b), f'when only {wanted} train'
    assert not add_layer_norm(*[t.detach() for t in leaves])[1].requires_grad


def test_nan_in_a_branch_stays_in_its_row():
    leaves, grads = residuals(9, 96)
    clean = run(add_layer_norm, leaves, grads)
    with torch.no_grad():
        leaves[1][4, 70] = float('nan')
    (total, y), (dx, dbranch, dw, db) = run(add_layer_norm, leaves, grads)
    others = [i for i in range(9) if i != 4]
    for a, b in ((total, clean[0][0]), (y, clean[0][1]), (dx, clean[1][0]), (dbranch, clean[1][1])):
        assert torch.equal(a[others], b[others])
    assert (
        total[4].isnan().sum() == 1
        and y[4].isnan().all()
        and dx[4].isnan().all()
        and dw.isnan().all()
        and torch.equal(db, clean[1][3])
    )


def test_constant_sums():
    """A row of equal elements has no variance, so y is the bias, even where float32 sums of the row are rounded."""
    for mix in residual_mixes[:5]:
        (x, branch, w, b), grads = residuals(7, 770, *mix[:3])
        constants = torch.tensor([0.0, 3.0, 0.1, -1000.1, 1e-7, 12345.67, 1 / 3], device=device)[:, None]
        x, branch = (leaf(constants.expand(7, 770).contiguous() * k, t.dtype) for k, t in ((0.7, x), (0.3, branch)))
        (total, y), (dx, *_) = run(add_layer_norm, [x, branch, w, b], grads, out_dtype=f32)
        assert torch.equal(total, total[:, :1].expand_as(total)) and dx.isfinite().all()
        assert torch.equal(y, b.detach().expand_as(y)), mix


def test_double_backward_of_sum_and_norm_raises():
    leaves, grads = residuals(4, 64)
    grads = [g.requires_grad_() for g in grads]
    (dx,) = torch.autograd.grad(add_layer_norm(*leaves), leaves[0], grads, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.sum().backward()


def test_sum_and_norm_with_another_eps_and_strided_parameters():
    (x, branch, _, _), grads = residuals(5, 96)
    base = torch.randn(192, 2, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = [x, branch, base[::2, 0].detach().requires_grad_(), base[:96, 1].detach().requires_grad_()]
    theirs = run(lambda x, branch, w, b: (x + branch, F.layer_norm(x + branch, w.shape, w, b, 0.5)), leaves, grads)
    # float32 sums in another order differ
    torch.testing.assert_close(run(add_layer_norm, leaves, grads, eps=0.5), theirs, rtol=1e-5, atol=1e-5)


def test_sum_and_norm_have_the_same_bits_every_time():
    leaves, grads = residuals(*((4095, 770) if gpu else (37, 96)), f32, bf16)

    def once():
        results, gradients = run(add_layer_norm, leaves, grads, out_dtype=bf16)
        return digest(results + gradients)

    assert len({once() for _ in range(50 if gpu else 3)}) == 1


@pytest.mark.parametrize('mix', residual_mixes[:3], ids=['float32', 'autocast', 'half'])
def test_sum_and_norm_compile_without_a_graph_break(mix):
    torch.compiler.reset()
    leaves, grads = residuals(8, 96, *mix[:3])
    for used in (slice(0, 2), slice(0, 1), slice(1, 2)):
        function = lambda *a: add_layer_norm(*a, out_dtype=mix[3])[used]
        compiled = torch.compile(function, fullgraph=True, backend='inductor' if gpu else 'aot_eager')
        results = [f(*leaves) for f in (compiled, function)]
        wanted = leaves[: 2 if used.stop == 1 else 4]
        for a, b in zip(
            *([*r, *torch.autograd.grad(r, wanted, [g.to(y.dtype) for g, y in zip(grads[used], r)])] for r in results)
        ):
            # PyTorch sums in another order, and may round to the other neighbour among bfloat16's 8 bits
            assert a.dtype == b.dtype and (a - b).norm() <= (1e-5 if mix[3] == f32 else 8e-3) * b.norm(), used


def test_wider_rows_and_branches_take_two_operations():
    for M, N, x_dtype, branch_dtype in (
        (2, 12289, f32, bf16),
        (2, 64, bf16, f32),
        (2, 64, f16, bf16),
        (2, 64, f64, f64),
        (2, 64, f32, f64),
    ):
        x, branch, w = (
            torch.randn(M, N, device=device, dtype=d)
            for d in (x_dtype, branch_dtype, f64 if f64 in (x_dtype, branch_dtype) else f32)
        )
        w = w[0]
        total, y = add_layer_norm(x, branch, w, out_dtype=f32)
        assert torch.equal(total, x + branch) and total.dtype == (x + branch).dtype
        assert torch.equal(y, norm.layer_norm(x + branch, w, out_dtype=f32))


def test_mistakes_in_sums_and_norms_are_named():
    x, w = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    with pytest.raises(ValueError, match=r'branch has shape \(8,\), x \(2, 8\)'):
        add_layer_norm(x, x[0], w)
    with pytest.raises(ValueError, match=r'weight has shape \(4,\), but the last dimension of x is \(8,\)'):
        add_layer_norm(x, x, w[:4])
    with pytest.raises(ValueError, match=r'bias has shape \(4,\)'):
        add_layer_norm(x, x, w, w[:4])
    with pytest.raises(ValueError, match='bias is on meta'):
        add_layer_norm(x, x, w, w.to('meta'))
    with pytest.raises(ValueError, match='branch is on meta'):
        add_layer_norm(x, x.to('meta'), w)
    with pytest.raises(TypeError, match='narrower'):
        add_layer_norm(x, x, w.to(bf16))


@pytest.mark.parametrize('mix', [(f32, f32), (bf16, bf16), (f32, bf16)])
@pytest.mark.parametrize('used', ['both', 'sum', 'y'])
def test_without_a_branch(mix, used):
    """
    The first block has no branch: the results are x and its norm. If both are used, the kernel adds their gradients.
    """
    x_dtype, out_dtype = mix
    (x, _, w, b), grads = residuals(5, 70, x_dtype)
    results = []
    for to, y_dtype in ((x_dtype, out_dtype), (f64, f64), (x_dtype, out_dtype)):
        leaves = [leaf(t, to if t is x else torch.promote_types(to, f32)) for t in (x, w, b)]
        ours = not results
        total, y = (
            add_layer_norm(leaves[0], None, *leaves[1:], out_dtype=y_dtype)
            if ours
            else (leaves[0], norm.reference(*leaves, 1e-5, y_dtype))
        )
        wanted = [
            (t, grad.to(t.dtype)) for t, grad, name in zip((total, y), grads, ('sum', 'y')) if used in ('both', name)
        ]
        outputs, output_grads = zip(*wanted)
        got = torch.autograd.grad(outputs, leaves, output_grads, allow_unused=True)
        results.append([total.detach(), y.detach(), *got])
    for name, *three in zip(('sum', 'y', 'dx', 'dweight', 'dbias'), *results):
        if three[1] is None:
            assert three[0] is None
        else:
            terms = None if name != 'dx' else sum(grad.to(f64).abs() for grad in grads)
            bound(name, *three, terms=terms)
