"""
Runs the kernels on a GPU, or without one on the CPU in Triton's interpreter. The interpreter must be chosen before
Triton's functions are decorated, and must not affect other tests, so these tests are a pytest call of their own.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'

from interpreter import look_up_language_once, round_to_fp8

look_up_language_once()
round_to_fp8()
