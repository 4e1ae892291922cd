"""Formats plan.py's output: the tables, the recommendation, the JSON object and the picture."""

import os

from errors import UserError
from planner import memory, options, plan, speed
from planner.gpus import GIB
from planner.memory import COMPONENTS
from replaced import replaced
from shell import pip_install

TITLES = {
    'parameters': 'param.',
    'gradients': 'grad.',
    'optimizer': 'AdamW',
    'activations': 'activ.',
    'logits': 'logits',
    'gathered_units': 'gathered',
    'half_copies': '16-bit',
    'graph_pools': 'graphs',
    'allocator': 'alloc.',
}


def gib(size):
    return f'{size / GIB:.2f}'


def as_json(found, config, gpu, gpus, best, arguments, in_files, tokens):
    """
    Returns plan.py's JSON object as a dict. in_files: flags that config files set; a trainer that does not know all of
    them has no command.
    """
    trainers, price = {}, config['price']
    for name, e in found.items():
        hours = e.hours(tokens)
        trainers[name] = {
            'memory_bytes': {key: round(value) for key, value in e.memory_bytes.items()},
            'fits': e.fits,
            'tokens_per_sec': round(e.tokens_per_sec),
            'low': round(e.low),
            'high': round(e.high),
            'basis': e.basis,
            'context_bytes': round(e.context_bytes),
            'memory_low': round(e.memory_low),
            'memory_high': round(e.memory_high),
            'memory_basis': e.memory_basis,
            'tight': e.tight,
            'mfu': round(e.mfu, 4),
            'hours': round(hours, 3),
            'cost': round(hours * gpus * price, 2) if price else None,
            'command': options.command(name, e.run, arguments, config)
            if options.known_to(name).issuperset(in_files)
            else None,
        }
    return {
        'gpu': gpu.name,
        'gpus': gpus,
        'gpu_memory_bytes': round(gpu.memory_bytes),
        'tokens': tokens,
        'recommended': best.name if best else None,
        'trainers': trainers,
    }


def table(header, rows):
    """Returns an aligned table: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[0] = line[0].ljust(widths[0])
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)


def memory_table(found, gpu):
    header = [
        'GiB per GPU',
        *(TITLES[key] for key in COMPONENTS),
        'reserved',
        'context',
        f'of {gib(gpu.memory_bytes)}',
        'basis',
    ]
    rows = []
    for name, e in found.items():
        verdict = 'tight' if e.tight else 'fits' if e.fits else 'DOES NOT FIT'
        cells = [gib(e.memory_bytes[key]) for key in (*COMPONENTS, 'total')]
        rows.append([name, *cells, gib(e.context_bytes), verdict, e.memory_basis])
    return table(header, rows)


def speed_table(found, tokens, gpus, price):
    header = ['speed', 'tokens/s', 'range', 'MFU', 'hours', *['cost'] * bool(price), 'basis']
    rows = []
    for name, e in found.items():
        if not e.fits:
            rows.append([name, *['-'] * (len(header) - 2), 'does not fit'])
            continue
        hours = e.hours(tokens)
        cost = [f'{hours * gpus * price:,.2f}'] * bool(price)
        bounds = f'{e.low:,.0f} to {e.high:,.0f}'
        rows.append([name, f'{e.tokens_per_sec:,.0f}', bounds, f'{e.mfu:.1%}', f'{hours:,.2f}', *cost, e.basis])
    return table(header, rows)


def without_doubles(found):
    """Returns found without trainers that run like an earlier one, as on one GPU, and a line about them or ''."""
    alike = {}
    for name, e in found.items():
        alike.setdefault(e.run, []).append(name)
    doubles = [f'{", ".join(names)} like {first}' for first, *names in alike.values() if names]
    one_gpu = next(iter(alike)).gpus == 1
    if one_gpu and ['fsdp+checkpointing'] in alike.values():
        doubles.append('fsdp+checkpointing like ddp with --activation_checkpointing')
    start = 'One GPU shards nothing, so these run alike: ' if one_gpu else 'These run alike: '
    line = f'{start}{"; ".join(doubles)}.' if doubles else ''
    return {names[0]: found[names[0]] for names in alike.values()}, line


def machines_memory(e):
    """Returns a clause about the memory of each machine that CPU offload takes, or ''."""
    return f"; it takes {memory.offloaded(e.run) / GIB:,.0f} GiB of each machine's memory" if e.run.offload else ''


def advice(found, config, gpu, gpus, asked, best, arguments, in_files, way_out):
    """Returns one paragraph: the command to run and why, or the change that makes it fit."""
    if way_out:
        flags, count, e = way_out
        changed = [f'--{key}={value}' for key, value in flags.items()]
        kept = [arg for arg in arguments if arg[2:].split('=')[0] not in flags or not arg.startswith('--')]
        problem = f'{asked} does not fit' if asked else 'No trainer fits'
        more = f'{count} GPUs' * (count != gpus)
        steps = ', '.join(filter(None, [more, e.name, *changed]))
        return (
            f'{problem} on {gpus} × {gpu.name}. The smallest change that fits: {steps} '
            f'({gib(e.memory_bytes["total"])} GiB reserved{", tight" * e.tight}, {e.tokens_per_sec:,.0f} tokens/s'
            f'{machines_memory(e)}):\n'
            f'  {options.command(e.name, e.run, [*kept, *changed], config | flags)}'
        )
    if asked and not found[asked].fits:
        problem = f'{asked} does not fit on {gpus} × {gpu.name}, nor does any trainer on up to 1,024 GPUs'
        return f'{problem}: use a smaller model.'
    if not best:
        return f'No trainer fits on {gpus} × {gpu.name}, nor on up to 1,024 of them: use a smaller model.'
    possible = [e for e in found.values() if e.fits and options.known_to(e.name).issuperset(in_files)]
    others = [e for e in possible if e.tokens_per_sec > best.tokens_per_sec]
    why = 'the fastest that fits'
    if any(best.tight or not e.tight for e in others):  # recommend() passes over tight runs only for one with room
        why = 'within 2% of the fastest that fits, and simpler'
    elif others:
        why = 'the fastest that fits with room to spare'
    room = (gpu.memory_bytes - best.context_bytes - best.memory_bytes['total']) / GIB
    left = (
        'it fits only because torch gives unused memory back' if best.tight else f'{room:.1f} GiB of each GPU stay free'
    )
    return (
        (f'{asked} fits. ' if asked and asked != best.name else '')
        + f'Recommended: {best.name}, {why}; {left}{machines_memory(best)}:\n'
        f'  {options.command(best.name, best.run, arguments, config)}'
    )


def as_text(found, config, gpu, gpus, tokens, asked, best, arguments, in_files, way_out):
    first = next(iter(found.values())).run
    steps = f'{first.micro_steps} micro-step{"s" * (first.micro_steps > 1)}'
    title = (
        f'{first.parameters / 1e6:,.0f}M parameters, {gpus} × {gpu.device_name}, '
        f'{first.batch_size} × {first.block_size} tokens per GPU and micro-step, {steps}, '
        f'{first.tokens_per_iter:,} tokens per iteration, {tokens:,.0f} in all'
    )
    shown, doubles = without_doubles(found)
    parts = [title, memory_table(shown, gpu), speed_table(shown, tokens, gpus, config['price'])]
    parts += [doubles] if doubles else []
    if gpus > gpu.per_machine:
        parts.append(f'Between machines of {gpu.per_machine}: {config["network"]:g} GB/s per GPU (--network).')
    parts.append(advice(found, config, gpu, gpus, asked, best, arguments, in_files, way_out))
    return '\n\n'.join(parts)


def largest_of(what, found, config, gpu, gpus, network):
    """Returns {trainer: {n_layer or batch_size: the most that fits or 0, 'parameters': of that model}}."""
    key = {'model': 'n_layer', 'batch': 'batch_size'}[what]
    result = {}
    for name in found:
        number, e = plan.largest(what, name, config, gpu, gpus, network)
        result[name] = {key: number, 'parameters': e.run.parameters if e else 0}
    return result


def largest_text(what, found, config, gpu, gpus, network):
    lines = []
    for name, most in largest_of(what, found, config, gpu, gpus, network).items():
        if not any(most.values()):
            text = 'none'
        elif what == 'batch':
            text = f'{most["batch_size"]} × {config["block_size"]}'
        else:
            text = f'{most["n_layer"]} layers, {most["parameters"] / 1e9:.2f} billion parameters'
        lines.append([name, text])
    unit = 'sequences in a micro-step' if what == 'batch' else f'blocks of width {config["n_embd"]}'
    return '\n' + table([f'the most {unit} that fit', ''], lines)


COLOURS = ('#0072B2', '#56B4E9', '#004466', '#E69F00', '#F0E442', '#009E73', '#CC79A7', '#D55E00', '#BBBBBB', '#666666')


def scaling(config, gpu, name, network):
    """Returns [(number of GPUs, tokens/s)] of a trainer where it fits, with unchanged micro-steps per GPU."""
    steps = options.micro_steps_of(config, config['gpus'])
    points = []
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        run = options.make_run(name, config | {'fsdp_shard_size': 0}, gpu, count, steps)
        if run and plan.estimate(name, run, network).fits:
            points.append((count, speed.tokens_per_sec(run, network=network)))
    return points


def draw(found, config, gpu, gpus, network, path):
    """Writes the picture. Raises UserError without matplotlib."""
    if os.path.isdir(path) or path.endswith(('/', os.sep)):
        raise UserError(f'--picture={path} is a folder: name a file in it')
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError(
            f'--picture needs the package matplotlib, which is not installed: {pip_install("matplotlib")}'
        ) from None

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, (memory_axis, speed_axis, each_axis) = plt.subplots(1, 3, figsize=(17, 5.5))
    names, left = list(found), [0.0] * len(found)
    for key, colour in zip((*COMPONENTS, 'context'), COLOURS):
        sizes = [(e.context_bytes if key == 'context' else e.memory_bytes[key]) / GIB for e in found.values()]
        label = '16-bit weights' if key == 'half_copies' else key.replace('_', ' ')
        memory_axis.barh(names, sizes, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, sizes)]
    memory_axis.axvline(
        gpu.memory_bytes / GIB, color='black', linewidth=1.5, label=f'{gpu.name}: {gib(gpu.memory_bytes)} GiB'
    )
    memory_axis.invert_yaxis()
    memory_axis.set_xlabel(f'GiB per GPU, {gpus} GPUs')
    memory_axis.legend(fontsize=8, frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=4)
    for name, colour, marker in zip(names, COLOURS, 'osD^v<>Px'):
        points = scaling(config, gpu, name, network)
        look = dict(color=colour, marker=marker, markersize=4, label=name)
        speed_axis.plot([count for count, _ in points], [rate for _, rate in points], **look)
        each_axis.plot([count for count, _ in points], [rate / count / 1e3 for count, rate in points], **look)
    for axis, label in ((speed_axis, 'tokens/s'), (each_axis, 'thousand tokens/s per GPU')):
        axis.axvline(gpu.per_machine, color='black', linewidth=0.8, linestyle=':')
        axis.set(xscale='log', ylabel=label)
        axis.set_xlabel(f'GPUs; beyond {gpu.per_machine}: {config["network"]:g} GB/s for each GPU between machines')
        axis.set_xticks([4**i for i in range(6)], [str(4**i) for i in range(6)])
    speed_axis.set_yscale('log')
    each_axis.set_ylim(bottom=0)
    speed_axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    try:
        with replaced(path if os.path.splitext(path)[1] else f'{path}.png') as temporary:
            figure.savefig(temporary, dpi=110)
    except (OSError, ValueError) as error:  # no such folder, or a format that matplotlib does not know
        raise UserError(f'--picture={path}: {error}') from None
