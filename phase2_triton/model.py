"""
A GPT language model, all of it in this file.

The architecture is GPT-2's (Radford et al. 2019; weights and TensorFlow code: github.com/openai/gpt-2): learned
position embeddings, LayerNorm before attention and MLP, GELU, and an output layer that shares its weight with the token
embedding. Parameter names, shapes and the order of random initialization are nanoGPT's, so checkpoints and losses are
interchangeable.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from kernels.attention import causal_attention
from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.decode import decode_step
from kernels.device import announce_triton
from kernels.embedding import embeddings
from kernels.fp8_linear import begin_fp8, layer_of, prepare_fp8, release_weights
from kernels.linear import autocast_dtype
from kernels.modules import AddLayerNorm, Gelu, Linear


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        # query, key and value of all heads in one matmul
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias, use_triton=config.use_triton)
        # output projection, back into the residual stream
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias, use_triton=config.use_triton)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        self.use_triton = config.use_triton

    def forward(self, x):
        # each token attends to itself and to earlier tokens; the (B, nh, T, T) matrix is never written to memory
        y = causal_attention(self.c_attn(x), self.n_head, self.dropout if self.training else 0.0, self.use_triton)
        return self.resid_dropout(self.c_proj(y))


GELU = {'erf': 'none', 'tanh': 'tanh'}  # GPTConfig's gelu -> PyTorch's approximate


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias, use_triton=config.use_triton)
        self.gelu = Gelu(approximate=GELU[config.gelu], use_triton=config.use_triton)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias, use_triton=config.use_triton)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = AddLayerNorm(config.n_embd, bias=config.bias, use_triton=config.use_triton)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = AddLayerNorm(config.n_embd, bias=config.bias, use_triton=config.use_triton)
        self.mlp = MLP(config)

    def forward(self, x, branch=None):
        # the LayerNorm after a branch adds its result to the residual stream x, in the same kernel
        x, y = self.ln_1(x, branch)
        x, y = self.ln_2(x, self.attn(y))
        return x, self.mlp(y)


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linears and LayerNorms, as in GPT-2; False is slightly better and faster
    gelu: str = 'erf'  # erf, or tanh as in OpenAI's GPT-2; stored in a checkpoint's config, not in its model_args
    # the fields below change how the model is computed: they are flags of every script and not part of a checkpoint
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, more time
    use_triton: bool = True  # compute with the Triton kernels in kernels/, where they can run
    half_residual: bool = False  # keep the residual stream in 16 bits: faster, slightly less exact; needs use_triton
    loss_rows: int = 0  # tokens whose logits exist at a time in training: less memory, slower; 0: all; needs use_triton
    fp8: bool = False  # 8-bit matmuls: faster on an H200; higher loss in a run of 1.5B; needs use_triton


class GPT(nn.Module):
    decode_step = decode_step  # kernels for kv_cache.py

    def __init__(self, config):
        super().__init__()
        self.config = config

        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=AddLayerNorm(config.n_embd, bias=config.bias, use_triton=config.use_triton),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: Press & Wolf 2016, arxiv.org/abs/1608.05859

        self.apply(self._init_weights)
        # GPT-2 scales the projections into the residual stream by 1/sqrt(number of additions)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

        self.rank_state = prepare_fp8(self)  # with fp8 the scales of this rank, which resume.py saves, else None
        print(f'number of parameters: {self.get_num_params() / 1e6:.2f}M')

    def get_num_params(self, non_embedding=True):
        """
        Returns the number of parameters, by default without the position embeddings. The token embeddings count,
        because they are also the output layer.
        """
        n_params = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n_params -= self.transformer.wpe.weight.numel()
        return n_params

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None):
        """
        Returns (logits, loss) for idx, int64 tokens (B, T) with T <= block_size. With targets (B, T; -1 is ignored):
        logits (B, T, vocab_size), or None in training with use_triton, and the mean cross-entropy in nats. Without: the
        last position's logits (B, 1, vocab_size) and None.
        """
        self.announce_kernels(idx.device)
        B, T = idx.size()
        assert T <= self.config.block_size, f'a sequence of {T} tokens does not fit block_size={self.config.block_size}'
        wte, wpe, use_triton = self.transformer.wte.weight, self.transformer.wpe.weight, self.config.use_triton
        dtype = autocast_dtype(wte) if self.config.half_residual and use_triton else None
        begin_fp8(self, idx.device, autocast_dtype(wte) or wte.dtype)
        x = self.transformer.drop(embeddings(idx, wte, wpe, dtype, use_triton))  # (B, T, n_embd)
        branch = None
        for block in self.transformer.h:
            if self.config.activation_checkpointing and self.training:
                x, branch = activation_checkpoint(
                    block, x, branch, use_reentrant=False, preserve_rng_state=self.config.dropout > 0
                )
            else:
                x, branch = block(x, branch)
        _, x = self.transformer.ln_f(x, branch)

        if targets is not None and self.training and self.config.use_triton:
            # without logits as a result, their gradient can take their place
            head, rows = self.lm_head, self.config.loss_rows
            tied = head.weight is wte
            return None, linear_cross_entropy(x, head.weight, targets, tied=tied, chunk_rows=rows, layer=layer_of(head))
        if targets is not None:
            logits = self.lm_head(x)
            entropy = cross_entropy if self.config.use_triton else F.cross_entropy
            loss = entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, -1:, :])  # the slice keeps the time dimension
            loss = None

        return logits, loss

    def announce_kernels(self, device):
        """Prints, once, whether Triton's kernels compute the model on this device. Returns whether they do."""
        return announce_triton(self.config.use_triton, device)

    def release_graph_state(self):
        """Drops the rounded weights that the kernels keep in CUDA graphs' memory; MicroStep.release() calls it."""
        release_weights(self)

    def compile(self, *args, **kwargs):
        """Compiles the model, unless its kernels run: they are opaque to torch.compile and leave it nothing to fuse."""
        if self.announce_kernels(self.lm_head.weight.device):
            print('not compiled after all: the kernels leave nothing to compile')
        else:
            super().compile(*args, **kwargs)

    def crop_block_size(self, block_size):
        """Reduces block_size, the longest sequence that the model accepts, for instance of a pretrained model."""
        assert block_size <= self.config.block_size, (
            f"block_size {block_size} is more than the model's {self.config.block_size}"
        )
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight.data[:block_size].clone())

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """
        Returns GPT-2 with OpenAI's weights, loaded through Hugging Face transformers: gpt2 (124M), gpt2-medium (350M),
        gpt2-large (774M) or gpt2-xl (1558M). override_args may set the fields of GPTConfig that do not change the
        weights, such as dropout.
        """
        from transformers import GPT2LMHeadModel

        print(f'loading weights from pretrained gpt: {model_type}')
        model_hf = GPT2LMHeadModel.from_pretrained(model_type)
        hf = model_hf.config
        model = cls(
            GPTConfig(
                block_size=hf.n_positions,
                vocab_size=hf.vocab_size,
                n_layer=hf.n_layer,
                n_head=hf.n_head,
                n_embd=hf.n_embd,
                bias=True,
                **(override_args or {}),
            )
        )
        weights = model_hf.state_dict()
        for name, p in model.state_dict().items():
            # transformers stores these (two are named c_proj) as (in, out); nn.Linear expects (out, in)
            transposed = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            p.copy_(weights[name].t() if transposed else weights[name])
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """
        Returns AdamW. Matrices (matmul weights and embeddings) decay, vectors (biases and LayerNorm weights) do not.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        decay_params = [p for p in params if p.dim() >= 2]
        nodecay_params = [p for p in params if p.dim() < 2]
        optim_groups = [
            {'params': decay_params, 'weight_decay': weight_decay},
            {'params': nodecay_params, 'weight_decay': 0.0},
        ]
        print(
            f'num decayed parameter tensors: {len(decay_params)}, '
            f'with {sum(p.numel() for p in decay_params):,} parameters'
        )
        print(
            f'num non-decayed parameter tensors: {len(nodecay_params)}, '
            f'with {sum(p.numel() for p in nodecay_params):,} parameters'
        )
        fused = device_type == 'cuda'  # one kernel for all parameters instead of several for each
        print(f'using fused AdamW: {fused}')
        return torch.optim.AdamW(optim_groups, lr=learning_rate, betas=betas, **(dict(fused=True) if fused else {}))

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """
        Returns the model FLOPs utilization: the fraction of the device's peak_flops (FLOP/s; None if unknown) achieved
        by fwdbwd_per_iter forward and backward passes over block_size tokens in dt seconds. FLOPs are counted as in
        PaLM, appendix B (arxiv.org/abs/2204.02311).
        """
        if peak_flops is None:
            return None
        cfg = self.config
        flops_per_token = 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """
        Continues idx (int64 (B, T)) by max_new_tokens tokens, each drawn from the top_k likeliest (None: all) and fed
        back in. temperature < 1 sharpens the distribution, 0 always picks the likeliest. Call model.eval() first.
        """
        for _ in range(max_new_tokens):
            idx_cond = idx[:, -self.config.block_size :]  # the last block_size tokens
            logits, _ = self(idx_cond)
            logits = logits[:, -1, :].float()
            if temperature < 1e-10:  # dividing by it would overflow
                idx_next = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
                    logits[logits < kth] = -float('inf')
                idx_next = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx
