"""Helpers of the benchmarks: facts about the machine for result files, medians with their spread, torchrun, JSON."""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
GIB = 2**30
# as the user set it: hardware.resolve_auto() adds to it
MEMORY_SETUP = [
    f'{name}={value}'
    for name, value in os.environ.items()
    if name.startswith('PYTORCH') and name.endswith('ALLOC_CONF')
]


def output_of(*command):
    """Returns the command's stdout, or None if the command does not exist or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def without_folder(argument):
    """Returns '--out=x.json' for '--out=/some/folder/x.json', and likewise for --onto; other arguments unchanged."""
    flag, _, path = argument.partition('=')
    return f'{flag}={Path(path).name}' if flag in ('--out', '--onto') else argument


def facts(cpu=False):
    """
    Returns a dict of hardware, versions, commit, command and date. cpu: the benchmark ran on the CPU although there is
    a GPU.
    """
    gpu = torch.cuda.is_available() and not cpu
    versions = {
        'python': platform.python_version(),
        'torch': torch.__version__,
        'cuda': torch.version.cuda if gpu else None,
    }
    try:
        versions['triton'] = importlib.metadata.version('triton')
    except importlib.metadata.PackageNotFoundError:
        versions['triton'] = None
    versions['nccl'] = '.'.join(map(str, torch.cuda.nccl.version())) if gpu else None
    driver = output_of('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader') if gpu else None
    changed = output_of('git', 'status', '--porcelain', '--untracked-files=no')
    commit = output_of('git', 'rev-parse', 'HEAD')
    return {
        'device': torch.cuda.get_device_name() if gpu else cpu_name(),
        'device_type': 'cuda' if gpu else 'cpu',
        'cpus': os.cpu_count(),
        'driver': driver and driver.splitlines()[0],
        'versions': versions,
        # null where git does not know it, as in a copy without .git
        'commit': commit and commit + ' and changes' * bool(changed),
        'command': shlex.join(
            [*MEMORY_SETUP, 'python', os.path.relpath(sys.argv[0], ROOT), *map(without_folder, sys.argv[1:])]
        ),
        'date': time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()),
    }


def spread(values):
    """Returns the median, the smallest and the largest of the values, and their number."""
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values), 'n': len(values)}


def memory(device, peak=False):
    """Returns the bytes that torch has allocated on the GPU, with peak the most since reset_peak(); 0 on a CPU."""
    if not device.startswith('cuda'):
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def reset_peak(device):
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def first_line(error):
    """Returns the first line of an error's message, which may be empty."""
    return (str(error).splitlines() or [''])[0]


def write_json(path, report):
    """Writes the report atomically: a benchmark that is killed leaves its last complete file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(report, indent=1) + '\n')
    temporary.replace(path)


def torchrun(processes, script, *arguments):
    """Returns the command that starts the script in this number of processes on this machine."""
    return [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        f'--nproc_per_node={processes}',
        str(script),
        *map(str, arguments),
    ]
