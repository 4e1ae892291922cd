"""
Who computes and who communicates, and when, in one iteration of GPT-2 1.5B with DDP and with FSDP, as recorded by
record.py on two GPUs.

    python docs/pictures/timeline.py       # writes docs/pictures/timeline.svg from timeline.json
"""

import json

from style import BLUE, FOLDER, GREEN, ORANGE, PINK, RED, SKY, plt, save

KINDS = {  # phases of the computation, and NCCL's collectives
    'forward': ('forward', BLUE),
    'backward': ('backward', SKY),
    'optimizer': ('clipping, AdamW', GREEN),
    'AllReduce': ('all-reduce', ORANGE),
    'AllGather': ('all-gather', PINK),
    'ReduceScatter': ('reduce-scatter', RED),
}
NAMES = {'ddp': 'DDP', 'fsdp': 'FSDP'}


def intervals_of(gpu):
    """Returns {kind: [(start, milliseconds)]} of one GPU's record."""
    found = {kind: [(a, b - a) for a, b in gpu.get(kind, ())] for kind in KINDS}
    for name, a, b in gpu['communication']:
        if name in found:
            found[name].append((a, b - a))
    return found


def draw(path=FOLDER / 'timeline.svg'):
    record = json.loads((FOLDER / 'timeline.json').read_text())
    figure, axes = plt.subplots(2, 1, figsize=(11, 6.2), sharex=True)
    for axis, (trainer, name) in zip(axes, NAMES.items()):
        gpus = record[trainer]
        rows = [f'GPU {i} {does}' for i in range(len(gpus)) for does in ('computes', 'communicates')]
        for i, gpu in enumerate(gpus):
            for kind, its in intervals_of(gpu).items():
                row = 2 * i + (kind not in ('forward', 'backward', 'optimizer'))
                axis.broken_barh(its, (row - 0.4, 0.8), facecolor=KINDS[kind][1], linewidth=0)
        end = max(b for gpu in gpus for *_, b in gpu['optimizer'] + gpu['communication'])
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.tick_params(axis='y', length=0)
        axis.set_title(f'{name}: {end:.0f} ms', loc='left', fontsize=14)
    axes[-1].set_xlabel('milliseconds since the start of the iteration')
    axes[-1].set_xlim(0)
    marks = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in KINDS.values()]
    labels = [label for label, _ in KINDS.values()]
    figure.legend(marks, labels, loc='outside lower center', ncols=6, frameon=False, fontsize=11)
    save(figure, path)


if __name__ == '__main__':
    draw()
