"""
Draws memory over one training step of DDP, ZeRO-1 and FSDP, recorded by record.py on two CPU processes.

    python docs/pictures/step_memory.py       # writes docs/pictures/step_memory.svg from step_memory.json
"""

import json
from itertools import pairwise

from style import BLACK, BLUE, FOLDER, GREY, plt, save

TITLES = {'ddp': 'DDP', 'zero1': 'ZeRO-1', 'fsdp': 'FSDP, each block a unit'}
MIB = 2**20


def draw(path=FOLDER / 'step_memory.svg'):
    record = json.loads((FOLDER / 'step_memory.json').read_text())
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True)
    for axis, (trainer, title) in zip(axes, TITLES.items()):
        its = record[trainer]
        edges = [its['phases'][name][0] for name in ('forward', 'backward', 'step')] + [its['phases']['step'][1]]
        # each phase gets the same width, because the durations on a busy CPU say nothing
        times = [place(t, edges) for t, _ in its['curve']]
        bytes_ = [n / MIB for _, n in its['curve']]
        axis.fill_between(times, bytes_, step='post', color=BLUE, alpha=0.35, linewidth=0)
        axis.step(times, bytes_, where='post', color=BLUE)
        rest = its['at_rest'] / MIB
        axis.axhline(rest, color=BLACK, linewidth=1, linestyle='--')
        per_parameter = its['at_rest'] / its['parameters'], its['peak'] / its['parameters']
        axis.text(
            0.04,
            rest - 6,
            f'at rest: {rest:.0f} MiB\n({per_parameter[0]:.1f} bytes per parameter)',
            va='top',
            fontsize=11,
            bbox={'color': '#A6CEE4', 'pad': 1},  # BLUE at the opacity of the area
        )
        axis.set_title(f'{title}\npeak: {its["peak"] / MIB:.0f} MiB', fontsize=14)
        for x in (1, 2):
            axis.axvline(x, color=GREY, linewidth=0.8)
        axis.set_xticks([0.5, 1.5, 2.5], ['forward', 'backward', 'AdamW'])
        axis.tick_params(axis='x', length=0)
        axis.set_xlim(0, 3)
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("MiB of one rank's tensors")
    save(figure, path)


def place(time, edges):
    """Maps a time to 0..3: a third of the axis for each phase."""
    for i, (start, end) in enumerate(pairwise(edges)):
        if time <= end:
            return i + max(0.0, (time - start) / (end - start))
    return 3.0


if __name__ == '__main__':
    draw()
