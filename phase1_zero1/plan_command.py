"""The plan.py command for a run: what train.py shows when memory runs out."""

import os
import shlex

TRAINERS = {'phase1_zero1': 'zero1', 'phase2_triton': 'triton', 'phase3_fsdp': 'fsdp'}  # and DDP elsewhere


def plan_command(argv, world_size, device_name):
    """
    Returns the shell command that plans this run: argv is sys.argv, device_name what torch calls the GPU. It names the trainer by its
    folder and --model_dir; flags that other trainers lack are known to plan.py too. None where there is no plan.py.
    """
    folder = os.path.dirname(os.path.realpath(argv[0]))
    script = os.path.join(os.path.dirname(folder), 'plan.py')
    if not os.path.isfile(script):  # a folder that was copied elsewhere
        return None
    trainer = TRAINERS.get(os.path.basename(folder), 'ddp')
    models = [arg.split('=', 1)[1] for arg in argv[1:] if arg.startswith('--model_dir=')]
    if models and os.path.basename(os.path.normpath(models[-1])) == 'phase2_triton':
        trainer = 'triton' if trainer in ('ddp', 'triton') else f'{trainer}+triton'
    words = ['python', os.path.relpath(script), *argv[1:]]
    words += [f'--trainer={trainer}', f'--gpu={device_name}', f'--gpus={world_size}']
    return shlex.join(words)
