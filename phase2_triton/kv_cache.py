"""
Samples with a key-value cache: each step computes only the new token of each sample instead of the whole text.

    text = generate(model, prompt, num_samples=10, max_new_tokens=500, temperature=0.8, top_k=200)

Prefill computes the prompt once and caches the keys and values of its tokens for every sample. Each decode step feeds
the newest token of all samples as a batch; its query attends to the cached keys. On a GPU the step is captured as a
CUDA graph and replayed, because launching its kernels one by one takes longer than running them. Positions are learned,
so the cache is valid for the first block_size tokens. Beyond them, each token recomputes the window of the last
block_size tokens, as model.generate does.

The model is unaware of the cache: during a step, KVCache replaces its attention's forward and its position embeddings.
A model that has kernels for this step, as the one in phase2_triton has, returns them from its method decode_step.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch.func import functional_call
from torch.nn import functional as F

WARMUP = 2  # decode steps before the capture, in which libraries choose kernels


class KVCache:
    """
    Keys and values of num_samples texts of up to max_length tokens: for each attention module a tensor (2, num_samples,
    n_head, length, head_size) in the dtype in which the model computes them.
    """

    def __init__(self, model: torch.nn.Module, num_samples: int, max_length: int):
        device = model.lm_head.weight.device
        self.model, self.num_samples = model, num_samples
        self.length = -(-max_length // 16) * 16  # attention kernels copy a mask whose length is not a multiple of 16
        self.cache = {}  # attention module -> its keys and values
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # position of the next token to decode
        self.positions = torch.arange(self.length, device=device)
        self.mask = None  # (1, length), added to the scores of a step: -inf for positions after the newest token

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        """Computes the prompt (1, T), caches its keys and values, and returns the logits (1, vocab_size) after it."""
        with self.replace_attention(self.attend_to_prompt):
            logits, _ = self.model(prompt)
        self.position.fill_(prompt.size(1))
        return logits[:, -1]

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """
        Computes the token (num_samples, 1) at self.position, caches its keys and values, and returns the logits
        (num_samples, vocab_size). Call it while attend_to_cache replaces the attention.
        """
        later, dtype = self.positions > self.position, next(iter(self.cache.values())).dtype
        self.mask = torch.zeros_like(later, dtype=dtype).masked_fill(later, -float('inf'))[None]
        # the model computes one token, so it reads row 0 of its position embeddings
        row = self.model.transformer.wpe.weight.index_select(0, self.position)
        logits, _ = functional_call(self.model, {'transformer.wpe.weight': row}, (token,), tie_weights=False)
        return logits[:, -1]

    @contextmanager
    def replace_attention(self, attend):
        """Inside this context, each attention module computes attend(module, x)."""
        modules = [block.attn for block in self.model.transformer.h]
        for module in modules:
            module.forward = partial(attend, module)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # restores the method of the class

    def attend_to_prompt(self, attn, x):
        q, kv = self.heads(attn, x)
        self.cache[attn] = kv.new_zeros(2, self.num_samples, kv.size(2), self.length, kv.size(4))
        self.cache[attn][:, :, :, : x.size(1)] = kv  # the same for every sample
        return self.project(attn, F.scaled_dot_product_attention(q, *kv, is_causal=True))

    def attend_to_cache(self, attn, x):
        q, kv = self.heads(attn, x)
        cached = self.cache[attn].index_copy_(3, self.position, kv)
        return self.project(attn, F.scaled_dot_product_attention(q, *cached, attn_mask=self.mask))

    def heads(self, attn, x):
        """
        Returns the query (B, n_head, T, head_size), and key and value (2, B, n_head, T, head_size), of x (B, T,
        n_embd).
        """
        B, T, C = x.shape
        qkv = attn.c_attn(x).view(B, T, 3, attn.n_head, C // attn.n_head).permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1:]

    def project(self, attn, y):
        """Returns the attention's output (B, T, n_embd) for the output y of its heads (B, n_head, T, head_size)."""
        return attn.c_proj(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def cache_supports(model: torch.nn.Module) -> bool:
    """
    Returns whether the cache computes this model's logits, without drawing random numbers. A user's own model.py may
    compute attention in another way, for example with rotary positions. Compares a prefill and a decode step with the
    model itself, in float32, on 16 tokens, so sliding-window attention with a longer window goes unnoticed. The model
    must be in eval mode.
    """
    tokens = torch.arange(min(model.config.block_size, 16), device=next(model.parameters()).device)
    tokens = tokens[None] % model.config.vocab_size
    if tokens.size(1) == 1:
        return True
    try:
        with torch.autocast(tokens.device.type, enabled=False):
            expected = model(tokens)[0][:, -1]
            cache = KVCache(model, 1, tokens.size(1))
            cache.prefill(tokens[:, :-1])
            with cache.replace_attention(cache.attend_to_cache):
                found = cache.decode(tokens[:, -1:])
    except Exception:  # a user's model.py may have other parts or shapes, or kernels without float32
        return False
    # TF32, which GPUs use for float32, is as precise as float16, whose roundings reached 0.6% of the largest logit
    return ((found - expected).abs().max() <= 0.02 * expected.abs().max()).item()


class ReplayedStep:
    """Calls step() WARMUP times, then captures it as a CUDA graph and replays the graph."""

    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, None

    def __call__(self):
        self.calls += 1
        if self.calls <= WARMUP:
            return self.step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # computes nothing
                self.step()
        self.graph.replay()


def draw(logits, temperature, top_k):
    """
    Returns tokens (B,) for logits (B, vocab_size), drawn from the top_k likeliest (None: all); at temperature 0 the
    likeliest. Dividing each probability by an exponentially distributed random number and taking the largest quotient
    picks each token with its probability. torch.multinomial does the same, but its checks cannot be captured as a CUDA
    graph. The quotients are compared by their logarithms, which need no softmax.
    """
    if temperature < 1e-10:  # dividing by it would overflow
        return logits.argmax(dim=-1)
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
    if top_k is None:
        return (logits.float() / temperature - noise.log()).argmax(dim=-1)
    logits, tokens = logits.topk(min(top_k, logits.size(-1)), sorted=False)
    winner = (logits.float() / temperature - noise.gather(-1, tokens).log()).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, winner)[:, 0]


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt: torch.Tensor,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    cuda_graph: bool | None = None,
) -> torch.Tensor:
    """
    Continues the prompt (int64 (1, T)) num_samples times by max_new_tokens tokens and returns int64 (num_samples, T +
    max_new_tokens). temperature and top_k mean the same as in model.generate, and temperature 0 gives the same text.
    The model must be in eval mode. cuda_graph: replay the decode steps as a CUDA graph? None: on a GPU only.
    """
    block_size, length = model.config.block_size, prompt.size(1)
    end = length + max_new_tokens
    text = prompt.new_zeros(num_samples, end)
    text[:, :length] = prompt

    if length <= block_size:
        cache = KVCache(model, num_samples, min(block_size, end))
        text[:, length] = draw(cache.prefill(prompt).expand(num_samples, -1), temperature, top_k)
        length += 1

        decode_kernels = model.decode_step(cache.cache, cache.position) if hasattr(model, 'decode_step') else None
        decode = decode_kernels or cache.decode

        def step():
            logits = decode(text.index_select(1, cache.position))
            cache.position += 1
            text.index_copy_(1, cache.position, draw(logits, temperature, top_k)[:, None])

        if cuda_graph or (cuda_graph is None and text.is_cuda):
            step = ReplayedStep(step)
        with cache.replace_attention(cache.attend_to_cache):
            while length < min(end, block_size + 1):
                step()
                length += 1
    while length < end:
        logits, _ = model(text[:, length - block_size : length])
        text[:, length] = draw(logits[:, -1], temperature, top_k)
        length += 1
    return text
