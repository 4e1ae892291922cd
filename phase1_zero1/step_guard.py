"""
StepGuard: an optimizer step that is not taken when a gradient is inf or NaN.

On a GPU the decision is made on the GPU, so that the CPU need not wait for it: fused AdamW skips its update where its
`found_inf` is 1, which is how torch.amp.GradScaler skips steps in float16.
"""

import torch

from errors import UserError

MAX_IN_A_ROW = 5


def clip_gradients(optimizer, parameters, max_norm, scaler):
    """
    Returns the norm of all gradients as a 0-dim tensor, and clips them to max_norm (0: not at all). Call before StepGuard.step. Fused AdamW
    clips them as it reads them, which saves a pass: it divides by optimizer.grad_scale, the attribute through which GradScaler undoes the
    loss scale. For other optimizers, sharded gradients and an enabled scaler, the gradients are clipped here.
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    in_step = optimizer.defaults.get('fused') and not scaler.is_enabled()
    if in_step and max_norm and all(type(grad) is torch.Tensor for grad in grads):
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)
    elif max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class StepGuard:
    def __init__(self, device, scaler):
        self.scaler = scaler
        self.skipped = torch.zeros((), device=device)  # steps skipped in this run
        self.in_a_row = torch.zeros((), device=device)  # of them, those since the last good step

    def step(self, optimizer, grad_norm):
        """Steps the optimizer unless grad_norm, the norm of all its gradients (a 0-dim tensor, equal on all ranks), is not finite."""
        bad = (~torch.isfinite(grad_norm)).float()
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)  # looks at the gradients itself
            self.scaler.update()
        elif optimizer.defaults.get('fused'):
            optimizer.found_inf = bad
            optimizer.step()
            optimizer.grad_scale = None  # clip_gradients' factor is for this step alone
        elif not bad:  # no waiting on a CPU
            optimizer.step()
        self.skipped += bad
        self.in_a_row = (self.in_a_row + 1) * bad

    def read(self, loss, grad_norm):
        """
        The numbers (loss, grad_norm, steps skipped so far), of two 0-dim float32 tensors and our own, in one transfer, which
        waits for the device.
        """
        loss, grad_norm, skipped, self.last_in_a_row = torch.stack(
            (loss, grad_norm, self.skipped, self.in_a_row)
        ).tolist()
        return loss, grad_norm, int(skipped)

    def check(self, iter_num, lr, skipped):
        """Raises UserError when, as of the last read(), too many steps in a row were skipped; the rest is for its message."""
        # in float16 the loss scale, 65536 at first, is halved at each skipped step: a row of them is a search, not a failure
        if self.last_in_a_row >= MAX_IN_A_ROW and not (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            raise UserError(
                f'training diverged: the last {self.last_in_a_row:.0f} steps up to iteration {iter_num} had a gradient that is not finite '
                f'(inf or NaN) and were skipped, {skipped} in all; the learning rate is {lr:.2e}. The weights and the last checkpoint are those '
                'from before. Try a lower --learning_rate, more --warmup_iters or a smaller --grad_clip'
                + ('; --dtype=bfloat16 or float32 has more range' if self.scaler.is_enabled() else '')
                + ', and look at the data it stopped at.'
            )
