"""
Skips an optimizer step whose gradient is inf or NaN, and ends a run that skips too many steps in a row.

On a GPU the decision is made on the GPU, so that the CPU need not wait for it: step() sets the attribute `found_inf` of
the optimizer to a float32 tensor of shape (), 1.0 to skip and 0.0 to step. Fused AdamW reads this attribute, as it does
for torch.amp.GradScaler, which sets it in float16. An optimizer that wraps AdamW must pass it on.
"""

import math

import torch
from torch import nn

from distributed import max_over_ranks, mean_over_ranks
from errors import UserError

MAX_IN_A_ROW = 5


class StepGuard:
    """Steps an optimizer, and skips and counts steps whose gradient is not finite."""

    def __init__(self, device: str, scaler: torch.amp.GradScaler):
        self.scaler = scaler
        self.skipped = torch.zeros((), device=device)  # steps skipped in this run
        self.in_a_row = torch.zeros((), device=device)  # steps skipped since the last good one
        self.unsaved = None  # or why the last state of the run is not saved

    def step(self, optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
        """
        Steps the optimizer unless grad_norm, the norm of all gradients (shape (), equal on all ranks), is inf or NaN.
        """
        bad = (~torch.isfinite(grad_norm)).float()
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)  # checks the gradients itself
            self.scaler.update()
        elif optimizer.defaults.get('fused'):
            optimizer.found_inf = bad
            optimizer.step()
        elif not bad:  # reading the tensor costs nothing on a CPU
            optimizer.step()
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad

    def measure(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> tuple[float, float, int]:
        """
        Returns (loss, grad_norm, steps skipped so far) as numbers, for two float32 tensors of shape (). Makes one
        transfer, which waits for the device.
        """
        loss, grad_norm, skipped, self.measured_in_a_row = torch.stack(
            (loss, grad_norm, self.skipped, self.in_a_row)
        ).tolist()
        return loss, grad_norm, int(skipped)

    def check(self, iter_num: int, lr: float, skipped: int, model: nn.Module) -> None:
        """
        Raises UserError, on all ranks, if too many steps in a row were skipped before the last measure(). The message
        says whether the model's weights are finite; iter_num, lr and skipped appear in the message only.
        """
        if self.measured_in_a_row < MAX_IN_A_ROW:
            return
        # in float16 each skipped step halves the loss scale, 65536 at first: several in a row are a search, not a
        # failure
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return
        largest = largest_weight(model)
        if largest < float('inf'):
            weights = f'All weights are finite, the largest is {largest:.1e}'
            advice = 'Try a lower --learning_rate, more --warmup_iters or --grad_clip=1.0'
            if self.scaler.is_enabled():
                advice += '; --dtype=bfloat16 or float32 has more range'
            advice += ', and look at the data it stopped at'
        else:
            weights = 'The weights are not finite either, so no flag can continue from them'
            advice = 'Resume from an earlier checkpoint, such as ckpt_best.pt, or train from scratch'
        raise UserError(
            f'training diverged: the last {self.measured_in_a_row:.0f} steps up to iteration {iter_num} had a gradient '
            f'that is not finite (inf or NaN) and were skipped, {skipped} in all; the learning rate is {lr:.2e}. '
            f'{weights}. {advice}.'
        )

    def worth_saving(self, model: nn.Module, next_loss) -> bool:
        """
        Returns whether the last state of a run may replace its checkpoint: whether all weights and the last gradient
        are finite. If only the gradient is not, its step was skipped and the weights may be good, so next_loss(), the
        loss of the next batch (shape ()), decides. Otherwise `unsaved` says why not. Collective.
        """
        if math.isfinite(largest_weight(model)):
            if not self.in_a_row or math.isfinite(mean_over_ranks(next_loss()).item()):
                return True
        self.unsaved = 'the last state is not saved, because its loss, or a weight, is not finite (inf or NaN)'
        print(self.unsaved)
        return False


@torch.no_grad()
def largest_weight(model: nn.Module) -> float:
    """
    Returns the largest absolute weight, inf if any weight is inf or NaN. Collective; FSDP's ranks check their shards.
    """
    weights = [p.to_local() if hasattr(p, 'to_local') else p for p in model.parameters()]
    largest = (p.abs().max().item() if p.isfinite().all() else float('inf') for p in weights if p.numel())
    return max_over_ranks(max(largest, default=0.0))  # with more ranks than rows, a rank has no weights
