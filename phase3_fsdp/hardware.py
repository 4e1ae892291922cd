"""Facts about this machine: the best device, dtype, compile and backend, peak FLOP/s, clock and memory."""

import inspect
import os
import re
import sys
import time
from contextlib import nullcontext

import torch

import torchrun_env
from errors import UserError

try:
    import resource
except ImportError:
    raise UserError(
        'this Python has no module `resource`. If it is a Python for Windows, use one in WSL (Windows Subsystem for '
        'Linux): training needs files and signals as Linux and macOS have them'
    ) from None


def resolve_auto(device, dtype, compile, backend) -> tuple[str, str, bool, str]:
    """
    Returns (device, dtype, compile, backend) with each 'auto' replaced by the best choice on this machine. Under
    torchrun 'cuda' becomes this rank's GPU. Call it before the first use of a GPU: it configures the GPU's memory
    allocator. Raises UserError for a value that is unknown or unsupported on this machine.
    """
    mps = getattr(torch.backends, 'mps', None)
    several = torchrun_env.number('WORLD_SIZE', 1) > 1
    if device == 'auto':
        apple = mps and mps.is_available() and not several  # gloo sends no tensors of Apple's GPUs
        device = 'cuda' if torch.cuda.is_available() else 'mps' if apple else 'cpu'
    device_type = str(device).split(':')[0]
    if not re.fullmatch(r'cuda(:\d+)?|mps|cpu(:0)?', str(device)):
        raise UserError(f"device is '{device}', but it can be cuda, cuda:N, mps or cpu")
    if device_type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(
                f'device={device}, but torch {torch.__version__} sees no CUDA GPU here; leave the flag out or use '
                '--device=cpu'
            )
        count = torch.cuda.device_count()
        local_rank, local_world_size = torchrun_env.number('LOCAL_RANK', 0), torchrun_env.number('LOCAL_WORLD_SIZE', 1)
        if local_world_size > count and backend != 'gloo':
            raise UserError(
                f'torchrun started {local_world_size} processes on this machine, but it has {count} GPU(s): use '
                f'--nproc_per_node={count}, or --backend=gloo, with which processes can share a GPU (slowly)'
            )
        if local_world_size > 1 or (':' not in device and 0 < local_rank < count):
            device = f'cuda:{local_rank % count}'  # one GPU per process; NCCL requires that, gloo does not
        if ':' in device and int(device[5:]) >= count:
            raise UserError(f'device={device}, but this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}')
        if not any(re.fullmatch('PYTORCH_(CUDA_|HIP_)?ALLOC_CONF', name) for name in os.environ):
            # expandable segments reduce fragmentation, so larger batches fit
            os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'expandable_segments:True'
        torch.cuda.set_device(device if ':' in device else 'cuda:0')
    if device_type == 'mps' and not (mps and mps.is_available()):
        raise UserError('device=mps, but torch sees no Apple GPU here; leave the flag out or use --device=cpu')
    if device_type == 'mps' and several:
        raise UserError('device=mps works with one process only; leave the flag out or use --device=cpu')

    if dtype == 'auto' and device_type == 'cuda':
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    elif dtype == 'auto':
        dtype = 'float32'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise UserError(f"dtype is '{dtype}', but it can be float32, bfloat16 or float16")

    if compile == 'auto':  # torch.compile generates Triton code for GPUs, which needs compute capability 7
        compile = device_type == 'cuda' and torch.cuda.get_device_capability(device) >= (7, 0)
    if not isinstance(compile, bool):
        raise UserError(f"compile is '{compile}', but it can be auto, True or False")

    if backend == 'auto':
        backend = 'nccl' if device_type == 'cuda' else 'gloo'
    if backend not in ('nccl', 'gloo'):
        raise UserError(f"backend is '{backend}', but it can be nccl or gloo")
    if backend == 'nccl' and device_type != 'cuda':
        raise UserError(
            f'backend=nccl works between GPUs only, but device is {device}; leave the flag out or use --backend=gloo'
        )
    return device, dtype, compile, backend


def autocast(device: str, dtype: str):
    """
    Returns the context for a model's forward pass: matmuls and attention in dtype, the rest and all weights in float32.
    Allows NVIDIA's TF32 units for the remaining float32 matmuls (10 bits of mantissa, several times the speed).
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if dtype == 'float32':
        return nullcontext()
    return torch.amp.autocast(
        device_type=device.split(':')[0], dtype={'bfloat16': torch.bfloat16, 'float16': torch.float16}[dtype]
    )


def device_name(device: str) -> str:
    """Returns the name of the device, such as 'NVIDIA H200' or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else device


# Peak dense matmul TFLOP/s from NVIDIA's data sheets: (bfloat16 and float16 with float32 accumulation, float32 as
# TF32). Half the figure where a data sheet gives it with sparsity. None: the GPU lacks the format, or its peak is
# unknown.
PEAK_TFLOPS = [
    (r'NVIDIA (H100 80GB HBM3|H100 SXM.*|H200|GH200.*|H800)', 989.4, 494.7),
    (r'NVIDIA H100 PCIe', 756.0, 378.0),
    (r'NVIDIA (H100 NVL|H200 NVL)', 835.5, 417.5),
    (r'NVIDIA B200', 2250.0, 1125.0),
    (r'NVIDIA (A100|A800)[- ].*', 312.0, 156.0),
    (r'NVIDIA A40', 149.7, 74.8),
    (r'NVIDIA A30', 165.0, 82.0),
    (r'NVIDIA A10', 125.0, 62.5),
    (r'NVIDIA L40S', 362.0, 183.0),
    (r'NVIDIA L40', 181.0, 90.5),
    (r'NVIDIA L4', 121.0, 60.0),
    (r'NVIDIA GeForce RTX 3090', 71.0, 35.6),
    (r'NVIDIA GeForce RTX 4090', 165.2, 82.6),
    (r'NVIDIA GeForce RTX 5090', 209.5, 104.8),
    (r'Tesla V100-SXM.*', 125.0, None),
    (r'Tesla V100-PCIE.*', 112.0, None),
    (r'Tesla T4', 65.0, None),
]


A100_FLOPS = 312e12  # bfloat16 peak, which nanoGPT's estimate_mfu assumes


def peak_flops(device: str, dtype: str, peak_tflops: float = 0.0) -> float | None:
    """Returns the device's peak FLOP/s in this dtype, or peak_tflops * 1e12 unless that is 0. None: unknown."""
    if peak_tflops:
        return peak_tflops * 1e12
    if ' MIG ' in device_name(device):
        return None  # a slice of a GPU
    for name, half, tf32 in PEAK_TFLOPS:
        if re.fullmatch(name, device_name(device)):
            if dtype == 'bfloat16' and torch.cuda.get_device_capability(device) < (8, 0):
                return None
            tflops = tf32 if dtype == 'float32' else half
            return tflops and tflops * 1e12
    return None


def estimate_mfu(model: torch.nn.Module, sequences: int, dt: float, peak: float | None) -> float | None:
    """
    Returns the model FLOPs utilization of `sequences` forward and backward passes in dt seconds, relative to `peak`
    (FLOP/s), or None if that is unknown or the model has no estimate_mfu. nanoGPT's own estimate_mfu takes no peak.
    """
    if peak is None or not hasattr(model, 'estimate_mfu'):
        return None
    if len(inspect.signature(model.estimate_mfu).parameters) == 2:
        return model.estimate_mfu(sequences, dt) * A100_FLOPS / peak
    return model.estimate_mfu(sequences, dt, peak)


def peak_memory_bytes(device: str) -> int:
    """Returns the peak memory of this process: of tensors on its GPU, or its resident memory on a CPU."""
    if device.startswith('cuda'):
        # faster than max_memory_allocated(), which returns the same
        return torch.cuda.memory_stats_as_nested_dict(device)['allocated_bytes']['all']['peak']
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def now(device: str) -> float:
    """Waits for the device to finish its work and returns seconds on a monotonic clock."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    if device == 'mps':
        torch.mps.synchronize()
    return time.perf_counter()
