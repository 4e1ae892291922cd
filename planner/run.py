"""Describes one configuration of train.py on one kind of GPU, with the counts behind memory and speed."""

from dataclasses import dataclass, replace

from planner.gpus import GPU

OWN_KERNEL_MIN_WIDTH = 1024  # columns, as in kernels/fp8_linear.py


@dataclass(frozen=True)
class Run:
    """
    A configuration with resolved `auto` flags. micro_steps: per rank. trainer: ddp, zero1 or fsdp; with one GPU always
    ddp, as in train.py.
    """

    gpu: GPU
    gpus: int
    n_layer: int
    n_head: int
    n_embd: int
    batch_size: int
    block_size: int
    micro_steps: int
    trainer: str = 'ddp'
    vocab_size: int = 50304
    bias: bool = False
    kernels: bool = False  # the Triton model
    half_residual: bool = False
    loss_rows: int = 0
    exponentials: bool = False  # the Triton model's last matmul writes them, so that nothing reads logits
    fp8: bool = False
    compiled: bool = True
    graphs: bool = True
    checkpointing: bool = False
    shard_size: int = 0  # ranks that together hold one copy of the model, under FSDP; 0: all
    min_num_params: int = 1_000_000
    reshard: bool = False  # under FSDP: gather again for the backward
    offload: bool = False
    dropout: bool = False  # not in the formulas: only its absence was measured
    half_bytes: int = 2  # bytes per element that autocast rounds: 4 with --dtype=float32

    def change(self, **fields):
        return replace(self, **fields)

    @property
    def sharded(self):
        return self.trainer == 'fsdp'

    @property
    def path(self):
        """The code that computes the model: kernels (Triton), compiled (torch.compile) or eager."""
        return 'kernels' if self.kernels else 'compiled' if self.compiled else 'eager'

    @property
    def fp8_head(self):
        """Whether FP8 computes the output layer, as fp8_linear.prepare_fp8() decides."""
        return self.fp8 and self.vocab_size % 16 == 0 and not self.loss_rows

    @property
    def fp8_everywhere(self):
        """
        Whether all matmuls of a block run in FP8. Narrow models compute two of the eight in 16 bits: the forward of
        attention's output and the input gradient of query, key and value.
        """
        return self.fp8 and self.n_embd >= OWN_KERNEL_MIN_WIDTH

    @property
    def shards(self):
        """Ranks over which FSDP spreads parameters, gradients and AdamW's state."""
        return (self.shard_size or self.gpus) if self.sharded else 1

    @property
    def block_parameters(self):
        h, bias = self.n_embd, int(self.bias)
        return 12 * h * h + 2 * h + bias * (9 * h + 2 * h)  # matmuls, two LayerNorms, biases of both

    @property
    def root_parameters(self):
        """Embeddings (the output layer is tied to one of them) and the last LayerNorm."""
        return (self.vocab_size + self.block_size + 1 + int(self.bias)) * self.n_embd

    @property
    def parameters(self):
        return self.n_layer * self.block_parameters + self.root_parameters

    @property
    def unit_parameters(self):
        """Parameters of FSDP's largest unit: consecutive blocks with at least min_num_params together."""
        blocks = -(-self.min_num_params // self.block_parameters)
        return min(blocks, self.n_layer) * self.block_parameters

    @property
    def tokens(self):
        """Tokens per micro-step and GPU."""
        return self.batch_size * self.block_size

    @property
    def tokens_per_iter(self):
        return self.tokens * self.micro_steps * self.gpus

    @property
    def flops_per_token(self):
        """FLOPs of forward and backward, counted as for train.py's MFU: PaLM, appendix B (arxiv.org/abs/2204.02311)."""
        without_positions = self.parameters - self.block_size * self.n_embd
        return 6 * without_positions + 12 * self.n_layer * self.n_embd * self.block_size
