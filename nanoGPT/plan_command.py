"""Builds the plan.py command for a run, which train.py suggests when memory runs out."""

import os

from shell import python_command


def plan_command(argv: list[str], world_size: int, device_name: str) -> str | None:
    """
    Returns the shell command that plans this run, or None if there is no plan.py or it does not know the GPU. argv:
    sys.argv; device_name: PyTorch's name of the GPU. plan.py finds the trainer from the script's folder and
    --model_dir.
    """
    folder = os.path.dirname(os.path.realpath(argv[0]))
    script = os.path.join(os.path.dirname(folder), 'plan.py')
    gpus = os.path.join(os.path.dirname(script), 'planner', 'gpus.py')
    if not os.path.isfile(script) or not os.path.isfile(gpus):  # the folder was copied elsewhere
        return None
    with open(gpus, encoding='utf-8') as f:
        if f"'{device_name}'" not in f.read():
            return None
    trainer = f'--trainer={os.path.basename(folder)}'
    return python_command(script, *argv[1:], trainer, f'--gpu={device_name}', f'--gpus={world_size}')
