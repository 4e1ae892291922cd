"""
Runs the reference trainer instead of FSDP if there is nothing to shard. The reference trainer is train_ddp.py, a copy
of nanoGPT/train.py (`make sync`), so that this folder works on its own.
"""

import ast
import os
import runpy
import sys

import torchrun_env
from errors import UserError

FOLDER = os.path.dirname(os.path.abspath(__file__))
REFERENCE = os.path.join(FOLDER, 'train_ddp.py')


def hand_over_if_unsharded(config: dict, flags_set: set) -> None:
    """
    With one process, or with use_fsdp=False, runs train_ddp.py with those flags in flags_set that it knows, and then
    exits. Otherwise returns. Raises UserError for a wrong ckpt_format or fsdp_reshard.
    """
    sharded = config['use_fsdp'] and torchrun_env.number('WORLD_SIZE', 1) > 1
    if config['ckpt_format'] not in ('full', 'sharded'):
        raise UserError(f"ckpt_format is '{config['ckpt_format']}', but it can be full or sharded")
    if config['fsdp_reshard'] not in ('auto', True, False):
        raise UserError(f"fsdp_reshard is '{config['fsdp_reshard']}', but it can be auto, True or False")
    if config['ckpt_format'] == 'sharded' and not sharded:
        raise UserError('ckpt_format=sharded needs FSDP: several processes under torchrun, and use_fsdp=True')
    if sharded:
        return
    print(f'not using FSDP: {"there is one process" if config["use_fsdp"] else "use_fsdp=False"}')
    own = assigned_names(os.path.join(FOLDER, 'train.py')) - assigned_names(REFERENCE)
    sys.argv = [REFERENCE, *(f'--{key}={config[key]}' for key in config if key in flags_set and key not in own)]
    runpy.run_path(REFERENCE, {'_noted': True}, '__main__')  # configure() has printed its notes
    sys.exit()


def assigned_names(script: str) -> set:
    """Returns the names that a script assigns at its top level, its flags among them."""
    with open(script, encoding='utf-8') as f:
        assignments = [node for node in ast.parse(f.read()).body if isinstance(node, ast.Assign)]
    return {target.id for node in assignments for target in node.targets if isinstance(target, ast.Name)}
