"""Lists the GPUs that plan.py knows: figures from their data sheets, and their number per machine."""

import difflib
from dataclasses import dataclass

from errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of GPU. memory_bytes: torch's total_memory. peak_flops: dense bfloat16 FLOP/s."""

    name: str
    device_name: str  # as torch.cuda.get_device_name() prints it
    memory_bytes: float
    bandwidth: float  # bytes/s of its memory
    peak_flops: float
    link: float  # bytes/s to the other GPUs of a machine, one direction: NVLink, or else PCIe
    capability: tuple[int, int]  # compute capability
    per_machine: int = 8
    measured: bool = False  # whether the efficiencies were fitted on this GPU


def _gpu(name, device_name, capability, gib, terabytes_per_s, tflops, link_gb_per_s, **more):
    sizes = gib * GIB, terabytes_per_s * 1e12, tflops * 1e12, link_gb_per_s * 1e9
    return GPU(name, device_name, *sizes, capability, **more)


# Memory: torch's total_memory; measured on the H200, approximate for the others (2% less than the data sheet in most).
# Bandwidth: NVIDIA's data sheets. Peak: hardware.PEAK_TFLOPS; a test compares the two. Link: NVLink 4 has 450 GB/s in
# each direction, NVLink 3 300, NVLink 5 900, PCIe 4.0 x16 32, PCIe 5.0 x16 64. Compute capability: NVIDIA's table
# (developer.nvidia.com/cuda-gpus).
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu('h100', 'NVIDIA H100 80GB HBM3', (9, 0), 79.18, 3.35, 989.4, 450, measured=True),
        _gpu('h200', 'NVIDIA H200', (9, 0), 139.80, 4.8, 989.4, 450, measured=True),
        _gpu('h100-pcie', 'NVIDIA H100 PCIe', (9, 0), 79.1, 2.0, 756.0, 64),
        _gpu('h100-nvl', 'NVIDIA H100 NVL', (9, 0), 93.1, 3.9, 835.5, 64),
        _gpu('b200', 'NVIDIA B200', (10, 0), 178.4, 8.0, 2250.0, 900),
        _gpu('a100', 'NVIDIA A100-SXM4-80GB', (8, 0), 79.1, 2.039, 312.0, 300),
        _gpu('a100-40gb', 'NVIDIA A100-SXM4-40GB', (8, 0), 39.4, 1.555, 312.0, 300),
        _gpu('h200-nvl', 'NVIDIA H200 NVL', (9, 0), 139.8, 4.8, 835.5, 64),
        _gpu('a40', 'NVIDIA A40', (8, 6), 44.4, 0.696, 149.7, 32),
        _gpu('a30', 'NVIDIA A30', (8, 0), 23.5, 0.933, 165.0, 32),
        _gpu('l40', 'NVIDIA L40', (8, 9), 44.4, 0.864, 181.0, 32),
        _gpu('l40s', 'NVIDIA L40S', (8, 9), 44.4, 0.864, 362.0, 32),
        _gpu('l4', 'NVIDIA L4', (8, 9), 22.0, 0.3, 121.0, 32),
        _gpu('a10', 'NVIDIA A10', (8, 6), 22.1, 0.6, 125.0, 32),
        _gpu('rtx3090', 'NVIDIA GeForce RTX 3090', (8, 6), 23.6, 0.936, 71.0, 32),
        _gpu('rtx4090', 'NVIDIA GeForce RTX 4090', (8, 9), 23.6, 1.008, 165.2, 32),
        _gpu('rtx5090', 'NVIDIA GeForce RTX 5090', (12, 0), 31.4, 1.792, 209.5, 64),
    )
}


def find_gpu(name: str) -> GPU:
    """
    Returns the GPU with this name, or with this device name as torch prints it. Raises UserError for an unknown name.
    """
    known = GPUS.get(name.lower()) or gpu_of_device(name)
    if known:
        return known
    near = difflib.get_close_matches(name.lower().removeprefix('nvidia '), GPUS, n=1)
    raise UserError(
        f"gpu is '{name}', but it can be {', '.join(GPUS)}" + (f'; did you mean {near[0]}?' if near else '')
    )


def gpu_of_device(device_name: str) -> GPU | None:
    """Returns the known GPU with this device name, or None."""
    return next((gpu for gpu in GPUS.values() if gpu.device_name.lower() == device_name.lower()), None)
