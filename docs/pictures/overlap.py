"""
Draws how communication overlaps computation in DDP's backward and FSDP's forward, recorded by record.py on two CPU
processes.

    python docs/pictures/overlap.py       # writes docs/pictures/overlap.svg from overlap.json
"""

import json

from style import BLUE, FOLDER, ORANGE, plt, save


def bars(axis, events, y, colour, label):
    for start, end in events:
        axis.barh(y, end - start, 0.7, start, color=colour, edgecolor='white', linewidth=1, label=label)
        label = None


def draw(path=FOLDER / 'overlap.svg'):
    record = json.loads((FOLDER / 'overlap.json').read_text())
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(11, 4.6))

    def between(trainer, prefix, start, end):
        return [
            (a, b) for name, a, b in record[trainer]['events'] if name.startswith(prefix) and a >= start and a < end
        ]

    ((start, end),) = between('ddp', 'backward', 0, 1e9)
    bars(top, [(start, end)], 1, BLUE, 'computation')
    bars(top, between('ddp', 'gloo', start, end), 0, ORANGE, 'communication')
    top.set_xlim(start, None)
    top.set_title('DDP, backward: a bucket of gradients is all-reduced as soon as it is full', fontsize=14, loc='left')
    ((start, end),) = between('fsdp', 'forward', 0, 1e9)
    blocks = between('fsdp', 'compute', start, end)
    bars(bottom, blocks, 1, BLUE, None)
    for i, (a, b) in enumerate(blocks):
        bottom.text((a + b) / 2, 1, i, ha='center', va='center', color='white')
    gathers = between('fsdp', 'gloo:all_gather', start, blocks[-1][1])
    bars(bottom, gathers, 0, ORANGE, None)
    for i, (a, b) in enumerate(gathers[1:]):  # the first is the root unit's
        bottom.text((a + b) / 2, 0, i, ha='center', va='center')
    bottom.set_xlim(gathers[0][0], blocks[-1][1])
    bottom.set_title('FSDP, forward: while block i computes, block i + 1 is gathered', fontsize=14, loc='left')
    for axis in (top, bottom):
        axis.set_yticks([0, 1], ['sent', 'computed'])
        axis.tick_params(axis='y', length=0)
        axis.set_xticks([])
        axis.spines['bottom'].set_visible(False)
    bottom.set_xlabel('time →')
    save(figure, path)


if __name__ == '__main__':
    draw()
