"""
Turns train.py's flags into runs: which trainers exist, how their `auto` flags resolve on a GPU, and which one the flags
select.

Impossible flags raise the messages of train.py, cuda_graph.py and sharding.py.
"""

import ast
from pathlib import Path

from errors import UserError
from planner.gpus import GPU
from planner.run import Run

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    'ddp',
    'zero1',
    'triton',
    'fsdp',
    'zero1+triton',
    'fsdp+triton',
    'hybrid',
    'fsdp+checkpointing',
    'fsdp+offload',
)


FOLDERS = {
    'ddp': 'nanoGPT',
    'zero1': 'phase1_zero1',
    'triton': 'phase2_triton',
    'fsdp': 'phase3_fsdp',
    'hybrid': 'phase3_fsdp',
}


def flags_of(path) -> dict:
    """Returns {flag: default} of a train.py: the plain values that it assigns above configure(). Does not run it."""
    flags = {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
        if any(isinstance(function, ast.Name) and function.id == 'configure' for function in calls):
            return flags
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not calls:
            value = eval(compile(ast.Expression(node.value), path, 'eval'), {'__builtins__': {}})
            if isinstance(value, (int, float, str)):
                flags[node.targets[0].id] = value
    raise ValueError(f'{path} does not call configure()')


def train_flags() -> dict:
    """Returns the flags of all trainers together, {flag: default}."""
    flags = {}
    for folder in ('nanoGPT', 'phase1_zero1', 'phase3_fsdp'):
        flags = flags_of(ROOT / folder / 'train.py') | flags
    return flags


def kernel_flags() -> dict:
    """Returns the flags of the Triton model that choose how to compute, {flag: default}."""
    from configurator import model_options

    script = str(ROOT / 'phase2_triton' / 'train.py')
    return model_options('', script)


def micro_steps_of(config: dict, gpus: int) -> int:
    """Returns the micro-steps per rank. Raises UserError, like train.py, if the GPUs do not divide them."""
    total = config['gradient_accumulation_steps']
    if total % gpus:
        raise UserError(f'gradient_accumulation_steps={total} must be a multiple of the {gpus} processes')
    return total // gpus


def check(config: dict, gpu: GPU, gpus: int) -> None:
    """Raises UserError for flags that no trainer accepts on these GPUs."""
    if gpus < 1:
        raise UserError(f'gpus={gpus}, but it must be at least 1')
    if str(config['device']) != 'auto' and not str(config['device']).startswith('cuda'):
        raise UserError(f'device={config["device"]}, but plan.py plans for GPUs: leave the flag out')
    if config['dtype'] not in ('auto', 'float32', 'bfloat16', 'float16'):
        raise UserError(f"dtype is '{config['dtype']}', but it can be float32, bfloat16 or float16")
    for flag in ('compile', 'cuda_graph'):
        if config[flag] not in ('auto', True, False):
            raise UserError(f"{flag} is '{config[flag]}', but it can be auto, True or False")
    if config['fsdp_reshard'] not in ('auto', True, False):
        raise UserError(f"fsdp_reshard is '{config['fsdp_reshard']}', but it can be auto, True or False")
    if config['fsdp_min_num_params'] < 1:
        raise UserError(f'fsdp_min_num_params={config["fsdp_min_num_params"]}, but it must be at least 1')
    if config['cuda_graph'] is True and config['activation_checkpointing'] and config['dropout'] > 0:
        raise UserError(
            'cuda_graph=True with dropout under activation_checkpointing is not supported: leave out one of the three'
        )
    if config['cuda_graph'] is True and config['fsdp_cpu_offload']:
        raise UserError(
            'cuda_graph=True with fsdp_cpu_offload, where the CPU takes part in backward, is not supported: leave out '
            'one of the two'
        )
    size = config['fsdp_shard_size']
    if not 0 <= size <= gpus or gpus % (size or 1) or size == 1:
        raise UserError(
            f'fsdp_shard_size={size}, but it must divide the {gpus} processes and be 2 or more (0: all of them)'
        )
    micro_steps_of(config, gpus)


def make_run(name: str, config: dict, gpu: GPU, gpus: int, micro_steps: int) -> Run | None:
    """Returns the Run of a trainer in NAMES, or None for hybrid sharding with fewer than two groups of two GPUs."""
    parts = name.split('+')
    sharded = parts[0] in ('fsdp', 'hybrid')
    kernels = 'triton' in parts
    shard_size = 0
    if parts[0] == 'hybrid':
        shard_size = config['fsdp_shard_size'] or (gpu.per_machine if gpus > gpu.per_machine else gpus // 2)
        if gpus < 4 or gpus % shard_size or shard_size in (1, gpus):
            return None
    checkpointing = bool(config['activation_checkpointing']) or 'checkpointing' in parts
    offload = sharded and gpus > 1 and (config['fsdp_cpu_offload'] or 'offload' in parts)
    redraws_dropout = checkpointing and config['dropout'] > 0
    run = Run(
        gpu,
        gpus,
        n_layer=config['n_layer'],
        n_head=config['n_head'],
        n_embd=config['n_embd'],
        batch_size=config['batch_size'],
        block_size=config['block_size'],
        micro_steps=micro_steps,
        trainer='ddp' if gpus == 1 else 'fsdp' if sharded else 'zero1' if parts[0] == 'zero1' else 'ddp',
        vocab_size=config['vocab_size'],
        bias=config['bias'],
        kernels=kernels,
        half_residual=kernels and config['half_residual'],
        loss_rows=config['loss_rows'] if kernels else 0,
        compiled=kernels or config['compile'] is not False,
        graphs=config['cuda_graph'] is not False and not (offload or redraws_dropout),
        checkpointing=checkpointing,
        shard_size=shard_size if gpus > 1 else 0,
        min_num_params=config['fsdp_min_num_params'],
        offload=offload,
        half_bytes=4 if config['dtype'] == 'float32' else 2,
    )
    reshard = config['fsdp_reshard']
    if reshard == 'auto':  # as sharding.choose_reshard()
        reshard = offload or 6 * run.parameters > gpu.memory_bytes / 8
    return run.change(reshard=run.sharded and bool(reshard))


def make_runs(config: dict, gpu: GPU, gpus: int) -> dict[str, Run]:
    """Returns {name: Run} for every trainer that can run on these GPUs. Raises UserError for impossible flags."""
    check(config, gpu, gpus)
    micro_steps = micro_steps_of(config, gpus)
    runs = {name: make_run(name, config, gpu, gpus, micro_steps) for name in NAMES}
    return {name: run for name, run in runs.items() if run}


def asked_for(config: dict, flags_set: set) -> str:
    """
    Returns the name of the trainer that config selects, or '' if it selects none: by config['trainer'], a name or the
    folder of a train.py, or by train.py's flags, which are more specific than a folder.
    """
    if config['trainer'] in NAMES:
        return config['trainer']
    kernels = Path(config['model_dir'] or '.').name == 'phase2_triton'
    sharding = {
        'fsdp_shard_size': 'hybrid',
        'fsdp_cpu_offload': 'fsdp+offload',
        'use_fsdp': 'fsdp',
        'use_zero1': 'zero1',
    }
    name = next((trainer for flag, trainer in sharding.items() if flag in flags_set and config[flag]), '')
    if not name and any(flag.startswith('fsdp_') for flag in flags_set):
        name = 'fsdp'
    name = name or next((trainer for trainer, folder in FOLDERS.items() if folder == config['trainer']), '')
    if not kernels:
        return name
    return f'{name}+triton' if f'{name}+triton' in NAMES else 'triton' if name in ('', 'ddp') else name


def command(name: str, run: Run, arguments: list[str]) -> str:
    """Returns the shell command that starts this trainer. arguments: the user's own arguments for train.py."""
    parts = name.split('+')
    folder = FOLDERS[parts[0]]
    flags = {'triton': '--model_dir=../phase2_triton', 'checkpointing': '--activation_checkpointing=True'}
    flags['offload'] = '--fsdp_cpu_offload=True'
    more = [flags[part] for part in parts[1:]]
    if parts[0] == 'hybrid':
        more.append(f'--fsdp_shard_size={run.shard_size}')
    more = [flag for flag in more if flag not in arguments]
    if run.gpus == 1:
        start = 'python'
    elif run.gpus <= run.gpu.per_machine:
        start = f'torchrun --standalone --nproc_per_node={run.gpus}'
    else:
        machines = -(-run.gpus // run.gpu.per_machine)
        start = f'torchrun --nnodes={machines} --nproc_per_node={run.gpu.per_machine} --rdzv_backend=c10d --rdzv_id=gpt'
        start += ' --rdzv_endpoint=HOST:29500'
    return ' '.join([start, f'{folder}/train.py', *arguments, *more])
