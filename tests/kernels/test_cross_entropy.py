"""Tests of the last matmul with the cross-entropy, and of the cross-entropy alone, against float64."""

import pytest
import torch
from numerics import bf16, bound, device, digest, dtypes, f16, f32, f64, gpu, leaf
from torch.nn import functional as F

from kernels.cross_entropy import cross_entropy, launch_cross_entropy, linear_cross_entropy, scaled
from kernels.launch import Config

many = 131 if gpu else 17  # rows; the interpreter takes 5 ms for one, and has at most 4 programs
few = 33 if gpu else 9


def plain_cross_entropy(logits, targets, ignore_index=-1):
    """
    Returns PyTorch's cross-entropy in float32, as under autocast on CUDA (autocast on a CPU would round log-softmax to
    16 bits).
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index)


def softmax_less_onehot(logits, targets, ignore_index=-1):
    """Returns the loss and the gradient of each row of logits (M, V), in float64."""
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
    """Loss and gradient of each row against float64, for small, large and huge logits."""
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
    """
    Single ones, and whole chunks at the start and end of a row. Only a row with no other logit is NaN, as in PyTorch.
    """
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
    """
    Nothing around the logits is written, whatever the targets are. A target outside the vocabulary makes its loss NaN.
    """
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
    """
    Returns x (M, C), weight (V, C) float32 with values that dtype represents exactly, and targets (M,), some of them
    ignored.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, C, generator=generator).to(device, dtype)
    w = (torch.randn(V, C, generator=generator) * size / C**0.5).to(device, dtype).float()
    targets = torch.randint(V, (M,), generator=generator)
    targets[1::5] = -1
    return leaf(x), leaf(w), targets.to(device)


def compare_heads(x, w, targets, what='', dloss=1.0, **options):
    """
    Compares loss and gradients under autocast to the dtype of x (none for float32). The loss is multiplied by dloss,
    and the gradients are divided by it.
    """
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
    """
    The loss is divided by the number of micro-steps and multiplied as by a GradScaler. float16 must not overflow where
    PyTorch's does not.
    """
    compare_heads(*heads(many, 1000, 64, dtype), f'loss x {dloss}', dloss=dloss, chunk_rows=chunk_rows)


@pytest.mark.parametrize('chunk_rows', [0, 5])
@pytest.mark.parametrize('M', [0, 7])
def test_nothing_to_predict(M, chunk_rows):
    """With no rows, or only ignored ones, the loss is NaN and gradients are zero, as with F.cross_entropy."""
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
    x, w, targets = heads(few, 65)
    targets.clamp_(min=0)
    targets[::4] = 3
    expected = F.cross_entropy(F.linear(x, w), targets, ignore_index=3)
    loss = linear_cross_entropy(x, w, targets, ignore_index=3, chunk_rows=chunk_rows)
    for a, b in zip((loss, *torch.autograd.grad(loss, (x, w))), (expected, *torch.autograd.grad(expected, (x, w)))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # float32, sums in another order


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_a_target_outside_the_vocabulary(chunk_rows):
    for outside in (65, -2, 10**9):
        x, w, targets = heads(few, 65)
        targets[7] = outside
        assert linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows).isnan()


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_shapes_and_strides_of_the_loss(chunk_rows):
    """x may have any leading dimensions and any strides: targets are often a slice of rows one token longer."""
    x, w, targets = heads(12, 65)
    expected = linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows)
    for shape in ((12,), (3, 4), (2, 3, 2), (1, 12), (12, 1)):
        assert torch.equal(
            linear_cross_entropy(x.view(*shape, 64), w, targets.view(shape), chunk_rows=chunk_rows), expected
        )
    apart = torch.stack((targets, targets * 0 + 1), -1)[:, 0]  # every other number in memory
    wide = torch.stack((x, x * 0 + 1), 1)[:, 0]
    tall = torch.stack((w, w * 0 + 1), 2)[:, :, 0]
    torch.testing.assert_close(
        linear_cross_entropy(wide, tall, apart, chunk_rows=chunk_rows), expected, rtol=1e-6, atol=0
    )
    spread = targets[:1].expand(12)
    torch.testing.assert_close(
        linear_cross_entropy(x, w, spread, chunk_rows=chunk_rows), F.cross_entropy(x @ w.t(), spread), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match=r'targets have shape \(11,\), but x \(12, 64\)'):
        linear_cross_entropy(x, w, targets[1:])


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_frozen_parts_of_the_loss(chunk_rows):
    x, w, targets = heads(few, 65)
    full = torch.autograd.grad(linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows), (x, w))
    for i, (a, b) in enumerate(((x, w.detach()), (x.detach(), w))):
        (grad,) = torch.autograd.grad(linear_cross_entropy(a, b, targets, chunk_rows=chunk_rows), (a, b)[i])
        assert torch.equal(grad, full[i])
    assert not linear_cross_entropy(x.detach(), w.detach(), targets, chunk_rows=chunk_rows).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows).requires_grad


@pytest.mark.parametrize('chunk_rows', [0, 5])
def test_double_backward_of_the_loss_raises(chunk_rows):
    x, w, targets = heads(few, 65)
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
    """The logits already hold their gradient by then, and keep it."""
    x, w, targets = heads(few, 65)
    loss = linear_cross_entropy(x, w, targets, chunk_rows=chunk_rows)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (x, w))):
        assert torch.equal(a, b)


def test_cross_entropy_of_logits_that_stay():
    """
    In evaluation: PyTorch's value, without its float32 copies of the logits. PyTorch computes it where a gradient is
    needed.
    """
    M, V = (4096, 50304) if gpu else (few, 65)
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


@pytest.mark.parametrize('dtype', [bf16, f16, f32] if gpu else [f16, f32])
def test_scaling_of_gradients(dtype):
    """Each product is rounded once, and the factor not at all. Rounding the factor would shift the mean by 0.2%."""
    x = (torch.randn(3000, generator=torch.Generator().manual_seed(0)).abs() + 1).to(device, dtype)
    factor = torch.tensor(1 / 98304 * 1000, device=device)
    exact, got = x.to(f64) * factor.to(f64), scaled(x, factor)
    assert got.dtype == dtype
    torch.testing.assert_close(got.to(f64), exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert (got.to(f64).sum() / exact.sum()).item() == pytest.approx(1, abs=2e-4)  # 3000 roundings of up to 4e-3
    assert torch.equal(scaled(x, factor, out=x), got) and torch.equal(x, got), 'in place'
