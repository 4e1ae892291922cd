"""
Phase 2's kernels other than LayerNorm, and the model made of them. The numbers are tested in fused_cases.py and
phase2_model_cases.py, on the GPU at full sizes where there is one, and elsewhere in a process of its own under Triton's interpreter,
like layer_norm_cases.py (see test_layer_norm.py).
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import cross_entropy as cross_entropy_kernels
from kernels import gelu as gelu_kernels  # below, on a GPU, gelu and cross_entropy are functions
from kernels import device as kernel_device
from kernels.launch import Config

if torch.cuda.is_available():
    from fused_cases import *  # noqa: F403
    from phase2_model_cases import *  # noqa: F403
else:

    @pytest.mark.skipif(kernel_device.missing is not None, reason='Triton is not installed')
    @pytest.mark.parametrize('marked', ['not full', pytest.param('full', marks=pytest.mark.full)])
    def test_cases_in_the_interpreter(marked):
        command = [
            sys.executable,
            '-m',
            'pytest',
            '-q',
            '-p',
            'no:cacheprovider',
            '-m',
            marked,
            'fused_cases.py',
            'phase2_model_cases.py',
        ]
        env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT / 'tests')
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.mark.skipif(kernel_device.missing is not None, reason='Triton is not installed')
@pytest.mark.parametrize('capability', [80, 90])
def test_compiles_without_spilling_registers(capability):
    """As launched for GPT-2, without a GPU. Two programs of the loss share a multiprocessor, so each thread may have 32 registers."""
    from test_layer_norm import compile_offline

    c = cross_entropy_kernels.cross_entropy_config(50304)
    launches = [
        (
            cross_entropy_kernels.cross_entropy_kernel,
            dict(V=50304, LANES=c.rows, ITEMS=c.chunk, GRAD=True),
            {'logits_ptr': '*bf16', 'targets_ptr': '*i64', 'losses_ptr': '*fp32', 'M': 'i32', 'ignore_index': 'i32'},
            c,
        )
    ]
    for pointer in ('*bf16', '*fp32'):
        types = {'size': 'i32'} | dict.fromkeys(('x_ptr', 'y_ptr', 'dy_ptr', 'dx_ptr'), pointer)
        launches += [
            (kernel, dict(BLOCK=2048, EXACT=pointer == '*fp32', TANH=tanh), types, Config(1, 2048, 4))
            for kernel in (gelu_kernels.forward_kernel, gelu_kernels.backward_kernel)
            for tanh in (False, True)
        ]
    for kernel, *launch in launches:
        _, report = compile_offline(kernel, *launch, capability)
        assert '0 bytes spill stores, 0 bytes spill loads' in report, f'{kernel.fn.__name__} {launch}: {report}'
        if kernel is cross_entropy_kernels.cross_entropy_kernel:
            assert 'Used 32 registers' in report, report
