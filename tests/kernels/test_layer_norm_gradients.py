"""
Tests of LayerNorm's weight gradients summed together at the end of a backward: they have the same bits as gradients
summed one by one, and wait only where nothing reads them earlier.
"""

import pytest
import torch
from numerics import bf16, device, gpu
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import layer_norm_gradients
from kernels import linear as linear_module
from kernels.add_layer_norm import add_layer_norm
from kernels.layer_norm import layer_norm

LAYERS, WIDTH = 5, 64


@pytest.fixture(autouse=True)
def capturing(monkeypatch):
    """
    Acts as if a CUDA graph were captured, with groups of two LayerNorms. Yields how many LayerNorms each reduction has
    summed.
    """
    together = []
    reduce = layer_norm_gradients.launch_reduce

    def launch_reduce(partial, dw, db):
        together.append(len(partial))
        reduce(partial, dw, db)

    monkeypatch.setattr(layer_norm_gradients, 'launch_reduce', launch_reduce)
    monkeypatch.setattr(linear_module, 'capturing', lambda weight: True)
    monkeypatch.setattr(layer_norm_gradients, 'LAYER_NORMS_PER_LAUNCH', 2)
    return together


class Norms(nn.Module):
    """A stack of LayerNorms, each over the sum of the stream and a branch."""

    def __init__(self, bias=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        random = lambda: nn.Parameter(torch.randn(WIDTH, generator=generator).to(device))
        self.weights = nn.ParameterList(random() for _ in range(LAYERS))
        self.biases = nn.ParameterList(random() for _ in range(LAYERS)) if bias else [None] * LAYERS

    def forward(self, x, checkpointed=False):
        x = x + layer_norm(x, self.weights[0], self.biases[0])
        y = x
        for weight, bias in zip(self.weights[1:], self.biases[1:]):
            if checkpointed:
                x, y = checkpoint(add_layer_norm, x, y, weight, bias, use_reentrant=False)
            else:
                x, y = add_layer_norm(x, y, weight, bias)
        return y


def rows(seed=0):
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


def gradients(model, backward=lambda model, seed: model(rows(seed)).square().sum().backward()):
    for seed in range(2):
        backward(model, seed)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize('bias', [True, False])
def test_the_same_bits_in_fewer_launches(bias, capturing, monkeypatch):
    together = gradients(Norms(bias))
    assert capturing == [2, 2, 1] * 2
    monkeypatch.setattr(layer_norm_gradients, 'may_wait', lambda parameters: False)
    assert all(map(torch.equal, together, gradients(Norms(bias))))


def test_without_a_graph_they_do_not_wait(capturing, monkeypatch):
    monkeypatch.setattr(linear_module, 'capturing', lambda weight: False)
    gradients(Norms())
    assert capturing == []


def test_under_activation_checkpointing(capturing):
    checkpointed = gradients(Norms(), lambda model, seed: model(rows(seed), True).square().sum().backward())
    assert capturing == [2, 2, 1] * 2
    assert all(map(torch.equal, checkpointed, gradients(Norms())))


def test_a_layer_norm_that_is_used_twice(capturing, monkeypatch):
    twice = lambda model, seed: (model(rows(seed)) + model(rows(seed + 5))).square().sum().backward()
    together = gradients(Norms(), twice)
    monkeypatch.setattr(layer_norm_gradients, 'may_wait', lambda parameters: False)
    for a, b in zip(together, gradients(Norms(), twice)):
        torch.testing.assert_close(a, b)  # summed in another order


@pytest.mark.parametrize('kind', ['tensor hook', 'hook after accumulation'])
def test_a_hook_sees_its_gradient(kind, monkeypatch):
    seen = []
    for may_wait in (layer_norm_gradients.may_wait, lambda parameters: False):
        monkeypatch.setattr(layer_norm_gradients, 'may_wait', may_wait)
        model = Norms()
        if kind == 'tensor hook':
            model.weights[2].register_hook(lambda grad: seen.append(grad.clone()))
        else:
            model.weights[2].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        gradients(model)
    assert len(seen) == 4 and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_gradients_that_are_asked_for():
    """autograd.grad returns its gradient and changes no other; backward(inputs=...) adds to those gradients alone."""
    model = Norms()
    expected = [p.clone() for p in gradients(Norms(), lambda model, seed: seed or model(rows()).sum().backward())]
    returned = torch.autograd.grad(model(rows()).sum(), [model.weights[1]])
    assert torch.equal(returned[0], expected[1]) and all(p.grad is None for p in model.parameters())
    model(rows()).sum().backward(inputs=[model.weights[1], model.biases[1]])
    there = {name for name, p in model.named_parameters() if p.grad is not None}
    assert there == {'weights.1', 'biases.1'} and torch.equal(model.weights[1].grad, expected[1])


def test_a_frozen_bias(capturing):
    model = Norms()
    model.biases[1].requires_grad_(False)
    grads = gradients(model)
    assert grads[LAYERS + 1] is None and all(grad is not None for i, grad in enumerate(grads) if i != LAYERS + 1)
    assert sum(capturing) == 2 * (LAYERS - 1)


def test_a_backward_that_fails_leaves_nothing(monkeypatch):
    model = Norms()
    x = rows().requires_grad_()

    def fail(grad):
        raise RuntimeError('out of luck')

    x.register_hook(fail)
    with pytest.raises(RuntimeError, match='out of luck'):
        model(x).square().sum().backward()
    for p in model.parameters():
        p.grad = None
    assert all(map(torch.equal, gradients(model), gradients(Norms())))
    assert not layer_norm_gradients.shares


def test_wrappers_that_read_gradients_in_backward(capturing):
    """Under DDP, gradients wait in micro-steps that do not average them. Under FSDP, they never wait."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group('nccl' if gpu else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(Norms(), gradient_as_bucket_view=True)

        def accumulate(model, seed):
            model.require_backward_grad_sync = seed == 1
            model(rows(seed)).square().sum().backward()

        averaged = gradients(ddp, accumulate)
        assert sum(capturing) == LAYERS, 'those of the first micro-step'
        sharded = fully_shard(Norms(), mesh=dist.device_mesh.init_device_mesh(device, (1,)))
        collected = [grad.full_tensor() for grad in gradients(sharded)]
        assert sum(capturing) == LAYERS
    finally:
        dist.destroy_process_group()
    expected = gradients(Norms())
    assert all(map(torch.equal, averaged, expected)) and all(map(torch.equal, collected, expected))


def test_parameters_in_16_bits_do_not_wait(capturing):
    weight = nn.Parameter(torch.ones(WIDTH, device=device, dtype=bf16))
    layer_norm(rows().to(bf16), weight).sum().backward()
    assert capturing == [] and weight.grad.dtype == bf16
