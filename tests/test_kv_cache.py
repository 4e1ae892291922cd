"""Sampling with the key-value cache gives the same result as model.generate, only faster."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fake_cuda_graph
import kv_cache
from conftest import NANOGPT, ROOT, TINY, load
from kv_cache import cache_supports, draw, generate
from model import GPT, Block, CausalSelfAttention, GPTConfig


def tiny_model(block_size=16, **options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=65, n_layer=2, n_head=2, n_embd=32, **options)).eval()
    for p in model.parameters():  # large enough that the text depends on all earlier tokens
        p.data += 0.3 * torch.randn_like(p)
    return model


def test_a_thousand_greedy_tokens_across_block_size():
    """
    In float32 the two ways differ by roundings, about 1e-6 of a logit; the likeliest token is never that close to the
    next one here.
    """
    model = tiny_model(block_size=256)
    prompt = torch.randint(65, (1, 5))
    expected = model.generate(prompt, 1000, temperature=0)
    assert len(expected[:, -700:].unique()) > 8  # no text that repeats one token
    assert torch.equal(generate(model, prompt, 2, 1000, temperature=0), expected.expand(2, -1))


@pytest.mark.parametrize('bias, gelu', [(True, 'erf'), (False, 'tanh')])
@pytest.mark.parametrize('prompt, new', [(1, 1), (1, 16), (5, 12), (15, 3), (16, 1), (16, 5), (17, 5), (40, 3)])
def test_prompts_and_lengths_around_block_size(prompt, new, bias, gelu):
    model = tiny_model(bias=bias, gelu=gelu)
    prompt = torch.randint(65, (1, prompt))
    expected = model.generate(prompt, new, temperature=0)
    assert torch.equal(generate(model, prompt, 3, new, temperature=0), expected.expand(3, -1))


def test_one_sample_of_a_seed_is_the_same_text():
    """torch.multinomial draws by the same race."""
    model, prompt = tiny_model(), torch.randint(65, (1, 5))
    for options in (dict(temperature=0.8, top_k=20), dict(temperature=1.5, top_k=500), dict()):
        torch.manual_seed(1)
        expected = model.generate(prompt, 30, **options)
        torch.manual_seed(1)
        assert torch.equal(generate(model, prompt, 1, 30, **options), expected)


def test_tokens_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 30)
    n, top_k = 50_000, 10
    counts = torch.bincount(draw(logits.expand(n, -1), 0.7, top_k), minlength=30)
    kth = logits.topk(top_k).values[0, -1]
    expected = F.softmax(torch.where(logits < kth, -float('inf'), logits) / 0.7, dim=-1)[0]
    assert (counts[expected == 0] == 0).all() and (expected > 0).sum() == top_k
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((counts / n - expected).abs() <= 5 * deviation).all()  # 5 sigma: 1 run of 170,000 for 10 tokens


def test_the_prompt_is_computed_once_and_each_step_one_token():
    model, shapes = tiny_model(), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    samples = generate(model, torch.randint(65, (1, 12)), 4, 8)
    assert shapes == [(1, 12)] + 4 * [(4, 1)] + 3 * [(4, 16)]  # from 17 tokens on: windows of block_size
    assert len({tuple(sample.tolist()) for sample in samples}) == 4


def test_the_model_is_left_as_it_was():
    model, prompt = tiny_model(), torch.randint(65, (1, 5))
    logits = model(prompt)[0]
    generate(model, prompt, 2, 5)
    assert torch.equal(model(prompt)[0], logits)
    model.transformer.h[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(model, prompt, 2, 5)
    del model.transformer.h[1].mlp.forward
    assert torch.equal(model(prompt)[0], logits)


def test_steps_are_replayed_as_a_cuda_graph(monkeypatch):
    """
    With fake_cuda_graph.py, and on a GPU machine with the real ones: the same greedy text, and Python runs for the
    first steps only.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu':
        fake_cuda_graph.install_in_torch(monkeypatch)
    model, calls = tiny_model(block_size=32).to(device), []
    prompt = torch.randint(65, (1, 5), device=device)
    expected = generate(model, prompt, 2, 40, temperature=0, cuda_graph=False)
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0].size(1)))
    assert torch.equal(generate(model, prompt, 2, 40, temperature=0, cuda_graph=True), expected)
    assert calls.count(1) == kv_cache.WARMUP + 1 and calls.count(32) == 12
    drawn = generate(model, prompt, 2, 28, cuda_graph=True)
    assert not torch.equal(drawn[0], drawn[1]) and len(drawn[:, 12:].unique()) > 10  # replays draw new numbers


@pytest.mark.parametrize(
    'old, new, fits',
    [
        ('dim=2)', 'dim=2)\n        q = q * torch.arange(T, device=x.device)[:, None]', False),
        ('self.lm_head', 'self.head', False),
        ('wpe(pos)', 'wpe(pos).mul(2)', True),
    ],
    ids=['attention', 'names', 'positions'],
)
def test_a_model_of_the_users_own(launch, work, old, new, fits):
    """Its greedy text is the same with and without the cache, which is not used for another attention or structure."""
    os.makedirs('mine')
    Path('mine/model.py').write_text((NANOGPT / 'model.py').read_text().replace(old, new))
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=40, bias=True, dropout=0.0)
    weights = {k: torch.randn_like(v) for k, v in GPT(GPTConfig(**args)).state_dict().items()}
    weights['transformer.wte.weight'] = weights['lm_head.weight']
    weights = {k.replace(old[5:], new[5:]) if old == 'self.lm_head' else k: v for k, v in weights.items()}
    os.makedirs('out')
    rest = dict(model_args=args, iter_num=1, best_val_loss=1.0, config={'dataset': 'letters'})
    torch.save({'model': weights, **rest}, 'out/ckpt.pt')
    flags = ['--model_dir=mine', '--start=0', '--num_samples=1', '--max_new_tokens=12', '--temperature=0']
    cached, plain = (launch(NANOGPT / 'sample.py', *flags, f'--kv_cache={cache}').stdout for cache in (True, False))
    note = 'note: sampling without the key-value cache'
    assert (note not in cached) == fits and note not in plain
    assert re.search('^0.{12}$', cached, re.M)[0] in plain


def block_with_a_pair(self, x):
    y, _ = self.attn(self.ln_1(x))
    x = x + y
    return x + self.mlp(self.ln_2(x))


def block_with_its_own_attention(self, x):
    x = x + CausalSelfAttention.forward(self.attn, self.ln_1(x))
    return x + self.mlp(self.ln_2(x))


def attention_with_a_pair(self, x, forward=CausalSelfAttention.forward):
    return forward(self, x), None


def attention_in_16_bits_only(self, x, forward=CausalSelfAttention.forward):
    if self.c_attn(x).dtype == torch.float32:
        raise RuntimeError('only float16 and bfloat16 are supported')
    return forward(self, x)


@pytest.mark.parametrize(
    'cls, forward',
    [
        (Block, block_with_its_own_attention),
        (CausalSelfAttention, attention_in_16_bits_only),
        ((CausalSelfAttention, Block), (attention_with_a_pair, block_with_a_pair)),
    ],
    ids=['another method', '16 bits', 'a pair'],
)
def test_a_model_that_raises_without_its_own_attention(monkeypatch, cls, forward):
    """Whatever such a model raises, sample.py has to sample without the cache instead of ending."""
    model = tiny_model()
    assert cache_supports(model)
    for one, replacement in zip(*((x if isinstance(x, tuple) else (x,)) for x in (cls, forward))):
        monkeypatch.setattr(one, 'forward', replacement)
    assert not cache_supports(model)
    with torch.autocast('cpu', torch.bfloat16):
        assert model(torch.zeros(1, 3, dtype=torch.long))[0].isfinite().all()  # its attention is its own again


def samples_in(out):
    return [text.strip('\n') for text in out.split('M\n', 1)[1].split('---------------')[:-1]]


def test_sample_script(launch, launch_interpreted, work):
    """
    The cache does not change greedy text, nor with the Triton kernels. Without it, sample.py prints what model.generate
    draws with the seed, sample after sample. The speed is on stderr.
    """
    launch(NANOGPT / 'train.py', *TINY, '--max_iters=100', '--lr_decay_iters=100', '--eval_interval=100')
    flags = ['--start=0', '--num_samples=2', '--max_new_tokens=30', '--temperature=0', '--device=cpu']
    run = launch(NANOGPT / 'sample.py', *flags)
    assert re.fullmatch(r'60 tokens in \d+\.\d\d s: [\d,]+ tokens/s\n', run.stderr)
    cached, plain = samples_in(run.stdout), samples_in(launch(NANOGPT / 'sample.py', *flags, '--kv_cache=False').stdout)
    assert cached == plain and cached[0] == cached[1] and len(cached[0]) == 31
    for extra in ([], ['--kv_cache=False']):
        triton = launch_interpreted(ROOT / 'phase2_triton' / 'sample.py', *flags, '--num_samples=1', *extra).stdout
        assert plain[0] in triton

    checkpoint = load('out/ckpt.pt')
    torch.manual_seed(7)
    model = GPT(GPTConfig(**checkpoint['model_args'])).eval()
    model.load_state_dict(checkpoint['model'])
    expected = [model.generate(torch.zeros(1, 1, dtype=torch.long), 30, 0.8, 200)[0] for _ in range(2)]
    out = launch(NANOGPT / 'sample.py', *flags, '--temperature=0.8', '--seed=7', '--kv_cache=False').stdout
    assert samples_in(out) == [''.join(chr(ord('0') + i) for i in text) for text in expected]
    out = launch(NANOGPT / 'sample.py', *flags, '--compile=True').stdout
    assert 'note: compile: no effect with kv_cache=True' in out
