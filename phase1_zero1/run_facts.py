"""Collects the facts that a run's log records: which code ran where, with which versions, and how state is sharded."""

import importlib.metadata
import os
import platform
import shlex
import sys

import torch

from hardware import device_name


def run_facts(script: str, config: dict, world_size: int, model, optimizer, tokens_per_iter: int) -> dict:
    """Returns the log's `run` block. script: path of the trainer's train.py."""
    folder = os.path.dirname(os.path.realpath(script))
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    for package in ('triton', 'numpy'):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        'phase': os.path.basename(folder),
        'model': os.path.basename(os.path.normpath(config['model_dir'] or folder)),
        'command': shlex.join(sys.argv),
        'world_size': world_size,
        'device': device_name(config['device']),
        'parameters': model.get_num_params(),
        'tokens_per_iter': tokens_per_iter,
        'state_bytes': state_bytes(model, optimizer),
        'host': platform.node(),
        'versions': versions,
    }


def state_bytes(model, optimizer) -> dict:
    """
    Returns {'parameters', 'gradients', 'optimizer'}: bytes of the tensors that this rank keeps from step to step. AdamW
    has two moments per parameter, in its dtype; an optimizer that holds fewer reports them as `moment_bytes`.
    """
    # sharded parameters are DTensors, of which this rank holds the local part
    local = [(p, p.to_local() if hasattr(p, 'to_local') else p) for p in model.parameters()]
    size = {p: tensor.numel() * tensor.element_size() for p, tensor in local}
    trained = sum(size[p] for p, _ in local if p.requires_grad)
    return {
        'parameters': sum(size.values()),
        'gradients': trained,
        'optimizer': getattr(optimizer, 'moment_bytes', 2 * trained),
    }
