"""
Turns train.py's flags into runs: which trainers exist, how their `auto` flags resolve on a GPU, and which one the flags
select.

Impossible flags raise the messages of train.py, cuda_graph.py and sharding.py.
"""

import ast
from functools import cache
from pathlib import Path

from configurator import CHOICES
from errors import UserError
from planner.gpus import GPU
from planner.run import Run
from shell import python, python_command
from tracker import TRACKERS

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
# OpenAI's weights, for --init_from: (n_layer, n_head, n_embd)
PRETRAINED = {
    'gpt2': (12, 12, 768),
    'gpt2-medium': (24, 16, 1024),
    'gpt2-large': (36, 20, 1280),
    'gpt2-xl': (48, 25, 1600),
}


@cache
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


def shape_of_pretrained(init_from: str) -> dict:
    """Returns the flags that OpenAI's weights determine. Raises UserError, like startup.py, for an unknown name."""
    if init_from not in PRETRAINED:
        raise UserError(f"init_from is '{init_from}', but it can be auto, scratch, resume, {', '.join(PRETRAINED)}")
    return dict(zip(('n_layer', 'n_head', 'n_embd'), PRETRAINED[init_from])) | dict(bias=True, vocab_size=50257)


def micro_steps_of(config: dict, gpus: int) -> int:
    """Returns the micro-steps per rank. Raises UserError, like train.py, if the GPUs do not divide them."""
    total = config['gradient_accumulation_steps']
    if total % gpus:
        raise UserError(f'gradient_accumulation_steps={total} must be a multiple of the {gpus} processes')
    return total // gpus


def check_words(config: dict) -> None:
    """Raises UserError, like train.py, for a flag with a word that it does not know."""
    trackers = f'{", ".join(TRACKERS)} or empty'
    for flag, words, expected in (
        ('dtype', ('auto', 'float32', 'bfloat16', 'float16'), 'float32, bfloat16 or float16'),
        ('compile', ('auto', True, False), 'auto, True or False'),
        ('cuda_graph', ('auto', True, False), 'auto, True or False'),
        ('fsdp_reshard', ('auto', True, False), 'auto, True or False'),
        ('backend', ('auto', 'nccl', 'gloo'), 'nccl or gloo'),
        ('data_order', ('random', 'sequential'), 'random or sequential'),
        ('ckpt_format', ('full', 'sharded'), 'full or sharded'),
        ('gelu', CHOICES['gelu'], ' or '.join(CHOICES['gelu'])),
        ('tracker', ('', *TRACKERS), trackers),
    ):
        if config[flag] not in words:
            raise UserError(f"{flag} is '{config[flag]}', but it can be {expected}")


def check(config: dict, gpu: GPU, gpus: int) -> None:
    """Raises UserError for flags that no trainer accepts on these GPUs."""
    check_words(config)
    if gpus < 1:
        raise UserError(f'gpus={gpus}, but it must be at least 1')
    if str(config['device']) != 'auto' and not str(config['device']).startswith('cuda'):
        raise UserError(f'device={config["device"]}, but plan.py plans for GPUs: leave the flag out')
    for flag in kernel_flags():
        if isinstance(config[flag], (int, float)) and not config[flag] >= 0:
            raise UserError(f'{flag}={config[flag]}, but it must be at least 0')
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


def why_not_fp8(run: Run, config: dict) -> str:
    """Returns why --fp8 changes nothing in this run of the Triton model, in words, or '' if FP8 runs."""
    if not run.kernels:
        return 'use_triton is off' if not config['use_triton'] else 'only the Triton model has it'
    if config['dtype'] in ('float32', 'float16'):
        return f'it takes the place of bfloat16, and this run is in {config["dtype"]}'
    if run.gpu.capability < (8, 9):
        have = '.'.join(map(str, run.gpu.capability))
        return f'{run.gpu.device_name} has compute capability {have}, FP8 needs 8.9'
    return '' if run.n_embd % 16 == 0 else f'n_embd={run.n_embd} is not a multiple of 16'


def takes_exponentials(run: Run) -> bool:
    """Returns whether the last matmul of the Triton model writes exponentials: exp_cross_entropy.supports()."""
    here = run.gpu.capability == (9, 0) and run.half_bytes == 2 and run.tokens >= 1024
    aligned = run.vocab_size % 8 == run.n_embd % 8 == 0
    return run.kernels and here and aligned and not run.loss_rows and not run.fp8_head


def make_run(name: str, config: dict, gpu: GPU, gpus: int, micro_steps: int) -> Run | None:
    """Returns the Run of a trainer in NAMES, or None for hybrid sharding with fewer than two groups of two GPUs."""
    parts = name.split('+')
    sharded = parts[0] in ('fsdp', 'hybrid')
    kernels = 'triton' in parts and config['use_triton']
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
        dropout=config['dropout'] > 0,
    )
    run = run.change(fp8=bool(config['fp8']) and not why_not_fp8(run, config))
    run = run.change(exponentials=takes_exponentials(run) and config['dtype'] != 'float16')
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


def asked_for(config: dict, flags_set: set, in_files: dict | None = None) -> str:
    """
    Returns the name of the trainer that config selects, or '' if it selects none: by config['trainer'], a name or the
    folder of a train.py, or by train.py's flags, which are more specific than a folder. Raises UserError for flags of
    two trainers, and for a trainer whose own flag is off. in_files: flags that config files set; these do not
    contradict config['trainer'], so that a preset can be planned with every trainer.
    """
    kernels = Path(config['model_dir'] or '.').name == 'phase2_triton'
    sharding = {
        'fsdp_shard_size': 'hybrid',
        'fsdp_cpu_offload': 'fsdp+offload',
        'use_fsdp': 'fsdp',
        'use_zero1': 'zero1',
    }
    selects = {flag for flag in sharding if flag in flags_set and config[flag]}
    if config.get('fsdp_shard_size') == config.get('gpus'):  # one group of all ranks
        selects -= {'fsdp_shard_size'}
    if 'use_zero1' in selects and len(selects) > 1:
        flag = max(selects - {'use_zero1'})
        raise UserError(f'use_zero1=True and {flag}={config[flag]} select two trainers: leave out one of the two')
    given = config['trainer']
    folder = next((trainer for trainer, folder in FOLDERS.items() if folder == given), given)
    switches = {'zero1': 'use_zero1', 'fsdp': 'use_fsdp', 'hybrid': 'use_fsdp', 'triton': 'use_triton'}
    switches |= {'checkpointing': 'activation_checkpointing', 'offload': 'fsdp_cpu_offload'}
    off = {switches.get(part) for part in given.split('+') if not config.get(switches.get(part), True)}
    contradicting = (off & flags_set) | (selects - known_to(folder) if folder else set())
    for flag in sorted(contradicting - (in_files or {}).keys()):
        raise UserError(f'trainer={given} and {flag}={config[flag]} contradict each other: leave out one of the two')
    if 'use_fsdp' in flags_set and not config['use_fsdp']:
        for flag in sorted(selects & {'fsdp_shard_size', 'fsdp_cpu_offload'}):
            raise UserError(f'{flag}={config[flag]} and use_fsdp=False contradict each other: leave out one of the two')
    name = next((trainer for flag, trainer in sharding.items() if flag in selects), '')
    if given in NAMES:
        name = 'hybrid' if given == 'fsdp' and name == 'hybrid' else given
    if not name and any(flag.startswith('fsdp_') for flag in flags_set):
        name = 'fsdp'
    name = name or next((trainer for trainer, folder in FOLDERS.items() if folder == config['trainer']), '')
    if not kernels:
        return name
    return f'{name}+triton' if f'{name}+triton' in NAMES else 'triton' if name in ('', 'ddp') else name


def folder_of(name: str) -> str:
    """Returns the folder whose train.py starts this trainer."""
    return FOLDERS[name.split('+')[0]]


@cache
def known_to(name: str) -> frozenset:
    """Returns the names of the flags that the train.py of this trainer accepts."""
    from configurator import model_options

    script = str(ROOT / folder_of(name) / 'train.py')
    model = str(ROOT / 'phase2_triton') if 'triton' in name.split('+') else ''
    return frozenset((*flags_of(script), *model_options(model, script)))


def command(name: str, run: Run, arguments: list[str], config: dict) -> str:
    """
    Returns the shell command that starts this trainer from the working directory. arguments: the user's own arguments
    for train.py; the command leaves out those that select or belong to another trainer. config: all flags.
    """
    parts, folder = name.split('+'), folder_of(name)
    known = known_to(name) - {'use_zero1', 'use_fsdp', 'use_triton', 'fsdp_shard_size'}
    another_model = Path(config['model_dir'] or '.').name not in ('.', *FOLDERS.values()) and 'triton' not in parts
    known -= set() if another_model else {'model_dir'}
    kept = [arg for arg in arguments if not arg.startswith('--') or arg[2:].split('=')[0] in known]
    model = '--model_dir=../phase2_triton'  # in addition to the folders of the trainers
    more = [model] if 'triton' in parts[1:] else []
    more += ['--activation_checkpointing=True'] if 'checkpointing' in parts else []
    more += ['--fsdp_cpu_offload=True'] if 'offload' in parts else []
    # flags that a config file may have set
    wanted = {'zero1': {'use_zero1': True}, 'fsdp': {'use_fsdp': True, 'fsdp_shard_size': 0}}
    wanted['hybrid'] = {'use_fsdp': True, 'fsdp_shard_size': run.shard_size}
    wanted = wanted.get(parts[0], {}) | ({'use_triton': config['use_triton']} if 'triton' in parts else {})
    defaults = {'use_zero1': True, 'use_fsdp': True, 'fsdp_shard_size': 0, 'use_triton': True}
    more += [f'--{flag}={value}' for flag, value in wanted.items() if {value} != {config[flag], defaults[flag]}]
    train = python_command(ROOT / folder / 'train.py', *kept, *(flag for flag in more if flag not in kept))
    if run.gpus == 1:
        return train
    each = max(n for n in range(1, run.gpu.per_machine + 1) if run.gpus % n == 0)
    machines = run.gpus // each
    start = f'torchrun --standalone --nproc_per_node={each}'
    if machines > 1:
        start = f'torchrun --nnodes={machines} --nproc_per_node={each} --rdzv_backend=c10d --rdzv_id=gpt'
        start += ' --rdzv_endpoint=HOST:29500'
    return start + train.removeprefix(python())
