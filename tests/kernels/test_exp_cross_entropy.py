"""
Tests of the head whose matmul writes exponentials (kernels/exp_cross_entropy.py). On a CPU, PyTorch writes the
exponentials, and the tests check the algebra around them; on a Hopper GPU they also check the matmul.
"""

import sys

import pytest
import torch
from numerics import bf16, bound, device, digest, f64, gpu, leaf
from torch.nn import functional as F

import kernels
from kernels import cross_entropy, exp_cross_entropy

hopper = gpu and torch.cuda.get_device_capability() == (9, 0)


def plain_exponentials(x, w, shifts):
    """Returns what exponentials() returns, by PyTorch."""
    z = x.float() @ w.float().t()
    exps = torch.exp2((z * 1.4426950408889634 - shifts[:, None]).clamp(max=exp_cross_entropy.MAX_EXPONENT))
    return exps.to(x.dtype), exps.sum(1)[None]


@pytest.fixture(autouse=True)
def exponentials_by_pytorch(monkeypatch):
    if not hopper:
        monkeypatch.setattr(exp_cross_entropy, 'exponentials', plain_exponentials)


def head(M, V, C, size=1.0, seed=0, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, C, generator=generator).to(device, bf16)
    w = (torch.randn(V, C, generator=generator) * size / C**0.5).to(device, bf16).float()
    targets = torch.randint(V, (M,), generator=generator)
    if ignored:
        targets[1::5] = -1
    return leaf(x), leaf(w), targets.to(device)


def ours(x, w, targets, dtype=bf16):
    return exp_cross_entropy.ExpCrossEntropyFunction.apply(x, w, targets, -1, dtype, False)


shapes = [(7, 8, 64), (7, 65 * 8, 64), (33, 1000, 64)]
shapes_gpu = [(7, 8, 64), (7, 520, 768), (131, 1000, 64), (129, 50304, 768), (1000, 50264, 768), (256, 3072, 1600)]


@pytest.mark.parametrize('size', [1.0, 10.0])  # beyond 20, some losses would saturate
@pytest.mark.parametrize('M, V, C', shapes_gpu if gpu else shapes)
def test_loss_and_gradients_against_float64(M, V, C, size):
    x, w, targets = head(M, V, C, size, ignored=M > 1)
    loss = ours(x, w, targets)
    with torch.autocast(device, dtype=bf16):
        logits = F.linear(x, w)
    theirs = F.cross_entropy(logits.float(), targets, ignore_index=-1)
    x64, w64 = leaf(x, f64), leaf(w, f64)
    truth = F.cross_entropy(x64 @ w64.t(), targets, ignore_index=-1)
    dloss = 1 / 8
    grads, their_grads, true_grads = (
        torch.autograd.grad(a, leaves, torch.tensor(dloss, device=device, dtype=a.dtype))
        for a, leaves in ((loss, (x, w)), (theirs, (x, w)), (truth, (x64, w64)))
    )
    bound('loss', loss.detach(), truth.detach(), theirs.detach())
    taken = (targets >= 0)[:, None] / (targets >= 0).sum() * dloss
    dx_terms = w64.detach()[targets.clamp(min=0)] * taken
    dw_terms = torch.zeros_like(w64).index_add_(0, targets.clamp(min=0), x64.detach().abs() * taken)
    # dx is rounded three times, as gradient of the logits, product, and scaled product, PyTorch's twice
    bound('dx', grads[0], true_grads[0], their_grads[0], dx_terms, rounded_to=bf16, factor=3)
    bound('dweight', grads[1], true_grads[1], their_grads[1], dw_terms, rounded_to=bf16)


def test_results_are_the_same_each_time():
    def results():
        x, w, targets = head(131, 3000 if gpu else 64, 64)
        loss = ours(x, w, targets)
        return digest((loss, *torch.autograd.grad(loss, (x, w))))

    assert results() == results()


def test_a_target_far_below_the_largest_logit():
    """The exponent is clamped: the loss of such a token saturates, and all gradients stay finite."""
    x, w, targets = head(8, 64, 64)
    with torch.no_grad():
        w.mul_(0.01)
        w[5] = x[0].float() * 4  # logit 5 of row 0 is about 256, of the others smaller
    targets.fill_(3)
    loss = ours(x, w, targets)
    dx, dw = torch.autograd.grad(loss, (x, w))
    saturated = (exp_cross_entropy.MAX_EXPONENT + 90) * 0.6931
    assert dx.isfinite().all() and dw.isfinite().all() and saturated / 8 < loss < 40
    assert dw[5] @ x[0].float() > 0  # a step lowers the logit that is too large


def test_a_target_that_is_all_but_certain():
    x, w, targets = head(8, 64, 64)
    with torch.no_grad():
        w.mul_(0.01)
        w[3] = x.float().mean(0) * 4
        x.copy_(x.float().mean(0, keepdim=True).expand_as(x) * 8)
    targets.fill_(3)
    loss = ours(x, w, targets)
    dx, dw = torch.autograd.grad(loss, (x, w))
    # logits near 256, summed in another order, differ by up to 3e-6 of that
    assert abs(loss.item()) < 1e-3 and dx.isfinite().all() and dw.isfinite().all()


@pytest.mark.parametrize('where', ['x', 'w'])
def test_nan_is_seen(where):
    x, w, targets = head(8, 64, 64)
    with torch.no_grad():
        (x if where == 'x' else w)[2, 3] = float('nan')
    targets.fill_(4)
    assert ours(x, w, targets).isnan()


def test_ignored_rows_and_targets_outside_the_vocabulary():
    x, w, targets = head(9, 64, 64)
    loss = ours(x, w, targets)
    dx, _ = torch.autograd.grad(loss, (x, w))
    assert not dx[targets == -1].any() and dx[targets != -1].abs().sum(1).all()
    assert ours(x, w, targets.masked_fill(targets == -1, 64)).isnan()
    loss = ours(x, w, torch.full_like(targets, -1))
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert loss.isnan() and not dx.any() and not dw.any()


class OnHopper(torch.Tensor):
    is_cuda = True


def test_where_the_matmul_is_used(monkeypatch):
    """Elsewhere the loss is computed from logits."""
    found = [(9, 0)]
    monkeypatch.setattr(exp_cross_entropy, 'interpreted', False)
    monkeypatch.setattr(exp_cross_entropy, 'capability', lambda device: found[0])

    def fits(rows=exp_cross_entropy.MIN_ROWS, V=48, C=16, dtype=bf16, offset=0):
        x, w = torch.zeros(rows, C), torch.zeros(V * C + offset)[offset:].view(V, C)
        return exp_cross_entropy.supports(x.as_subclass(OnHopper), w, dtype)

    assert fits() and fits(rows=1337, V=8, C=1600)
    assert not fits(rows=exp_cross_entropy.MIN_ROWS - 1) and not fits(V=50257) and not fits(C=20)
    assert not fits(dtype=torch.float16) and not fits(dtype=torch.float32) and not fits(offset=1)
    for found[0] in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert not fits()


def test_a_triton_with_another_gluon(monkeypatch, capsys):
    monkeypatch.setattr(kernels, 'matmul_hopper', None, raising=False)
    monkeypatch.delattr(kernels, 'matmul_hopper')
    monkeypatch.delitem(sys.modules, 'kernels.matmul_hopper', raising=False)
    monkeypatch.setitem(sys.modules, 'triton.experimental.gluon.nvidia.hopper', None)
    exp_cross_entropy.load_matmul_hopper.cache_clear()
    for _ in range(2):
        assert exp_cross_entropy.load_matmul_hopper() is None
    exp_cross_entropy.load_matmul_hopper.cache_clear()
    assert capsys.readouterr().out.count('computing the loss from logits, which is slower: ') == 1


@pytest.mark.skipif(not gpu, reason='needs a Hopper GPU')
@pytest.mark.parametrize('rows', [exp_cross_entropy.MIN_ROWS - 1, exp_cross_entropy.MIN_ROWS])
def test_many_rows_in_bfloat16_take_it(rows):
    x, w, targets = head(rows, 1000, 64)
    with torch.autocast(device, dtype=bf16):
        loss = cross_entropy.linear_cross_entropy(x, w, targets)
        chunked = cross_entropy.linear_cross_entropy(x, w, targets, chunk_rows=rows)
    assert (loss == ours(x, w, targets)).item() == (rows == exp_cross_entropy.MIN_ROWS)
    assert chunked != ours(x, w, targets)  # logits rounded to bfloat16 give another loss
