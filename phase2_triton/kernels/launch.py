"""Launches a Triton kernel in less than half the usual CPU time, and defines the parameters of a launch."""

from typing import NamedTuple

import torch

from .device import interpreted

compiled_kernels = {}  # everything that Triton specializes on -> the compiled kernel


class Config(NamedTuple):
    """
    Launch parameters of a kernel. They come from fixed tables: autotuning could change the order of sums between runs.
    """

    rows: int  # rows that a program computes at a time
    chunk: int  # columns of a tile
    warps: int = 4
    programs: int = 0  # programs per multiprocessor, which stride over the rows; 0: one program for each tile of rows
    resident: bool = True  # keep whole rows in registers
    prefetch: bool = False  # load the next rows while these are computed
    registers: int = 0  # limit per thread; 0: the compiler decides
    pdl: bool = False  # programmatic dependent launch: start while the previous kernel drains (Hopper and later)


def launch(kernel, grid, tensors, numbers, constants, config):
    """
    Launches kernel[grid](*tensors, *numbers, *constants) on the current stream of the tensors' device.

    At every launch, Triton binds the arguments and looks up the compiled kernel in Python, which takes tens of
    microseconds. It specializes a kernel on dtypes, on 16-byte alignment of pointers, and on whether an integer is 1, a
    multiple of 16 or wider than 32 bits. The compiled kernel of the first launch is therefore stored under a key of
    these, and later launches call it directly. Launches with unaligned pointers always go through Triton.
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
