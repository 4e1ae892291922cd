"""
Tests of attention with a packed gradient: by cuDNN on a GPU, elsewhere by a stand-in that gets cuDNN's pointers, sizes
and strides.
"""

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch
from numerics import bf16, bound, device, f16, f32, gpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels import attention

B, T, HEADS, SIZE = (2, 128, 3, 64) if gpu else (2, 8, 3, 4)
needs_cudnn = gpu and attention.cudnn is not None and torch.cuda.get_device_capability() >= (9, 0)


def packed(dtype, device=device):
    generator = torch.Generator().manual_seed(0)
    qkv, dy = (torch.randn(B, T, n * HEADS * SIZE, generator=generator).to(device, dtype) for n in (3, 1))
    return qkv.requires_grad_(), dy


def by_pytorch(qkv):
    q, k, v = attention.split_heads(qkv, HEADS)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(B, T, -1)


class Plan:
    """A stand-in for cuDNN's graph, in float32, which computes on the memory that it is given."""

    def __init__(self, **types):
        self.tensors, self.io = {}, types['io_data_type']

    def tensor(self, dim, stride, uid, data_type=None):
        self.tensors[uid] = dim, stride, data_type or self.io
        return uid

    def sdpa_backward(self, q, k, v, o, dO, stats, attn_scale, use_causal_mask):
        assert attn_scale == 1 / math.sqrt(SIZE) and use_causal_mask
        return [Gradient(self.tensors) for _ in range(3)]

    def validate(self):
        pass

    build_operation_graph = check_support = validate

    def create_execution_plans(self, modes):
        assert modes == ['A']

    def build_plan_at_index(self, index):
        assert index == 0

    def get_workspace_size_plan_at_index(self, index):
        return 16

    def execute_plan_at_index(self, pointers, workspace, index, handle):
        def at(uid):
            dim, stride, dtype = self.tensors[uid]
            size = 4 * (1 + sum((n - 1) * s for n, s in zip(dim, stride)))
            memory = (ctypes.c_char * size).from_address(pointers[uid])
            return torch.frombuffer(memory, dtype=f32).as_strided(dim, stride)

        q, k, v = (at(uid).clone().requires_grad_() for uid in (attention.Q, attention.K, attention.V))
        with torch.enable_grad():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.testing.assert_close(at(attention.O), y.detach())
            torch.testing.assert_close(at(attention.STATISTICS), log_sum_exp(q, k).detach())
            grads = torch.autograd.grad(y, (q, k, v), at(attention.DO))
        for uid, grad in zip((attention.DQ, attention.DK, attention.DV), grads):
            at(uid).copy_(grad)


class Gradient:
    def __init__(self, tensors):
        self.tensors = tensors

    def set_output(self, is_output):
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_uid(self, uid):
        self.tensors[uid] = self.dim, self.stride, None


def log_sum_exp(q, k):
    scores = (q @ k.mT / math.sqrt(SIZE)).masked_fill(torch.ones(T, T).triu(1).bool(), float('-inf'))
    return scores.logsumexp(-1, keepdim=True)


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces cuDNN, as far as attention.py uses it, for float32 on the CPU."""
    attention.backward_plan.cache_clear()
    kinds = SimpleNamespace(BFLOAT16='bf16', HALF='f32', FLOAT='f32')
    cudnn = SimpleNamespace(
        data_type=kinds, heur_mode=SimpleNamespace(A='A'), pygraph=Plan, set_stream=lambda handle, stream: None
    )
    monkeypatch.setattr(attention, 'cudnn', cudnn)
    monkeypatch.setattr(attention, 'handle', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: SimpleNamespace(cuda_stream=0))

    def forward(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), log_sum_exp(q, k)

    monkeypatch.setattr(attention, 'forward_by_cudnn', forward)
    monkeypatch.setattr(attention, 'packed_plan', lambda qkv, *_: attention.backward_plan(None, f32, B, T, HEADS, SIZE))
    yield cudnn
    attention.backward_plan.cache_clear()


def test_packed_gradients_of_the_stand_in(stand_in):
    """Every gradient lies at its place in the packed tensor."""
    qkv, dy = packed(f32, 'cpu')
    y = attention.causal_attention(qkv, HEADS)
    assert type(y.grad_fn).__name__ == 'PackedAttentionFunctionBackward'
    y.backward(dy)
    other = qkv.detach().clone().requires_grad_()
    by_pytorch(other).backward(dy)
    torch.testing.assert_close(y, by_pytorch(other))
    torch.testing.assert_close(qkv.grad, other.grad)


def test_the_stand_in_under_activation_checkpointing(stand_in):
    qkv, dy = packed(f32, 'cpu')
    checkpoint(attention.causal_attention, qkv, HEADS, use_reentrant=False).backward(dy)
    other = qkv.detach().clone().requires_grad_()
    attention.causal_attention(other, HEADS).backward(dy)
    assert torch.equal(qkv.grad, other.grad)


def test_where_cudnn_has_no_plan(stand_in, monkeypatch, capsys):
    """PyTorch's operator takes over, after one message."""

    def refuse(self, index):
        raise RuntimeError('[cudnn_frontend] no engine\nand more')

    monkeypatch.setattr(Plan, 'build_plan_at_index', refuse)
    qkv, _ = packed(f32, 'cpu')
    for _ in range(2):
        assert torch.equal(attention.causal_attention(qkv, HEADS), by_pytorch(qkv))
    assert capsys.readouterr().out.splitlines() == [
        "using PyTorch's attention backward: cuDNN cannot write packed gradients here ([cudnn_frontend] no engine)"
    ]


@pytest.mark.parametrize('options', [{}, {'packed': False}, {'dropout_p': 0.0}])
def test_elsewhere_pytorchs_operator(options):
    """cuDNN does not take float32."""
    qkv, dy = packed(f32)
    y = attention.causal_attention(qkv, HEADS, **options)
    assert torch.equal(y, by_pytorch(qkv))
    torch.manual_seed(0)
    dropped = attention.causal_attention(qkv, HEADS, dropout_p=0.5)
    assert not torch.equal(dropped, y)


if needs_cudnn:

    @pytest.mark.parametrize('dtype', [bf16, f16])
    def test_packed_gradients(dtype):
        """The error against float64 is at most twice that of PyTorch's operator."""
        qkv, dy = packed(dtype)
        results = []
        for function, to in (
            (lambda qkv: attention.causal_attention(qkv, HEADS), dtype),
            (by_pytorch, torch.float64),
            (by_pytorch, dtype),
        ):
            leaf = qkv.detach().to(to).requires_grad_()
            y = function(leaf)
            y.backward(dy.to(to))
            results.append((y.detach(), leaf.grad))
        for name, *three in zip(('y', 'dqkv'), *results):
            bound(name, *three)

    def test_the_packed_backward_is_taken():
        qkv, _ = packed(bf16)
        names = [
            type(attention.causal_attention(qkv, HEADS, **options).grad_fn).__name__
            for options in ({}, {'packed': False}, {'dropout_p': 0.1})
        ]
        assert [name == 'PackedAttentionFunctionBackward' for name in names] == [True, False, False]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            assert 'Packed' not in type(attention.causal_attention(qkv, HEADS).grad_fn).__name__

    def test_in_a_cuda_graph_and_checkpointed():
        qkv, dy = packed(bf16)
        attention.causal_attention(qkv, HEADS).backward(dy)
        expected, qkv.grad = qkv.grad, None
        checkpoint(attention.causal_attention, qkv, HEADS, use_reentrant=False).backward(dy)
        torch.testing.assert_close(qkv.grad, expected)  # dq is added up with atomics
        qkv.grad = None
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            attention.causal_attention(qkv, HEADS).backward(dy)
        for _ in range(2):
            qkv.grad.zero_()
            graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(qkv.grad, expected)
