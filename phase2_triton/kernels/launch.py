"""Launching a Triton kernel from Python at less than half the usual cost, and the launch parameters that every kernel here has."""

from typing import NamedTuple

import torch

from .device import interpreted

compiled_kernels = {}


class Config(NamedTuple):
    """How a kernel is launched. Tables of these are fixed: timing-based tuning would change the order of sums between runs."""

    rows: int  # that a program handles at once
    chunk: int  # columns of a tile
    warps: int = 4
    programs: int = 0  # per multiprocessor, striding over the rows; 0: one for each tile of rows
    resident: bool = True  # all of a row in registers
    prefetch: bool = False  # the next rows too
    registers: int = 0  # of a thread at most; 0: as many as the compiler likes
    pdl: bool = False  # programmatic dependent launch: start while the previous kernel drains (Hopper and later)


def launch(kernel, grid, tensors, numbers, constants, config):
    """
    kernel[grid](*tensors, *numbers, *constants) on the current stream of the tensors' device.

    Triton binds arguments and looks up the compiled kernel in Python at every launch, for tens of microseconds. What it looks at
    are types, 16-byte alignment of pointers, and whether an integer is 1, a multiple of 16 or wider than 32 bits. So the compiled
    kernel of the first launch is kept under just these, and called directly from then on; unaligned pointers take Triton's way.
    """
    grid = (*grid, 1, 1)[:3]
    options = {'num_warps': config.warps}
    if interpreted:
        kernel[grid](*tensors, *numbers, *constants, **options)
        return
    device = tensors[0].device.index
    if device != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, config)
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    key = None
    if pointers % 16 == 0:
        kinds = [(n % 16 == 0, n == 1, n < 2**31) for n in numbers]
        key = (
            kernel,
            device,
            config.warps,
            config.pdl,
            config.registers,
            constants,
            *[tensor.dtype for tensor in tensors],
            *kinds,
        )
        compiled = compiled_kernels.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers, *constants)
            return
    if config.pdl:
        options['launch_pdl'] = True
    if config.registers:
        options['maxnreg'] = config.registers
    compiled = kernel[grid](*tensors, *numbers, *constants, **options)
    if key is not None:
        compiled_kernels[key] = compiled
