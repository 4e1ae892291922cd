"""Clipping gradients inside the optimizer's step, where AdamW is fused, gives what clipping before it gives."""

import copy
import math

import pytest
import torch
from step_guard import StepGuard, clip_gradients


def model_and_optimizer(fused):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)


def backward(model, size):
    (model(torch.ones(2, 6)).square().sum() * size).backward()


@pytest.mark.parametrize('max_norm', [0.0, 0.5, 1e6])
@pytest.mark.parametrize('fused', [True, False])
def test_as_clip_grad_norm(fused, max_norm):
    weights, norms = [], []
    for ours in (True, False):
        model, optimizer = model_and_optimizer(fused)
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        guard = StepGuard('cpu', scaler)
        for size in (10.0, 0.1, 3.0):
            backward(model, size)
            if ours:
                norm = clip_gradients(optimizer, model.parameters(), max_norm, scaler)
            else:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
            norms.append(norm.item())
            guard.step(optimizer, norm)
            assert getattr(optimizer, 'grad_scale', None) is None, 'the next step may not be clipped'
            optimizer.zero_grad(set_to_none=True)
        weights.append(list(model.parameters()))
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-6)
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # divided by 1 / coefficient instead of multiplied by it


def test_a_gradient_that_is_not_finite_is_skipped():
    model, optimizer = model_and_optimizer(fused=True)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    guard, before = StepGuard('cpu', scaler), copy.deepcopy(model.state_dict())
    backward(model, float('nan'))
    guard.step(optimizer, clip_gradients(optimizer, model.parameters(), 1.0, scaler))
    assert guard.skipped == 1 and all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_a_gradient_scaler_finds_clipped_gradients():
    """Its own step uses optimizer.grad_scale."""
    model, optimizer = model_and_optimizer(fused=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
    scaler.unscale_(optimizer)
    norm = clip_gradients(optimizer, model.parameters(), 0.5, scaler)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm > 0.5 and clipped.item() == pytest.approx(0.5, rel=1e-5)
    assert getattr(optimizer, 'grad_scale', None) is None
    scaler.step(optimizer)
