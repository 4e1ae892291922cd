"""
The decode step of sampling (kv_cache.py) in five kernels per block. A step computes one token per sample, so its
matmuls take as long as reading their weights, and launching a kernel takes longer than that. Each kernel therefore
includes the operations around its matmul:

    qkv = layer_norm(x) @ c_attn          y = attention(qkv, cached keys and values)          x += y @ c_proj
    h = gelu(layer_norm(x) @ c_fc)        x += h @ c_proj

On Hopper and later, a kernel starts while the one before it drains, and reads its weights meanwhile. The residual
stream x is float32; matmuls round their inputs to the dtype of the weights and sum in float32.
"""

import torch

from .device import available, interpreted, jit, programmatic_launch, tl, triton
from .embedding import embeddings
from .gelu import normal, sigmoid
from .launch import Config, launch

WARPS = 4
COLS, CHUNK = (256, 128) if interpreted else (WARPS, 128)  # a warp computes a column of y from tiles of 128
KEYS = 256  # keys that attention reads at a time
MAX_SAMPLES = 4  # on an H200, 124M: a step takes 482 µs for 4, PyTorch's kernels 668; for 16 samples 1,377 and 710


@jit
def gemv_kernel(
    x_ptr,  # (B, K)
    norm_weight_ptr,  # (K,), not read unless NORM
    norm_bias_ptr,  # (K,), not read unless NORM and HAS_NORM_BIAS
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,), not read unless HAS_BIAS
    y_ptr,  # (B, N)
    B,
    N,
    eps,
    K: tl.constexpr,
    COLS: tl.constexpr,  # columns of y for a program: one for each warp, so that sums never leave a warp
    CHUNK: tl.constexpr,  # columns of x in a tile
    NORM: tl.constexpr,  # normalize x?
    HAS_NORM_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,  # 'none', 'tanh', or '' for no GELU
    ADD: tl.constexpr,  # add to y instead of writing it?
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    weights = ()
    for c in tl.static_range(CHUNKS):
        k = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
        rows = weight_ptr + n[:, None].to(tl.int64) * K
        weights = weights + (tl.load(rows + k, mask=(n < N)[:, None] & (k < K), other=0.0),)
    if PDL:  # until here, nothing was read that a kernel before this one writes
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for b in tl.range(tl.program_id(1), B, tl.num_programs(1)):
        x_row = x_ptr + b * K + 0 * n[:, None]  # each warp reads the row itself
        if NORM:
            xs = ()
            for c in tl.static_range(CHUNKS):
                k = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
                xs = xs + (tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32),)
            total = tl.zeros((COLS, CHUNK), tl.float32)
            for c in tl.static_range(CHUNKS):
                total += xs[c]
            mean = (tl.sum(total, 1) / K)[:, None]
            total = tl.zeros((COLS, CHUNK), tl.float32)
            for c in tl.static_range(CHUNKS):
                k = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
                centred = tl.where(k < K, xs[c] - mean, 0.0)
                total += centred * centred
            rstd = tl.math.rsqrt(tl.sum(total, 1) / K + eps)[:, None]
        total = tl.zeros((COLS, CHUNK), tl.float32)
        for c in tl.static_range(CHUNKS):
            k = (c * CHUNK + tl.arange(0, CHUNK))[None, :]
            if NORM:
                each = k + 0 * n[:, None]
                x = (xs[c] - mean) * rstd * tl.load(norm_weight_ptr + each, mask=k < K, other=0.0)
                if HAS_NORM_BIAS:
                    x += tl.load(norm_bias_ptr + each, mask=k < K, other=0.0)
            else:
                x = tl.load(x_row + k, mask=k < K, other=0.0)
            total += weights[c].to(tl.float32) * x.to(weight_ptr.dtype.element_ty).to(tl.float32)
        y = tl.sum(total, 1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        if GELU == 'none':
            cdf, _ = normal(y, weight_ptr.dtype.element_ty == tl.float32)
            y *= cdf
        if GELU == 'tanh':
            cdf, _ = sigmoid(y)
            y *= cdf
        at = y_ptr + b * N + n
        if ADD:
            y += tl.load(at, mask=n < N, other=0.0).to(tl.float32)
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=n < N)


@jit
def attention_kernel(
    qkv_ptr,  # (B, 3, H, D)
    cache_ptr,  # (2, B, H, L, D): keys and values; the new token's are written to it
    position_ptr,  # (1,) int64: the number of tokens in the cache
    y_ptr,  # (B, H, D)
    L,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,  # keys in a tile
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    own = qkv_ptr + b * 3 * H * D + h * D + d
    q = tl.load(own, mask=d < D, other=0.0).to(tl.float32) * scale
    own_k = tl.load(own + H * D, mask=d < D, other=0.0)
    own_v = tl.load(own + 2 * H * D, mask=d < D, other=0.0)
    position = tl.load(position_ptr)
    keys = cache_ptr + (b * H + h) * L * D
    values = keys + (tl.num_programs(0) + 0 * b) * H * L * D  # int64
    tl.store(keys + position * D + d, own_k, mask=d < D)
    tl.store(values + position * D + d, own_v, mask=d < D)
    # softmax in one pass: its largest score so far, the sum of the exponentials, and the weighted values
    largest = tl.sum(q * own_k.to(tl.float32), 0)
    total = largest * 0.0 + 1.0
    y = own_v.to(tl.float32)
    for start in tl.range(0, position, CHUNK):
        t = start + tl.arange(0, CHUNK)
        live = (t < position)[:, None] & (d < D)[None, :]
        k = tl.load(keys + t[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32)
        v = tl.load(values + t[:, None] * D + d[None, :], mask=live, other=0.0).to(tl.float32)
        scores = tl.where(t < position, tl.sum(k * q[None, :], 1), -float('inf'))
        before, largest = largest, tl.maximum(largest, tl.max(scores, 0))
        p = tl.exp(scores - largest)
        shrink = tl.exp(before - largest)
        total = total * shrink + tl.sum(p, 0)
        y = y * shrink + tl.sum(p[:, None] * v, 0)
    tl.store(y_ptr + (b * H + h) * D + d, (y / total).to(y_ptr.dtype.element_ty), mask=d < D)


def gemv(x, weight, bias, y, norm=None, gelu='', add=False):
    """
    Writes y = gelu(norm(x) @ weight.T + bias), or adds it to y; x (B, K), weight (N, K), bias (N,) or None, y (B, N).
    norm: a LayerNorm module, or None for none. gelu: 'none' (its erf form), 'tanh', or '' for none.
    """
    (B, K), N = x.shape, weight.shape[0]
    pdl = programmatic_launch(x.device)
    has_norm_bias = norm is not None and norm.bias is not None
    norm_weight, norm_bias = (weight if norm is None else norm.weight), (norm.bias if has_norm_bias else weight)
    constants = K, COLS, CHUNK, norm is not None, has_norm_bias, bias is not None, gelu, add, pdl
    tensors = x, norm_weight, norm_bias, weight, weight if bias is None else bias, y
    launch(gemv_kernel, (triton.cdiv(N, COLS),), tensors, (B, N, 1e-5), constants, Config(1, CHUNK, WARPS, pdl=pdl))


def attention(qkv, cache, position, y, n_head):
    """
    Writes to y (B, C) the attention of the queries in qkv (B, 3 * C) to their own keys and values and the first
    `position` (int64 (1,)) in cache (2, B, n_head, length, C / n_head). Adds qkv's keys and values to the cache.
    """
    size = y.size(1) // n_head
    config = Config(1, KEYS, 8, pdl=programmatic_launch(y.device))
    constants = n_head, size, triton.next_power_of_2(size), KEYS, config.pdl
    launch(
        attention_kernel, (len(y), n_head), (qkv, cache, position, y), (cache.size(3), size**-0.5), constants, config
    )


class DecodeStep:
    """
    Computes the logits (B, vocab_size) of token (B, 1) at position, an int64 tensor (1,), and adds its keys and values
    to caches, {attention module: (2, B, n_head, length, head size)}. Rounds the weights to the caches' dtype once.
    """

    def __init__(self, model, caches, position):
        self.model, self.caches, self.position = model, caches, position
        self.dtype = next(iter(caches.values())).dtype
        blocks = model.transformer.h
        linears = [
            m for block in blocks for m in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        ]
        self.weights = {
            m: [None if p is None else p.detach().to(self.dtype) for p in (m.weight, m.bias)]
            for m in (*linears, model.lm_head)
        }

    def __call__(self, token):
        t, B = self.model.transformer, len(token)
        wpe = t.wpe.weight.index_select(0, self.position)
        x = embeddings(token, t.wte.weight, wpe, None, True)[:, 0]  # the residual stream (B, C)
        C = x.size(1)
        new = lambda n: torch.empty(B, n, dtype=self.dtype, device=x.device)
        qkv, y, h, logits = new(3 * C), new(C), new(4 * C), new(self.model.config.vocab_size)
        for block in t.h:
            attn, mlp = block.attn, block.mlp
            gemv(x, *self.weights[attn.c_attn], qkv, norm=block.ln_1)
            attention(qkv, self.caches[attn], self.position, y, attn.n_head)
            gemv(y, *self.weights[attn.c_proj], x, add=True)
            gemv(x, *self.weights[mlp.c_fc], h, norm=block.ln_2, gelu=mlp.gelu.approximate)
            gemv(h, *self.weights[mlp.c_proj], x, add=True)
        gemv(x, *self.weights[self.model.lm_head], logits, norm=t.ln_f)
        return logits


def decode_step(model, caches, position):
    """
    Returns a DecodeStep for kv_cache.py, or None if its kernels cannot run or are slower for so many samples. It is a
    method of the model.
    """
    cache, config = next(iter(caches.values())), model.config
    runs = config.use_triton and available(cache.device) and cache.dtype != torch.float64
    return DecodeStep(model, caches, position) if runs and cache.size(1) <= MAX_SAMPLES else None
