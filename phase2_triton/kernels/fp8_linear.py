"""
Linear layers whose matmuls run in FP8: y = x W.T from e4m3 x and W, dx = dy W from e5m2 dy and e4m3 W. The results are
bfloat16.

The weight gradient dW = dy.T x is computed as in linear.py, from the bfloat16 dy and x. The forward uses the tensor
cores' fast accumulation, which has fewer bits than float32. The input gradients use accurate accumulation, because
small gradients need the bits.

Under FSDP, each rank quantizes the gathered weights, so all ranks have the same scales. It does so in every micro-step.
The transposed copies stay in memory from forward to backward, even if FSDP frees the gathered weights in between.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import linear
from .device import answers
from .fp8 import Scales, Slot, quantize, quantize_weight, unsupported_reason
from .linear import ignore_cublaslt_warning, not_a_view, rounded, weight_gradient

# No producer writes attention's output and its packed gradient in fp8, so a separate kernel has to quantize them. With
# 768 columns and 12,288 tokens on an H200, FP8 saves 8 µs of the output's matmul and 19 µs of the gradient's, and the
# kernel takes 5 and 22 µs (fp8_matmuls_h200.json). The savings per element grow with the width, the costs do not.
# Matmuls that need such a kernel run in FP8 from this width, n_embd.
OWN_KERNEL_MIN_WIDTH = 1024


class Layer:
    """How a Linear (out, in) computes. forward, gradient: whether its matmul for y, and for dx, runs in FP8."""

    def __init__(self, scales: Scales, number: int, forward: bool = True, gradient: bool = True):
        self.scales, self.forward, self.gradient = scales, forward, gradient
        self.input_slot, self.gradient_slot = Slot(scales, 2 * number), Slot(scales, 2 * number + 1)


def active(layer):
    """
    Returns the Layer if the current micro-step computes in FP8 or measures for it, otherwise None. None under
    torch.compile.
    """
    return layer if layer is not None and layer.scales.on and not torch.compiler.is_compiling() else None


def slot_of_input(layer):
    """Returns the slot in which the producer of the layer's input should write, or None."""
    return layer.input_slot if active(layer) and layer.forward else None


def slot_of_gradient(layer):
    """Returns the slot in which the producer of the gradient of the layer's output should write, or None."""
    return layer.gradient_slot if active(layer) and layer.gradient else None


def prepare_fp8(model: nn.Module) -> Scales | None:
    """
    Decides which matmuls of a GPT run in FP8 if its config asks for that. Gives each Linear its Layer as the attribute
    `fp8`, and each LayerNorm and GELU the Layers of the Linear that follows, as `fp8`, and of the one whose output it
    reads, as `fp8_before`. Returns the Scales that they share, or None without FP8. FP8 needs sizes that are multiples
    of 16; other layers stay in bfloat16.
    """
    if not (model.config.fp8 and model.config.use_triton):
        return None
    blocks, width, vocabulary = model.transformer.h, model.config.n_embd, model.config.vocab_size
    scales = Scales(2 * (4 * len(blocks) + 1))
    fits, wide = width % 16 == 0, width >= OWN_KERNEL_MIN_WIDTH
    for i, block in enumerate(blocks if fits else ()):
        attention, mlp = block.attn, block.mlp
        block.ln_1.fp8 = attention.c_attn.fp8 = Layer(scales, 4 * i, gradient=wide)
        attention.c_proj.fp8 = Layer(scales, 4 * i + 1, forward=wide)
        block.ln_2.fp8 = mlp.c_fc.fp8 = Layer(scales, 4 * i + 2)
        mlp.gelu.fp8_before = mlp.c_fc.fp8
        mlp.gelu.fp8 = mlp.c_proj.fp8 = Layer(scales, 4 * i + 3)
        if model.config.dropout == 0:  # otherwise LayerNorm's backward writes the gradient of dropout's output
            norm_after = blocks[i + 1].ln_1 if i + 1 < len(blocks) else model.transformer.ln_f
            block.ln_2.fp8_before, norm_after.fp8_before = attention.c_proj.fp8, mlp.c_proj.fp8
    head = fits and vocabulary % 16 == 0 and not model.config.loss_rows
    model.transformer.ln_f.fp8 = model.lm_head.fp8 = Layer(scales, 4 * len(blocks)) if head else None
    return scales


def layer_of(module: nn.Module):
    """Returns the Layer that prepare_fp8() has given a module, or None."""
    return getattr(module, 'fp8', None)


def begin_fp8(model: nn.Module, device: torch.device, dtype: torch.dtype):
    """
    Updates the scales and turns FP8 on in training, otherwise off. Call it at the start of a forward of the model,
    which computes in dtype.
    """
    if model.rank_state:
        compiling = torch.compiler.is_compiling()
        training = model.training and torch.is_grad_enabled()
        on = training and announce_fp8(device, dtype, compiling)
        if not compiling:
            model.rank_state.begin(device, on)


@torch.compiler.assume_constant_result  # called while torch.compile traces, so that the print breaks no graph
def announce_fp8(device: torch.device, dtype: torch.dtype, compiling: bool) -> bool:
    """Prints once whether FP8 replaces dtype on the device, and the reason if not. Returns whether it does."""
    asked, reason = ('fp8', device, dtype, compiling), unsupported_reason(device, dtype)
    if reason is None and compiling:
        reason = 'torch.compile cannot see into its kernels'
    if asked not in answers:
        answers[asked] = f'not using FP8: {reason}' if reason else 'using FP8 in forward and for input gradients'
        print(answers[asked])
    return reason is None


def quantized(weight):
    """Returns quantize_weight(weight). CUDA graphs compute it once per iteration, as in linear.rounded()."""
    if weight.dtype != torch.float32 or not weight.is_leaf or not linear.capturing(weight):
        return quantize_weight(weight)
    kept = getattr(weight, 'quantized', None)
    if weight.grad is None or kept is None:
        kept = weight.quantized = quantize_weight(weight)
    return kept


def release_weights(model: nn.Module):
    """Drops the weights that quantized() and linear.rounded() keep."""
    for p in model.parameters():
        vars(p).pop('rounded', None)
        vars(p).pop('quantized', None)


def forward_matmul(layer, x, weight, bias, dtype):
    """
    Returns x @ weight.T + bias in dtype, bfloat16, for contiguous x (..., in) in dtype, and the weight for the matmul
    of dx: (columns, inverse_scale) of its QuantizedWeight, or (the weight in dtype,).
    """
    in_fp8 = not layer.scales.measuring
    w8 = quantized(weight) if in_fp8 else None
    w = None if in_fp8 and layer.forward and layer.gradient else rounded(weight, dtype)
    bias = None if bias is None else bias.to(dtype)
    q = quantize(x, layer.input_slot) if layer.forward else None
    if q is not None and in_fp8:
        rows = q.q.view(-1, x.shape[-1])
        y = torch._scaled_mm(
            rows, w8.rows.t(), q.inverse_scale, w8.inverse_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
        )
        y = y.view(*x.shape[:-1], len(weight))
    else:
        y = F.linear(x, w, bias)
    return not_a_view(y), (w8.columns, w8.inverse_scale) if in_fp8 and layer.gradient else (w,)


def fp8_input_gradient(q, columns, inverse_scale, dtype):
    """Returns dy @ weight in dtype, for Quantized dy (M, out) and the (columns, inverse_scale) of a QuantizedWeight."""
    return torch._scaled_mm(q.q, columns.t(), q.inverse_scale, inverse_scale, out_dtype=dtype, use_fast_accum=False)


class Fp8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype, layer):
        if x.is_cuda:
            ignore_cublaslt_warning()
        x = x.to(dtype).contiguous()
        y, operands = forward_matmul(layer, x, weight, bias, dtype)
        ctx.save_for_backward(x, *operands)
        ctx.weight, ctx.layer = weight, layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *operands = ctx.saved_tensors
        need_dx, need_dw, need_db, *_ = ctx.needs_input_grad
        layer, dx = ctx.layer, None
        rows = dy.reshape(-1, dy.shape[-1])
        if need_dx:
            q = quantize(dy.contiguous(), layer.gradient_slot) if layer.gradient else None
            if q is not None and len(operands) == 2:
                q = q._replace(q=q.q.view(rows.shape))
                dx = fp8_input_gradient(q, *operands, dy.dtype).view(x.shape)
            else:
                dx = dy @ operands[0]
        dw = weight_gradient(ctx.weight, rows, x.reshape(-1, x.shape[-1])) if need_dw else None
        db = rows.sum(0, dtype=torch.float32) if need_db else None
        return dx, dw, db, None, None


def fp8_linear(x, weight, bias, dtype, layer):
    """Returns linear(x, weight, bias) in dtype, bfloat16, with the matmuls in FP8 that the Layer selects."""
    with torch.autocast(x.device.type, enabled=False):
        return Fp8LinearFunction.apply(x, weight, bias, dtype, layer)
