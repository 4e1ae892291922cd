"""The matmul for Hopper GPUs (kernels/matmul_hopper.py), compiled without a GPU. tests/kernels/ checks its numbers."""

import os
import subprocess

import pytest
import torch

triton = pytest.importorskip('triton', reason='Triton is not installed')

from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kernels import matmul_hopper

tokens, width, vocabulary = 12288, 768, 50304
shared_memory = 227 * 1024  # bytes that a program may have on a Hopper GPU


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device='meta')


def kind(argument):
    if isinstance(argument, int):
        return 'i32'
    if isinstance(argument, torch.Tensor):
        return {torch.bfloat16: '*bf16', torch.float32: '*fp32'}[argument.dtype]
    return f'tensordesc<bf16{list(argument.block_shape)},{argument.layout!r}>'


@pytest.mark.parametrize('exponentials', [False, True])
def test_it_compiles_without_spilling_registers(exponentials):
    """As launched for GPT-2's head, from tensors without memory."""
    sums = empty(-(-vocabulary // 128), tokens, dtype=torch.float32)
    extra = (empty(tokens, dtype=torch.float32), sums, 108.0) if exponentials else ()
    tensors = empty(tokens, width), empty(vocabulary, width), empty(tokens, vocabulary)
    arguments, options = matmul_hopper.launch_arguments(*tensors, *extra)
    names = matmul_hopper.matmul_kernel.arg_names
    first_constant = names.index('STAGES')
    constants = {(i,): value for i, value in enumerate(arguments) if i >= first_constant}
    signature = {name: 'constexpr' if (i,) in constants else kind(arguments[i]) for i, name in enumerate(names)}
    divisible = {(i,): [['tt.divisibility', 16]] for i in range(names.index('shifts_ptr'), first_constant)}
    source = GluonASTSource(matmul_hopper.matmul_kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)
    assert compiled.metadata.shared <= shared_memory
    assert 'm64n128k16.f32.bf16.bf16' in compiled.asm['ptx']

    command = [triton.knobs.nvidia.ptxas.path, '-v', '--gpu-name', 'sm_90a', '-o', os.devnull, '/dev/stdin']
    report = subprocess.run(command, input=compiled.asm['ptx'], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    assert '0 bytes spill stores, 0 bytes spill loads' in report.stderr, report.stderr
    # ptxas says so if it makes each wgmma wait for the one before, for instance because registers are moved between
    assert 'wgmma' not in report.stderr, report.stderr
