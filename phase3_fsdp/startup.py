"""Starts a training run: protects output, resolves 'auto' flags and joins the ranks."""

import os

import torchrun_env
from checkpoint import find_checkpoint
from cuda_graph import resolve_cuda_graph, use_side_stream
from distributed import check_environment, check_same_flags, join_ranks, max_over_ranks
from errors import UserError
from hardware import device_name, resolve_auto
from output import protect_output

INIT_FROM = ('scratch', 'resume', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


def setup(config: dict, find_checkpoint=find_checkpoint, cpu_offload: bool = False) -> tuple[int, int]:
    """
    Joins the ranks and returns (rank, world_size). Call it right after configure(). Replaces every 'auto' in config:
    device, dtype, compile, backend, cuda_graph, and init_from, which becomes 'resume' on all ranks if any rank sees a
    checkpoint. find_checkpoint: the trainer's function. cpu_offload: the trainer keeps weights in CPU memory. Raises
    UserError for a value that is unknown, does not fit this machine, or differs between ranks.
    """
    protect_output()
    check_environment()
    names = ('device', 'dtype', 'compile', 'backend')
    config.update(zip(names, resolve_auto(*(config[name] for name in names))))
    rank, world_size = join_ranks(config['backend'], config['dist_timeout'])
    check_same_flags(config)
    config['cuda_graph'] = resolve_cuda_graph(config, world_size, cpu_offload)
    if config['cuda_graph']:
        use_side_stream(config['device'])
    device, dtype, compile, backend = (config[name] for name in names)
    over = f' over {backend}' if world_size > 1 else ''
    print(f'device {device_name(device)}, dtype {dtype}, compile {compile}, processes {world_size}{over}')
    if config['init_from'] not in ('auto', 'resume') and torchrun_env.number('TORCHELASTIC_MAX_RESTARTS', 0):
        print('note: a restart by torchrun (--max-restarts) will begin again; with --init_from=auto it will continue')
    if config['init_from'] == 'auto':
        # a link to a file that is missing counts: its disk may not be mounted
        found = max_over_ranks(os.path.lexists(find_checkpoint(config['out_dir'])))
        config['init_from'] = 'resume' if found else 'scratch'
    if config['init_from'] not in INIT_FROM:
        raise UserError(f"init_from is '{config['init_from']}', but it can be auto, {', '.join(INIT_FROM)}")
    if config['eval_only'] and config['init_from'] == 'scratch':
        print('note: eval_only=True evaluates an untrained model; --init_from=resume evaluates the one in out_dir')
    return rank, world_size
