"""
The kernels run on the GPU where there is one, and elsewhere on the CPU in Triton's interpreter. The interpreter must be chosen before
Triton's functions are decorated, and may not leak into other tests: so these tests are a pytest call of their own.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'

from interpreter import look_up_language_once

look_up_language_once()
