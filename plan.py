"""
Estimates whether a run fits, how fast it is, and with which trainer, before anything is allocated. Needs no GPU and no
PyTorch.

$ python plan.py nanoGPT/config/train_gpt2.py --gpu=h100 --gpus=8 --tokens=10e9 --price=2.50
$ python plan.py --n_layer=48 --n_head=25 --n_embd=1600 --batch_size=8 --gpu=h200 --gpus=4 --json
$ python plan.py config/train_gpt2_1.5B.py --gpu=h100 --gpus=8 --largest=batch
$ python plan.py config/train_gpt2.py --gpu=h200 --gpus=8 --picture=plan.png

Takes train.py's flags and config files, and the flags below. --trainer selects a trainer, and so do flags
such as --use_fsdp=True and --model_dir=../phase2_triton. The exit status is 1 if the selected trainer does not fit, or,
if none is selected, if no trainer fits. It is 2 if a flag is wrong. docs/planner.md explains the columns and every
formula, and states how far the numbers are from measured ones.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace

ROOT = os.path.dirname(os.path.realpath(__file__))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'nanoGPT')]
from planner import measured, options, plan, report
from planner.gpus import GIB, GPUS, find_gpu

from configurator import configure, run_config_file
from errors import UserError
from shell import python_command

# -----------------------------------------------------------------------------
FLAGS = {  # name: (default, help)
    'gpu': ('h100', f'kind of GPU: {", ".join(GPUS)}'),
    'gpu_memory': (0.0, 'GiB of memory that the run may use on each GPU; 0: all that this kind has'),
    'gpus': (1, 'number of GPUs on all machines together'),
    'trainer': ('', f'trainer to plan: {", ".join(options.NAMES)}, or a folder such as phase3_fsdp'),
    'tokens': (0.0, 'tokens to train on, for hours and cost; 0: max_iters iterations'),
    'price': (0.0, 'price per GPU and hour, for the cost'),
    'network': (50.0, 'GB/s per GPU between machines, one direction; 50 is 400 Gb/s'),
    'vocab_size': (50304, "rows of the embedding; train.py takes it from the data set's meta.pkl"),
    'json': (False, 'print one JSON object'),
    'largest': ('', 'model or batch: the most layers, or sequences in a micro-step, that fit with each trainer'),
    'picture': ('', 'write a picture to this file: memory for each trainer, tokens/s from 1 to 1,024 GPUs'),
}
# -----------------------------------------------------------------------------
LIMIT = 1e15  # of these flags, so that no result overflows


def print_help():
    print(__doc__.strip() + '\n\nFlags, written --key=value, with their defaults:')
    for name, (default, text) in FLAGS.items():
        print(f'  {f"--{name}={default}":<22} {text}')
    train = os.path.join(ROOT, 'nanoGPT', 'train.py')
    print(
        "The flags of train.py, and of the same script in the other trainers' folders:\n"
        f'  {python_command(train, "--help")}'
    )


def parse():
    """
    Returns (config, flags_set, train.py's own arguments, the flags that config files set). Raises UserError, like
    train.py.
    """
    own = {name: default for name, (default, _) in FLAGS.items()}
    script = os.path.join(ROOT, 'nanoGPT', 'train.py')
    namespace = {'__file__': script, **options.train_flags(), **options.kernel_flags(), **own}
    with redirect_stdout(sys.stderr):  # notes about flags must not mix with --json
        config, flags_set = configure(namespace)
    arguments = [arg for arg in sys.argv[1:] if arg[2:].split('=')[0] not in own or not arg.startswith('--')]
    in_files = {}
    for path in (arg for arg in arguments if not arg.startswith('--')):
        in_files |= run_config_file(path, config, script)
        for flag in in_files.keys() & own.keys():
            raise UserError(f'{path} sets {flag}, which train.py does not know: write --{flag}={config[flag]} instead')
    if config['largest'] not in ('', 'model', 'batch'):
        raise UserError(f"largest is '{config['largest']}', but it can be model or batch")
    if config['trainer'] not in ('', *options.NAMES, *options.FOLDERS.values()):
        raise UserError(f"trainer is '{config['trainer']}', but it can be {', '.join(options.NAMES)}")
    for flag in ('tokens', 'price', 'network', 'gpu_memory'):
        if not 0 <= config[flag] <= LIMIT:
            raise UserError(f'{flag}={config[flag]}, but it must be a number from 0 to {LIMIT:.0e}')
    for flag, least in (('network', 1 / LIMIT), ('vocab_size', 1)):
        if not config[flag] >= least:
            raise UserError(f'{flag}={config[flag]}, but it must be at least {least:g}')
    return config, flags_set, arguments, in_files


def resolve(config, flags_set):
    """Returns config, with the sizes of OpenAI's weights if init_from names them. Prints notes on unknown facts."""
    notes = []
    if config['init_from'] == 'resume':
        notes.append("init_from=resume: the model's sizes are those of the flags, not of the checkpoint")
    elif config['init_from'] not in ('scratch', 'auto'):
        config = config | options.shape_of_pretrained(config['init_from'])
    dataset, folders = config['dataset'], ('', os.path.join(ROOT, 'nanoGPT', 'data'))
    has_meta = any(os.path.isfile(os.path.join(folder, dataset, 'meta.pkl')) for folder in folders)
    if (
        'vocab_size' not in flags_set
        and config['init_from'] in ('scratch', 'auto')
        and (has_meta or dataset.endswith('_char'))
    ):
        notes.append(f"vocab_size={config['vocab_size']} is GPT-2's; train.py takes {dataset}'s own: add --vocab_size")
    if os.path.basename(config['model_dir']) not in ('', *options.FOLDERS.values()):
        notes.append(
            f'model_dir={config["model_dir"]}: planned as nanoGPT/model.py, because plan.py does not read code'
        )
    if config['eval_only']:
        notes.append('eval_only=True: planned as training, which takes more memory and time')
    if config['dropout'] > 0:
        notes.append(f'dropout={config["dropout"]}: planned as 0, because runs with dropout were not measured')
    for note in notes:
        print(f'note: {note}', file=sys.stderr)
    return config


def main():
    if {'--help', '-h'} & set(sys.argv[1:]):
        return print_help()
    config, flags_set, arguments, in_files = parse()
    config = resolve(config, flags_set)
    gpu, gpus, network = find_gpu(config['gpu']), config['gpus'], config['network'] * 1e9
    if config['gpu_memory']:
        gpu = replace(gpu, memory_bytes=config['gpu_memory'] * GIB)
    found = plan.make_plan(config, gpu, gpus, network, measured.all_rows())
    if config['fp8']:
        reason = options.why_not_fp8(found['triton'].run, config)
        fp8 = f'not using FP8: {reason}' if reason else 'fp8=True: only in the rows with triton'
        print(f'note: {fp8}', file=sys.stderr)
    asked = options.asked_for(config, flags_set, in_files)
    another = asked and options.folder_of(asked) != 'phase3_fsdp' and 'ckpt_format' not in in_files
    if config['ckpt_format'] == 'sharded' and (gpus == 1 or not config['use_fsdp'] or another):
        raise UserError('ckpt_format=sharded needs FSDP: several processes under torchrun, and use_fsdp=True')
    if asked and asked not in found:
        raise UserError(f'trainer={asked} needs 4 GPUs or more, in two equal groups or more; gpus is {gpus}')
    tokens = config['tokens'] or config['max_iters'] * next(iter(found.values())).run.tokens_per_iter
    best = plan.recommend(found, in_files)
    fits = found[asked].fits if asked else best is not None
    way_out = None if fits else plan.change_that_fits(config, gpu, gpus, network, in_files)
    if config['picture']:  # first, because it may fail
        report.draw(found, config, gpu, gpus, network, config['picture'])

    if config['json']:
        result = report.as_json(found, config, gpu, gpus, best, arguments, in_files, tokens)
        if config['largest']:
            result['largest'] = report.largest_of(config['largest'], found, config, gpu, gpus, network)
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        print(report.as_text(found, config, gpu, gpus, tokens, asked, best, arguments, in_files, way_out))
        if config['largest']:
            print(report.largest_text(config['largest'], found, config, gpu, gpus, network))
    return 0 if fits else 1


if __name__ == '__main__':
    try:
        sys.exit(main())
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as in `plan.py | head`
        os._exit(141)
