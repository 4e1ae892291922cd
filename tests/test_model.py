"""The reference model: its parameters, their initialization, and its outputs."""

import contextlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig

TINY = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)


def test_initial_weights_are_drawn_in_upstreams_order():
    """
    Replays the generator by hand: what the modules' constructors draw, then _init_weights, then the scaled projections.
    """
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**TINY, bias=True))
    V, T, C = TINY['vocab_size'], TINY['block_size'], TINY['n_embd']
    linears = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]  # c_attn, c_proj, c_fc, c_proj of a block
    torch.manual_seed(1337)
    torch.empty(V, C).normal_()
    torch.empty(T, C).normal_()
    for out_features, in_features in linears * 2:
        torch.nn.init.kaiming_uniform_(torch.empty(out_features, in_features), a=math.sqrt(5))
        torch.empty(out_features).uniform_()
    torch.nn.init.kaiming_uniform_(torch.empty(V, C), a=math.sqrt(5))
    torch.empty(V, C).normal_(0, 0.02)  # wte, which lm_head, the same matrix, overwrites
    wpe = torch.empty(T, C).normal_(0, 0.02)
    blocks = [torch.empty(shape).normal_(0, 0.02) for shape in linears * 2]
    head = torch.empty(V, C).normal_(0, 0.02)
    projections = [torch.empty(linears[i % 4]).normal_(0, 0.02 / math.sqrt(4)) for i in (1, 3, 5, 7)]
    assert torch.equal(model.transformer.wpe.weight, wpe)
    assert torch.equal(model.lm_head.weight, head) and model.lm_head.weight is model.transformer.wte.weight
    for i, block in enumerate(model.transformer.h):
        assert torch.equal(block.attn.c_attn.weight, blocks[4 * i]) and torch.equal(
            block.mlp.c_fc.weight, blocks[4 * i + 2]
        )
        assert torch.equal(block.attn.c_proj.weight, projections[2 * i]) and torch.equal(
            block.mlp.c_proj.weight, projections[2 * i + 1]
        )
        assert (block.ln_1.weight == 1).all() and (block.ln_1.bias == 0).all() and (block.attn.c_attn.bias == 0).all()


def test_parameter_names_are_upstreams():
    block = [
        'ln_1.weight',
        'attn.c_attn.weight',
        'attn.c_proj.weight',
        'ln_2.weight',
        'mlp.c_fc.weight',
        'mlp.c_proj.weight',
    ]
    names = [
        'transformer.wte.weight',
        'transformer.wpe.weight',
        *[f'transformer.h.{i}.{name}' for i in range(2) for name in block],
        'transformer.ln_f.weight',
    ]
    assert [name for name, _ in GPT(GPTConfig(**TINY, bias=False)).named_parameters()] == names


def test_gpt2_has_the_known_number_of_parameters(capsys):
    with torch.device('meta'):
        model = GPT(GPTConfig(bias=False))
        # the number that transformers reports for gpt2
        assert GPT(GPTConfig(vocab_size=50257)).get_num_params(non_embedding=False) == 124_439_808
    assert 'number of parameters: 123.59M' in capsys.readouterr().out
    assert model.get_num_params(non_embedding=False) == 124_373_760


def test_forward_equals_a_plain_implementation():
    """
    Attention and GELU written out, in float64 from the same weights; float32's rounding through two blocks stays below
    1e-5.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, bias=True)).eval()
    for p in model.parameters():  # a weight of 1 or 0 could hide that it is missing
        p.data += 0.1 * torch.randn_like(p)
    w = {k: v.double() for k, v in model.state_dict().items()}
    idx = torch.randint(40, (3, 16))

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f'{name}.weight'] + w[f'{name}.bias']

    def linear(x, name):
        return x @ w[f'{name}.weight'].T + w[f'{name}.bias']

    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight']
    for i in range(2):
        h = f'transformer.h.{i}'
        q, k, v = (
            t.view(3, 16, 2, 16).transpose(1, 2)
            for t in linear(norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn').split(32, dim=2)
        )
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 16, 32), f'{h}.attn.c_proj')
        y = linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')
        x = x + linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), f'{h}.mlp.c_proj')
    expected = norm(x, 'transformer.ln_f') @ w['lm_head.weight'].T
    targets = torch.randint(40, (3, 16))
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    assert (logits - expected).abs().max() < 1e-5
    picked = expected.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][targets >= 0]
    assert abs(loss + picked.mean()) < 1e-5
    last, none = model(idx)
    assert none is None and torch.allclose(last, logits[:, -1:], atol=1e-6)


def test_activation_checkpointing_changes_no_bit():
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**TINY, dropout=0.2, activation_checkpointing=flag))
        loss = model(torch.randint(40, (3, 16)), torch.randint(40, (3, 16)))[1]
        loss.backward()
        results.append([loss.detach(), torch.rand(1), *[p.grad for p in model.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_matrices_decay():
    optimizer = GPT(GPTConfig(**TINY, bias=True)).configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    matrices, vectors = optimizer.param_groups
    assert (
        matrices['weight_decay'] == 0.1
        and all(p.dim() == 2 for p in matrices['params'])
        and len(matrices['params']) == 2 + 4 * 2
    )
    assert (
        vectors['weight_decay'] == 0.0
        and all(p.dim() == 1 for p in vectors['params'])
        and len(vectors['params']) == 8 * 2 + 2
    )


def test_generate():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY)).eval()
    start = torch.randint(40, (2, 3))
    text = model.generate(start, 30, temperature=0)  # longer than block_size
    assert text.shape == (2, 33) and torch.equal(text[:, :3], start)
    for t in (3, 20, 32):
        assert torch.equal(text[:, t], model(text[:, max(0, t - 16) : t])[0][:, -1].argmax(-1))
    assert torch.equal(model.generate(start, 5, top_k=1), text[:, :8])  # only the likeliest is left
    allowed = model(start)[0][:, -1].topk(4).indices
    for _ in range(20):
        drawn = model.generate(start, 1, top_k=4)[:, -1]
        assert all(token in row for token, row in zip(drawn, allowed, strict=True))


def test_crop_block_size():
    model = GPT(GPTConfig(**TINY))
    before = model.transformer.wpe.weight.clone()
    model.crop_block_size(8)
    assert (
        torch.equal(model.transformer.wpe.weight, before[:8])
        and model.transformer.wpe.weight.untyped_storage().nbytes() == 8 * 32 * 4
    )
    with pytest.raises(AssertionError, match='does not fit block_size=8'):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_samples_in_float16_at_any_temperature():
    model = GPT(GPTConfig(**TINY, bias=True)).half().eval()
    with torch.no_grad():
        model.lm_head.weight *= 100  # logits as large as a trained model's
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 3, temperature=1e-4).shape == (1, 4)


def test_mfu_counts_flops_as_palm_does():
    with torch.device('meta'):
        model = GPT(GPTConfig(bias=False))
    flops = (6 * 123_587_328 + 12 * 12 * 768 * 1024) * 1024  # a sequence, forward and backward
    assert model.estimate_mfu(8, 2.0, 1e12) == pytest.approx(flops * 8 / 2.0 / 1e12)
    assert model.estimate_mfu(8, 2.0, None) is None


def test_peak_flops(monkeypatch):
    import hardware

    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    for name, dtype, tflops in [
        ('NVIDIA H200', 'bfloat16', 989.4),
        ('NVIDIA H100 80GB HBM3', 'float32', 494.7),
        ('NVIDIA A100-SXM4-80GB', 'float16', 312),
        ('NVIDIA H100 PCIe', 'bfloat16', 756),
        ('NVIDIA GeForce RTX 4090', 'bfloat16', 165.2),
    ]:
        monkeypatch.setattr(hardware, 'device_name', lambda device: name)
        assert hardware.peak_flops('cuda', dtype) == tflops * 1e12
    # near to names in the table, and a slice of a GPU
    for name in (
        'NVIDIA H100',
        'NVIDIA GeForce RTX 4090 Laptop GPU',
        'cpu',
        'NVIDIA A1000',
        'NVIDIA A100-SXM4-40GB MIG 1g.5gb',
    ):
        monkeypatch.setattr(hardware, 'device_name', lambda device: name)
        assert hardware.peak_flops('cuda', 'bfloat16') is None
    assert hardware.peak_flops('cpu', 'bfloat16', peak_tflops=2) == 2e12


@pytest.mark.parametrize(
    'own',
    [{}, {'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:False'}, {'PYTORCH_ALLOC_CONF': 'max_split_size_mb:512'}],
)
def test_gpu_memory_is_in_segments_that_grow(monkeypatch, own):
    """Unless the user has configured the allocator. On a GPU, also checks the allocator's own state."""
    import hardware

    environ = {name: value for name, value in os.environ.items() if not name.endswith('ALLOC_CONF')} | own
    if torch.cuda.is_available():
        code = 'import torch, hardware; hardware.resolve_auto("cuda", "auto", "auto", "auto"); '
        code += 'torch.ones(1, device="cuda"); '
        code += 'print(torch.cuda.memory_snapshot()[0]["is_expandable"])'
        run = subprocess.run(
            [sys.executable, '-c', code],
            env=environ,
            cwd=os.path.dirname(hardware.__file__),
            capture_output=True,
            text=True,
        )
        assert run.stdout == f'{not own}\n', run
        return
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(os, 'environ', environ)
    hardware.resolve_auto('cuda', 'float32', False, 'gloo')
    set_up = {name: value for name, value in environ.items() if name.endswith('ALLOC_CONF')}
    assert set_up == (own or {'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True'})


def test_from_pretrained(monkeypatch):
    """
    A transformers GPT-2 with random weights, by way of from_pretrained: equal logits to 1e-4. Random weights are small,
    so the two GELUs are the same here: nanoGPT's is exact, GPT-2's an approximation of it.
    """
    transformers = pytest.importorskip('transformers', reason='the test extra brings it')
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=32, vocab_size=100, n_embd=64, n_layer=3, n_head=4)
    hf = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if name.endswith('bias'):
                p.normal_(0, 0.02)
    monkeypatch.setattr(transformers.GPT2LMHeadModel, 'from_pretrained', classmethod(lambda cls, name: hf))
    model = GPT.from_pretrained('gpt2', dict(dropout=0.1)).eval()
    assert model.config.dropout == 0.1 and model.config.bias
    idx = torch.randint(100, (2, 32))
    ours = F.log_softmax(model(idx, idx)[0], dim=-1)
    theirs = F.log_softmax(hf(idx).logits, dim=-1)
    assert (ours - theirs).abs().max() < 1e-4


def test_what_is_recorded_as_a_cuda_graph(monkeypatch):
    """By default a run on GPUs captures if possible; a failure has a message that says what to do."""
    import cuda_graph
    from errors import UserError

    def use(wanted, world_size=1, device='cuda:0', **flags):
        offload = flags.pop('cpu_offload', False)
        config = dict(cuda_graph=wanted, device=device, dropout=0.1, backend='nccl') | flags
        return cuda_graph.resolve_cuda_graph(config, world_size, offload)

    assert use('auto') is True and use(False) is False and use(True, world_size=4) is True
    assert use('auto', world_size=2) is True and use('auto', device='cpu') is False
    assert use('auto', world_size=2, cpu_offload=True) is False and use('auto', cpu_offload=True) is True
    assert use('auto', world_size=2, backend='gloo') is False and use('auto', backend='gloo') is True
    assert (
        use('auto', activation_checkpointing=True) is False
        and use('auto', activation_checkpointing=True, dropout=0.0) is True
    )
    for flags, message in (
        (dict(device='cpu'), 'needs a CUDA device'),
        (dict(activation_checkpointing=True), 'dropout under activation_checkpointing is not supported'),
        (dict(world_size=2, backend='gloo'), 'over NCCL only'),
        (dict(world_size=2, cpu_offload=True), 'cuda_graph=True with CPU offload, .* is not supported'),
    ):
        with pytest.raises(UserError, match=message):
            use(True, **flags)
    with pytest.raises(UserError, match="cuda_graph is 'maybe'"):
        use('maybe')

    @contextlib.contextmanager
    def refuse(*args, **kwargs):
        try:
            yield
        finally:
            raise RuntimeError('capture was invalidated')

    def reads_on_the_cpu(x, y):
        raise RuntimeError('not permitted when stream is capturing\nand much more')

    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: None)
    monkeypatch.setattr(torch.cuda, 'graph', refuse)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: None)
    monkeypatch.setattr(cuda_graph, 'WARMUP', 0)
    with pytest.raises(UserError, match=r'\(not permitted when stream is capturing\): train with --cuda_graph=False'):
        cuda_graph.MicroStep(reads_on_the_cpu, torch.nn.Linear(1, 1), capture=True)(torch.zeros(1), torch.zeros(1))

    def interrupted(x, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda_graph.MicroStep(interrupted, torch.nn.Linear(1, 1), capture=True)(torch.zeros(1), torch.zeros(1))
