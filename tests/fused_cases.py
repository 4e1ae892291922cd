"""
Phase 2's other kernels against float64, in the manner of layer_norm_cases.py: ours may be at most twice as far from the truth as
PyTorch's own operations in the same dtypes. test_fused.py runs these on the GPU where there is one, and elsewhere in a process with
TRITON_INTERPRET=1, at smaller sizes.
"""

import hashlib
import importlib

import pytest
import torch
from layer_norm_cases import bf16, bound, device, f16, f32, f64, gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kernels.add_layer_norm import add_layer_norm, add_layer_norm_backward_op, add_layer_norm_op
from kernels.cross_entropy import cross_entropy, launch_cross_entropy, linear_cross_entropy
from kernels.gelu import gelu
from kernels.launch import Config

norm = importlib.import_module('kernels.layer_norm')
dtypes = [f32, bf16, f16]
many = 131 if gpu else 33  # rows; the interpreter takes 10 ms for one of the loss


def leaf(t, *to):
    return None if t is None else t.detach().to(*to).requires_grad_()


def digest(tensors):
    return hashlib.sha256(b''.join(t.detach().cpu().float().numpy().tobytes() for t in tensors)).hexdigest()


def same(a, b):
    """Equal bits; in the interpreter, which truncates to bfloat16 what PyTorch's casts round, up to the last of its 8 bits."""
    return torch.equal(a, b) or (not gpu and a.dtype == b.dtype == bf16 and torch.allclose(a, b, rtol=8e-3, atol=1e-6))


# residual addition and LayerNorm


def residuals(M, N, x_dtype=f32, branch_dtype=None, w_dtype=f32, bias=True, seed=0):
    """x and branch (M, N), weight and bias (N,), and the gradients of the two results."""
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
    """The results of function, and the gradients of the leaves."""
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
    # what adds up, and may cancel, in the gradient of x
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
    # the truth of a constant row is its rounding, and both round alike only where the same is summed: y is tested by bound(), on the rest
    compare([leaf(x.contiguous()), leaf(branch.contiguous()), w, b], [dtotal, dy], layout, got)


@pytest.mark.parametrize('mix', residual_mixes[:3], ids=['float32', 'autocast', 'half'])
def test_only_one_of_the_two_results_is_used(mix):
    """Its gradient is then all there is, and equals that of the other one being zero."""
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
    """They are equal, but who changes one in place, as clipping does, must not change the other."""
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
    """Rows of equal elements have no variance: y is the bias, also where float32 sums of them are rounded."""
    for mix in residual_mixes[:5]:
        (x, branch, w, b), grads = residuals(7, 770, *mix[:3])
        constants = torch.tensor([0.0, 3.0, 0.1, -1000.1, 1e-7, 12345.67, 1 / 3], device=device)[:, None]
        x, branch = (leaf(constants.expand(7, 770).contiguous() * k, t.dtype) for k, t in ((0.7, x), (0.3, branch)))
        (total, y), (dx, *_) = run(add_layer_norm, [x, branch, w, b], grads, out_dtype=f32)
        assert torch.equal(total, total[:, :1].expand_as(total)) and dx.isfinite().all()
        assert torch.equal(y, b.detach().expand_as(y)), mix


def test_double_backward_of_sum_and_norm_raises():
    leaves, grads = residuals(4, 64)
    for function in (add_layer_norm, lambda *a: add_layer_norm_op(*a, 1e-5, f32)[:2]):
        (dx,) = torch.autograd.grad(
            function(*leaves), leaves[0], [g.requires_grad_() for g in grads], create_graph=True
        )
        with pytest.raises(RuntimeError, match='once_differentiable|no autograd formula'):
            dx.sum().backward()


def test_sum_and_norm_with_another_eps_and_strided_parameters():
    (x, branch, _, _), grads = residuals(5, 96)
    base = torch.randn(192, 2, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = [x, branch, base[::2, 0].detach().requires_grad_(), base[:96, 1].detach().requires_grad_()]
    theirs = run(lambda x, branch, w, b: (x + branch, F.layer_norm(x + branch, w.shape, w, b, 0.5)), leaves, grads)
    torch.testing.assert_close(
        run(add_layer_norm, leaves, grads, eps=0.5), theirs, rtol=1e-5, atol=1e-5
    )  # float32 sums in another order


def test_sum_and_norm_have_the_same_bits_every_time():
    leaves, grads = residuals(*((4095, 770) if gpu else (37, 96)), f32, bf16)

    def once():
        results, gradients = run(add_layer_norm, leaves, grads, out_dtype=bf16)
        return digest(results + gradients)

    assert len({once() for _ in range(50 if gpu else 3)}) == 1


@pytest.mark.parametrize('bias', [True, False])
def test_opcheck_of_sum_and_norm(bias):
    leaves, _ = residuals(6, 64, f32, bf16, bias=bias)
    torch.library.opcheck(add_layer_norm_op, (*leaves, 1e-5, bf16))
    total, y, stats = (t.detach() for t in add_layer_norm_op(*leaves, 1e-5, bf16))
    for branch_dtype in (f32, bf16):
        torch.library.opcheck(
            add_layer_norm_backward_op, (total, y, total, leaves[2].detach(), stats, bias, branch_dtype)
        )


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
            assert same(a, b), used


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


# the last matmul and the cross-entropy


def plain_cross_entropy(logits, targets, ignore_index=-1):
    """PyTorch's, in float32 as autocast on CUDA has it (autocast on a CPU would round log-softmax to 16 bits)."""
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)


def softmax_less_onehot(logits, targets, ignore_index=-1):
    """Loss and gradient of each row (M, V), in float64."""
    logits = logits.to(f64)
    ignored = targets == ignore_index
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction='none')
    onehot = F.one_hot(targets.clamp(min=0), logits.size(-1)).to(f64)
    return losses, (logits.softmax(-1) - onehot).masked_fill(ignored[:, None], 0)


vocabularies = [1, 2, 3, 65, 1000, 50257, 50304]
chunkings = [
    None,
    Config(32, 4, 1, programs=2),
    Config(128, 8, 4, programs=1),
]  # None: as the model; the others make loops, and a masked rest, at any V


@pytest.mark.parametrize('dtype', dtypes)
@pytest.mark.parametrize('size', [1, 30, 1e4])
def test_kernel_of_the_cross_entropy(dtype, size):
    """Loss and gradient of each row from the logits as they are, small and huge, against float64."""
    for V in vocabularies if gpu or size == 30 else (1, 65, 1000):
        for config in chunkings if V <= 1000 or gpu else chunkings[:1]:
            generator = torch.Generator().manual_seed(V)
            M = 131 if gpu else 4
            logits = (torch.randn(M, V, generator=generator).clamp(-4, 4) * size).to(device, dtype)
            targets = torch.randint(V, (M,), generator=generator).to(device)
            targets[:2] = logits[:2].argmax(-1)  # the likeliest: small losses
            targets[2] = -1
            truth, d = softmax_less_onehot(logits, targets)
            onehot = F.one_hot(targets.clamp(min=0), V)
            theirs = leaf(logits)
            their_losses = F.cross_entropy(theirs.float(), targets, ignore_index=-1, reduction='none')
            their_losses.sum().backward()
            ours = logits.clone()
            losses = launch_cross_entropy(ours, targets, -1, True, config)
            what = f'V {V} {config}'
            assert losses[2] == 0 and not ours[2].any()
            # a loss is the difference of two numbers as large as the spread of the logits
            spread = (logits.to(f64).amax(-1) - logits.to(f64).amin(-1)).clamp(min=1)
            bound(f'{what} losses', losses, truth, their_losses.detach(), spread)
            bound(f'{what} small losses', losses[:2], truth[:2], their_losses[:2].detach(), truth[:2].clamp(min=1))
            bound(f'{what} gradients', ours, d, theirs.grad, onehot.to(f64))
            again = logits.clone()
            # another compilation, which may round otherwise: the bound is the same
            bound(
                f'{what} losses alone',
                launch_cross_entropy(again, targets, -1, False, config),
                truth,
                their_losses.detach(),
                spread,
            )
            assert torch.equal(again, logits)


@pytest.mark.parametrize('config', chunkings)
def test_logits_of_minus_infinity(config):
    """Single ones, whole chunks at the start and end of a row; only a row that has no other is NaN, as in PyTorch."""
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)).to(device)
    logits[0, ::3] = logits[1, :900] = logits[2, 100:] = logits[4, 7] = -float('inf')
    logits[5] = -float('inf')
    targets = torch.tensor([1, 950, 5, 3, 7, 0], device=device)
    truth, d = softmax_less_onehot(logits, targets)
    losses = launch_cross_entropy(logits, targets, -1, True, config)
    assert losses[4] == truth[4] == float('inf')
    torch.testing.assert_close(losses[:4].to(f64), truth[:4], rtol=1e-6, atol=0)  # float32 has 24 bits
    torch.testing.assert_close(logits[:5].to(f64), d[:5], rtol=0, atol=1e-6)
    assert losses[5].isnan() and truth[5].isnan() and logits[5].isnan().all()


@pytest.mark.parametrize('config', chunkings)
def test_nan_and_infinite_logits_stay_in_their_row(config):
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.tensor([1, 2, 3, 4, 5], device=device)
    clean = logits.clone()
    clean_losses = launch_cross_entropy(clean, targets, -1, True, config)
    logits[1, 700], logits[3, 999] = float('nan'), float('inf')
    losses = launch_cross_entropy(logits, targets, -1, True, config)
    for row in range(5):
        if row in (1, 3):
            assert losses[row].isnan() and logits[row].isnan().all()
        else:
            assert losses[row] == clean_losses[row] and torch.equal(logits[row], clean[row])


@pytest.mark.parametrize('config', chunkings)
@pytest.mark.parametrize('V', [1, 65, 1000])
def test_foreign_memory_stays_as_it_is(V, config):
    """Around the logits, whatever the targets say; one outside the vocabulary makes its loss NaN."""
    room = 300_000
    memory = torch.full((2 * room + 4 * V,), 7.0, device=device)
    logits = memory[room : room + 4 * V].view(4, V)
    logits.normal_(generator=torch.Generator(device).manual_seed(0))
    targets = torch.tensor([V, -2, 2**17, -(2**17)], device=device)
    losses = launch_cross_entropy(logits, targets, -1, True, config)
    assert losses.isnan().all()
    assert (memory[:room] == 7).all() and (memory[room + 4 * V :] == 7).all()
    torch.testing.assert_close(
        logits.sum(-1), torch.ones(4, device=device)
    )  # softmax, of which no element was a target


def heads(M, V, C=64, dtype=f32, size=1.0, seed=0):
    """x (M, C), weight (V, C) float32, targets (M,), of which some are ignored; weight has the precision of dtype already."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, C, generator=generator).to(device, dtype)
    w = (torch.randn(V, C, generator=generator) * size / C**0.5).to(device, dtype).float()
    targets = torch.randint(V, (M,), generator=generator)
    targets[1::5] = -1
    return leaf(x), leaf(w), targets.to(device)


def compare_heads(x, w, targets, what='', dloss=1.0, **options):
    """Loss and gradients under autocast to the dtype of x (none for float32), of loss * dloss, then divided by it again."""
    dtype = x.dtype
    with torch.autocast(device, dtype=dtype, enabled=dtype != f32):
        loss = linear_cross_entropy(x, w, targets, **options)
        theirs = plain_cross_entropy(F.linear(x, w), targets)
    x64, w64 = leaf(x, f64), leaf(w, f64)
    truth = F.cross_entropy(x64 @ w64.t(), targets, ignore_index=-1)
    grads, their_grads, true_grads = (
        torch.autograd.grad(a, leaves, torch.tensor(dloss, device=device, dtype=a.dtype))
        for a, leaves in ((loss, (x, w)), (theirs, (x, w)), (truth, (x64, w64)))
    )
    bound(f'{what} loss', loss.detach(), truth.detach(), theirs.detach())
    # what is subtracted: the target's row of the weight, and each x at its target's row
    taken = (targets >= 0)[:, None] / (targets >= 0).sum() * dloss
    dx_terms = w64.detach()[targets.clamp(min=0)] * taken
    dw_terms = torch.zeros_like(w64).index_add_(0, targets.clamp(min=0), x64.detach().abs() * taken)
    # dx is rounded three times, as gradient of the logits, product, and scaled product, PyTorch's twice
    for name, factor, terms, *three in zip(
        ('dx', 'dweight'), (3, 2), (dx_terms, dw_terms), grads, true_grads, their_grads
    ):
        bound(f'{what} {name}', *three, terms, rounded_to=dtype, factor=factor)


@pytest.mark.parametrize('dtype', dtypes)
@pytest.mark.parametrize('V', vocabularies)
def test_linear_cross_entropy_of_every_vocabulary(V, dtype):
    for M in (1, 7, many) if gpu or V in (65, 1000) else (7,):
        # of larger logits the rounding, by which both err, is seen in the mean of many rows only
        for size in (1.0, 20.0) if M == many else (1.0,):
            compare_heads(*heads(M, V, 768 if gpu else 32, dtype, size), f'{M} x {V}, size {size}')


@pytest.mark.parametrize('dtype', dtypes)
@pytest.mark.parametrize('chunk_rows', [1, 5, many, 1000])
def test_rows_of_the_loss_in_chunks(chunk_rows, dtype):
    compare_heads(*heads(many, 1000, 64, dtype), f'chunks of {chunk_rows}', chunk_rows=chunk_rows)


@pytest.mark.parametrize('chunk_rows', [0, 5])
@pytest.mark.parametrize('dtype', dtypes)
@pytest.mark.parametrize('dloss', [1 / 8, 1e-4, 65536.0])
def test_scaled_losses(dloss, dtype, chunk_rows):
    """Divided by the micro-steps, and multiplied as a GradScaler does, which must not overflow in float16 where PyTorch's does not."""
    compare_heads(*heads(many, 1000, 64, dtype), f'loss x {dloss}', dloss=dloss, chunk_rows=chunk_rows)


@pytest.mark.parametrize('chunk_rows', [0, 5])
@pytest.mark.parametrize('M', [0, 7])
def test_nothing_to_predict(M, chunk_rows):
    """No rows, or all of them ignored: NaN with gradients of zero, as F.cross_entropy has it."""
    x, w, targets = heads(M, 65)
    targets.fill_(-1)
    for loss in (
        F.cross_entropy(F.linear(x, w), targets, ignore_index=-1),
        linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows),
    ):
        dx, dw = torch.autograd.grad(loss, (x, w))
        assert loss.isnan() and not dx.any() and not dw.any() and dx.shape == x.shape


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_another_index_to_ignore(chunk_rows):
    x, w, targets = heads(33, 65)
    targets.clamp_(min=0)
    targets[::4] = 3
    expected = F.cross_entropy(F.linear(x, w), targets, ignore_index=3)
    loss = linear_cross_entropy(x, w, targets, ignore_index=3, chunk_rows=chunk_rows)
    for a, b in zip((loss, *torch.autograd.grad(loss, (x, w))), (expected, *torch.autograd.grad(expected, (x, w)))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # float32, sums in another order


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_a_target_outside_the_vocabulary(chunk_rows):
    for outside in (65, -2, 10**9):
        x, w, targets = heads(33, 65)
        targets[7] = outside
        assert linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows).isnan()


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_shapes_and_strides_of_the_loss(chunk_rows):
    """Any leading dimensions, and no need for contiguous memory: targets are often a slice of rows one token longer."""
    x, w, targets = heads(24, 65)
    expected = linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows)
    for shape in ((24,), (4, 6), (2, 3, 4), (1, 24), (24, 1)):
        assert torch.equal(
            linear_cross_entropy(x.view(*shape, 64), w, targets.view(shape), chunk_rows=chunk_rows), expected
        )
    apart = torch.stack((targets, targets * 0 + 1), -1)[:, 0]  # every other number in memory
    wide = torch.stack((x, x * 0 + 1), 1)[:, 0]
    tall = torch.stack((w, w * 0 + 1), 2)[:, :, 0]
    torch.testing.assert_close(
        linear_cross_entropy(wide, tall, apart, chunk_rows=chunk_rows), expected, rtol=1e-6, atol=0
    )
    spread = targets[:1].expand(24)
    torch.testing.assert_close(
        linear_cross_entropy(x, w, spread, chunk_rows=chunk_rows), F.cross_entropy(x @ w.t(), spread), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match=r'targets have shape \(23,\), but x \(24, 64\)'):
        linear_cross_entropy(x, w, targets[1:])


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_frozen_parts_of_the_loss(chunk_rows):
    x, w, targets = heads(33, 65)
    full = torch.autograd.grad(linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows), (x, w))
    for i, (a, b) in enumerate(((x, w.detach()), (x.detach(), w))):
        (grad,) = torch.autograd.grad(linear_cross_entropy(a, b, targets, chunk_rows=chunk_rows), (a, b)[i])
        assert torch.equal(grad, full[i])
    assert not linear_cross_entropy(x.detach(), w.detach(), targets, chunk_rows=chunk_rows).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows).requires_grad


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_double_backward_of_the_loss_raises(chunk_rows):
    x, w, targets = heads(33, 65)
    factor = torch.ones((), device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(
        linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows) * factor, x, create_graph=True
    )
    with pytest.raises(RuntimeError, match='once_differentiable'):
        dx.sum().backward()


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_the_loss_has_the_same_bits_every_time(chunk_rows):
    x, w, targets = heads(many, 1000, 64, bf16)

    def once():
        with torch.autocast(device, dtype=bf16):
            loss = linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows)
        return digest((loss, *torch.autograd.grad(loss, (x, w))))

    assert len({once() for _ in range(20 if gpu else 3)}) == 1


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_the_loss_of_another_backward_through_the_same_graph(chunk_rows):
    """The logits hold their gradient by then, and keep it."""
    x, w, targets = heads(33, 65)
    loss = linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (x, w))):
        assert torch.equal(a, b)


def test_cross_entropy_of_logits_that_stay():
    """As in an evaluation: PyTorch's value, without its copies of the logits in float32. Where a gradient is wanted, by PyTorch."""
    M, V = (4096, 50304) if gpu else (33, 65)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(M, V, device=device, generator=generator)
    targets = torch.randint(V, (M,), device=device, generator=generator)
    targets[::3] = -1
    for a, b in ((logits, targets), (logits.t().contiguous().t(), targets.repeat_interleave(2)[::2])):
        expected = F.cross_entropy(a, b, ignore_index=-1)
        torch.testing.assert_close(cross_entropy(a, b), expected, rtol=1e-6, atol=0)  # float32, sums in another order
    for ignore_index in (-1, 3):
        narrow, b = logits.to(bf16), targets.clamp(min=ignore_index)
        before = narrow.clone()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            there = torch.cuda.memory_allocated()
        loss = cross_entropy(narrow, b, ignore_index=ignore_index)
        assert not gpu or torch.cuda.max_memory_allocated() - there < 2**20
        torch.testing.assert_close(
            loss, F.cross_entropy(narrow.float(), b, ignore_index=ignore_index), rtol=1e-6, atol=0
        )
        assert torch.equal(narrow, before)
    ours, theirs = leaf(logits), leaf(logits)
    cross_entropy(ours, targets).backward()
    F.cross_entropy(theirs, targets, ignore_index=-1).backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert cross_entropy(logits, targets * 0 - 1).isnan()
    for wrong in (targets[1:], targets.repeat(2)):
        with pytest.raises(ValueError, match='targets have shape'):
            cross_entropy(logits, wrong)


@pytest.mark.skipif(not gpu, reason='needs 13 GB')
def test_more_than_2_to_the_31_logits():
    M, V = 43_000, 50304
    logits = torch.randn(M, V, device=device, dtype=bf16)
    targets = torch.randint(V, (M,), device=device)
    tail = logits[-50:].clone()
    losses = launch_cross_entropy(logits, targets, -1, True)
    assert torch.equal(losses[-50:], launch_cross_entropy(tail, targets[-50:].clone(), -1, True)) and torch.equal(
        logits[-50:], tail
    )


# GELU


def exact_gelu(x):
    """gelu and its derivative in float64, from erfc, which does not cancel for negative x."""
    x = x.to(f64)
    below = torch.special.erfc(-x / 2**0.5) / 2
    return x * below, below + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


@pytest.mark.parametrize('dtype', dtypes)
def test_gelu_on_a_dense_grid(dtype):
    """
    Everywhere at most twice as far from the truth as PyTorch's largest error nearby, and within a rounding; below -4 PyTorch's own, which
    computes 1 + erf in float32, loses all digits, so the bound there is the error of the formula: 1.5e-7 of |x| / 2, plus a rounding.
    """
    x = torch.linspace(-30, 30, 600_001 if gpu else 60_001, device=device, dtype=f64).to(dtype)
    ours, theirs = leaf(x), leaf(x)
    y, their_y = gelu(ours), F.gelu(theirs)
    y.sum().backward()
    their_y.sum().backward()
    assert y.dtype == ours.grad.dtype == dtype
    rounding = {f32: 2**-23, bf16: 2**-8 if gpu else 2**-7, f16: 2**-10}[
        dtype
    ]  # half a unit in the last place; the interpreter truncates bfloat16
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
    At most twice as far from the float64 function and its derivative as PyTorch's largest error, and everywhere within a rounding of the
    result plus 3e-7 of |x| + 1, a few roundings of the float32 arithmetic. At +-60,000, where float32 cubes are still finite but float16
    squares are not, the function is x or 0.
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
    """NaN, the infinities, zeros with their signs, the smallest and the largest numbers; -inf is multiplied by 0 here as in PyTorch."""
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
        torch.testing.assert_close(
            got, values, rtol=0, atol=tiny, equal_nan=True
        )  # a GPU may take what is smaller for 0
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
    """Sizes around the block of a program; beyond the last element nothing is written."""
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
