"""The facts about a run that its log records: which code ran where, with which versions."""

import importlib.metadata
import os
import platform
import shlex
import sys

import torch

from hardware import device_name


def run_facts(script, model_dir, device, world_size, **facts):
    """What a log should say about a run, beyond its flags: which code ran where, and further `facts` as they are."""
    folder = os.path.dirname(os.path.realpath(script))
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    for package in ('triton', 'numpy'):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        'phase': os.path.basename(folder),
        'model': os.path.basename(os.path.normpath(model_dir or folder)),
        'command': shlex.join(sys.argv),
        'world_size': world_size,
        'device': device_name(device),
        **facts,
        'host': platform.node(),
        'versions': versions,
    }
