"""
FP8: matmul operands of 8 bits, and the scales that fit tensors into their range.

    q = clamp(x * scale),  x ≈ q / scale

q is e4m3 for activations and weights (up to 448), and e5m2 for gradients (up to 57,344).

Each tensor has one scale. It is a power of two, so scaling rounds nothing. It follows from the tensor's amax, the
largest absolute value. The amax of a weight is computed before the weight is quantized. For an activation or a gradient
this would take another pass, so its scaling is delayed: the scale comes from the amax of earlier micro-steps, with
headroom. The kernel that writes a tensor's q also records its amax, and a small kernel at the start of the next
micro-step turns these records into scales. The CPU takes no part, so CUDA graphs can capture all of it. The first
micro-step has no scales yet: it computes in bfloat16 and only records.

Values beyond the headroom are clamped in this micro-step, and the next one has the new scale. The state counts such
micro-steps. NaN stays NaN. An infinity is clamped here, but the weight gradients, which are computed in bfloat16, still
show it.

Sources: Micikevicius et al., FP8 formats for deep learning, 2022 (arXiv:2209.05433); delayed scaling as in NVIDIA's
Transformer Engine; clamping and headroom as in modded-nanogpt.
"""

from functools import cache
from typing import NamedTuple

import torch

from .device import interpreted, jit, tl, triton, unavailable_reason
from .launch import Config, launch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Activations and gradients may grow by at least these factors before they are clamped; rounding a scale leaves up to
# twice as much. Headroom costs range only at the small end: e4m3 keeps 2^13 of its 2^15, e5m2 2^24 of its 2^30.
HEADROOM = 2.0, 32.0
DECAY = 0.98  # of the peak per micro-step: a single large value is half forgotten after 35
# Scales of activations and gradients without an amax so far, for example of gradients if the first batch had no targets
# or the layers were frozen. They cover activations up to 448, and gradients from 1e-10 to 0.05.
UNMEASURED = 1.0, 2.0**20
MIN_CAPABILITY = (8, 9)  # Ada, the first with matmuls in FP8


@jit
def power_of_two(largest, peak):
    """
    Returns the largest power of two that scales peak to at most `largest`, or 1 if peak is 0, infinite or NaN. All
    float32.
    """
    usable = (peak > 0) & (peak < float('inf'))
    scale = tl.minimum(tl.maximum(largest / tl.where(usable, peak, 1.0), 2.0**-60), 2.0**60)
    scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # the exponent alone
    return tl.where(usable, scale, 1.0)


@jit
def magnitude(x):
    """Returns |x| of float32 x as int32 in the same order, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def as_fp8(x, scale, dtype: tl.constexpr):
    """Returns float32 x * scale in an fp8 dtype, clamped. NaN stays NaN."""
    largest: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
    return tl.clamp(x * scale, -largest, largest, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@jit
def record(slot_ptr, amax):
    """
    Raises the slot's amax to this one, a magnitude(). Most programs find a higher one there and skip the atomic.
    """
    ptr = (slot_ptr + 2).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(ptr, amax, mask=amax > tl.load(ptr), sem='relaxed')


@jit
def update_kernel(
    state_ptr,  # (slots + 1, 4) float32, see Scales
    slots,
    activation_headroom: tl.constexpr,
    gradient_headroom: tl.constexpr,
    decay: tl.constexpr,
    unmeasured_activation: tl.constexpr,
    unmeasured_gradient: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.arange(0, BLOCK)
    live, gradient = slot < slots, slot % 2 == 1
    ptr = state_ptr + slot * 4
    scale, amax = tl.load(ptr + 1, mask=live, other=0.0), tl.load(ptr + 2, mask=live, other=0.0)
    peak, largest = tl.load(ptr + 3, mask=live, other=0.0), tl.where(gradient, 57344.0, 448.0)
    headroom = tl.where(gradient, gradient_headroom, activation_headroom)
    # the scale is 0 after the micro-step that only measured; NaN is not <=
    clamped = tl.max(tl.where((scale == 0) | (amax * scale <= largest), 0.0, 1.0), 0)
    tl.store(state_ptr + slots * 4, tl.load(state_ptr + slots * 4) + clamped)
    usable = (amax > 0) & (amax < float('inf'))  # otherwise keep the peak, and with it the scale
    peak = tl.where(usable, tl.maximum(amax, peak * decay), peak)
    scale = power_of_two(largest, peak * headroom)
    scale = tl.where(peak > 0, scale, tl.where(gradient, unmeasured_gradient, unmeasured_activation))
    tl.store(ptr, 1.0 / scale, mask=live)
    tl.store(ptr + 1, scale, mask=live)
    tl.store(ptr + 2, tl.zeros((BLOCK,), tl.float32), mask=live)
    tl.store(ptr + 3, peak, mask=live)


@jit
def quantize_kernel(x_ptr, slot_ptr, q_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: size may pass 2^31
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(q_ptr + at, as_fp8(x, tl.load(slot_ptr + 1), q_ptr.dtype.element_ty), mask=at < size)
    record(slot_ptr, tl.max(magnitude(x), 0))


@jit
def quantize_weight_kernel(
    w_ptr,  # (OUT, IN) contiguous
    amax_ptr,  # (1,), in the dtype of w
    inverse_scale_ptr,  # (1,) float32, written: 1 / scale
    rows_ptr,  # (OUT, IN) e4m3, written
    columns_ptr,  # (IN, OUT) e4m3, written
    OUT,
    IN,
    BLOCK: tl.constexpr,
):
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    into = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (out < OUT)[:, None] & (into < IN)[None, :]
    w = tl.load(w_ptr + out.to(tl.int64)[:, None] * IN + into[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = power_of_two(448.0, tl.load(amax_ptr).to(tl.float32))
    q = as_fp8(w, scale, rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + out.to(tl.int64)[:, None] * IN + into[None, :], q, mask=mask)
    # read q back to transpose it: ptxas 12.8 (Triton 3.6) writes wrong bytes if the same registers are also shuffled
    tl.debug_barrier()
    mask = (into < IN)[:, None] & (out < OUT)[None, :]
    q = tl.load(rows_ptr + out.to(tl.int64)[None, :] * IN + into[:, None], mask=mask)
    tl.store(columns_ptr + into.to(tl.int64)[:, None] * OUT + out[None, :], q, mask=mask)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse_scale_ptr, 1.0 / scale)


class Scales:
    """
    The scales of a model's activations (even slots, e4m3) and gradients (odd slots, e5m2). resume.load_rank_state
    describes save(), load() and log().

    state: float32 (slots + 1, 4) on the model's device, None before the first micro-step. The row of a slot holds 1 /
    scale, scale, the amax of this micro-step so far, and the peak, a decaying maximum of the amax of earlier ones. The
    last row starts with the number of micro-steps in which values were clamped. Each rank scales the tensors of its own
    batches, without communication.
    """

    def __init__(self, slots: int):
        self.slots, self.state = slots, None
        self.on = False  # whether the current micro-step quantizes or measures
        self.measuring = False  # whether it only measures, and computes in bfloat16, as the first one does
        self.loaded = None  # state from a checkpoint
        self.lost = False  # whether a checkpoint lacked it

    def begin(self, device: torch.device, on: bool):
        """Updates the scales. Call it at the start of each forward. on: the micro-step trains in FP8."""
        self.on = on
        if not on:
            return
        if self.lost:
            print('the checkpoint has no FP8 scales for this model and number of ranks: they are measured again')
            self.lost = False
        if self.state is None:
            self.state, self.loaded = self.loaded, None
        self.measuring = self.state is None
        if self.measuring:
            self.state = torch.zeros((self.slots + 1, 4), device=device)
            return
        self.state = self.state.to(device)  # the model may have moved to another GPU
        constants = *HEADROOM, DECAY, *UNMEASURED, triton.next_power_of_2(self.slots)
        launch(update_kernel, (1,), (self.state,), (self.slots,), constants, Config(1, 0, 4))

    def save(self) -> dict:
        """Returns {'model': a copy of the state}, or {} before the first micro-step."""
        state = self.loaded if self.state is None else self.state.clone()
        return {} if state is None else {'model': state}

    def load(self, saved: dict):
        """
        Takes the state from this rank's entry in a checkpoint. If there is none, or it is not finite or belongs to
        another model, the next micro-step prints a line and measures again.
        """
        state = saved.get('model')
        fits = state is not None and state.shape == (self.slots + 1, 4) and state.dtype == torch.float32
        fits = fits and bool(state[:, [0, 1, 3]].isfinite().all() and (state[:-1, :2] >= 0).all())
        self.state, self.loaded, self.lost = None, state.cpu().clone() if fits else None, not fits

    def log(self) -> dict:
        """
        Returns {'fp8_clamped': number of micro-steps in which this rank clamped a value}. Waits for the GPU.
        """
        return {'fp8_clamped': 0 if self.state is None else int(self.state[-1, 0].item())}


class Slot(NamedTuple):
    """The place of one activation or gradient in Scales."""

    scales: Scales
    number: int

    @property
    def row(self):
        """(4,) float32, see Scales; aligned to 16 bytes."""
        return self.scales.state[self.number]

    def empty_like(self, x):
        """Returns an uninitialized fp8 tensor of the shape of x, in the format of this slot."""
        return torch.empty(x.shape, dtype=E5M2 if self.number % 2 else E4M3, device=x.device)


class Quantized(NamedTuple):
    q: torch.Tensor  # fp8
    inverse_scale: torch.Tensor  # () float32: 1 / scale
    version: int = 0  # PyTorch's count of in-place changes of the tensor, when this was attached to it


def move(x, y):
    """Moves the fp8 form attached to x to y, which has the same elements in another shape."""
    if 'fp8' in vars(x):
        y.fp8 = vars(x).pop('fp8')


def attach(x, q, slot):
    """Attaches q, the fp8 form of x from the kernel that wrote x, for the matmul that takes x next; see quantize()."""
    x.fp8 = Quantized(q, slot.row[0], x._version)


def quantize(x, slot):
    """
    Returns x, bfloat16 and contiguous, as Quantized. Takes the form that attach() left. Without one, or if a hook has
    changed x in place since then, a kernel quantizes x.
    """
    ready = vars(x).pop('fp8', None)  # removed, so that it is freed before x
    if ready is not None and ready.version == x._version:
        return ready
    q, block = slot.empty_like(x), 65536 if interpreted else 4096
    if x.numel() > 0:
        launch(
            quantize_kernel, (-(-x.numel() // block),), (x, slot.row, q), (x.numel(),), (block,), Config(1, block, 4)
        )
    return Quantized(q, slot.row[0])


class QuantizedWeight(NamedTuple):
    rows: torch.Tensor  # (out, in) e4m3
    columns: torch.Tensor  # (in, out) e4m3: the transposed copy that the gradient's matmul needs
    inverse_scale: torch.Tensor  # () float32


def quantize_weight(weight):
    """Returns a weight (out, in) as QuantizedWeight, with the scale that fits its amax."""
    weight = weight.detach().contiguous()
    (out, into), device = weight.shape, weight.device
    rows, columns = (torch.empty(shape, dtype=E4M3, device=device) for shape in ((out, into), (into, out)))
    amax, inverse_scale = torch.linalg.vector_norm(weight, float('inf')), torch.empty((), device=device)
    block = min(1024, triton.next_power_of_2(max(out, into))) if interpreted else 64
    grid = -(-out // block), -(-into // block)
    tensors = weight, amax, inverse_scale, rows, columns
    launch(quantize_weight_kernel, grid, tensors, (out, into), (block,), Config(1, block, 4))
    return QuantizedWeight(rows, columns, inverse_scale)


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why FP8 cannot replace matmuls in dtype on the device, in words, or None if it can."""
    reason = unavailable_reason(device)
    if reason is None and dtype != torch.bfloat16:
        reason = f'it takes the place of bfloat16, and this run is in {str(dtype).removeprefix("torch.")}'
    if reason is None and device.type == 'cuda' and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        have, need = ('.'.join(map(str, c)) for c in (torch.cuda.get_device_capability(device), MIN_CAPABILITY))
        reason = f'{torch.cuda.get_device_name(device)} has compute capability {have}, FP8 needs {need}'
    return reason
