"""
Draws who holds what at rest: bytes per parameter on each of four ranks, under DDP and ZeRO stages 1, 2 and 3.

    python docs/pictures/who_holds_what.py       # writes docs/pictures/who_holds_what.svg
"""

from style import FOLDER, GRADIENTS, GREY, MOMENTS, WEIGHTS, plt, save

RANKS = 4
STATE = [('weight', 4, WEIGHTS), ('gradient', 4, GRADIENTS), ("AdamW's moments", 8, MOMENTS)]  # bytes, float32
SCHEMES = [('DDP', 0), ('ZeRO-1', 1), ('ZeRO-2', 2), ('ZeRO-3 (FSDP)', 3)]  # how many, from the last, are sharded


def draw(path=FOLDER / 'who_holds_what.svg'):
    figure, axes = plt.subplots(1, 4, figsize=(11, 4.6), sharey=True)
    for axis, (name, sharded) in zip(axes, SCHEMES):
        total = 0
        for i, (label, size, colour) in enumerate(STATE):
            bottom, cut = sum(s for _, s, _ in STATE[:i]), i >= len(STATE) - sharded
            share = size / RANKS if cut else size
            total += share
            for rank in range(RANKS):
                start = bottom + rank * share if cut else bottom
                axis.bar(rank, size, 0.8, bottom, color='none', edgecolor=GREY, linewidth=0.8, linestyle=':')
                axis.bar(rank, share, 0.8, start, color=colour, label=label if rank == 0 else None)
        axis.set_title(f'{name}\n{total:g} bytes', fontsize=15)
        axis.set_xticks(range(RANKS), [f'rank {rank}' if rank == 0 else str(rank) for rank in range(RANKS)])
        axis.tick_params(axis='x', length=0)
    axes[0].set_ylabel('bytes per parameter')
    axes[0].set_yticks([0, 4, 8, 12, 16])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc='outside lower center', ncols=3, frameon=False)
    save(figure, path)


if __name__ == '__main__':
    draw()
