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

from kernels import device as kernel_device

if torch.cuda.is_available():
    from fused_cases import *  # noqa: F403
    from phase2_model_cases import *  # noqa: F403
else:

    @pytest.mark.skipif(kernel_device.missing is not None, reason='Triton is not installed')
    @pytest.mark.parametrize('marked', ['not full', pytest.param('full', marks=pytest.mark.full)])
    def test_cases_in_the_interpreter(marked):
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', marked, 'fused_cases.py', 'phase2_model_cases.py']
        env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT / 'tests')
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
