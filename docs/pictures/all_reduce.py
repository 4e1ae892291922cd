"""
All-reduce = reduce-scatter + all-gather, in numbers: four ranks, four elements each.

    python docs/pictures/all_reduce.py       # writes docs/pictures/all_reduce.svg
"""

from style import BLUE, FOLDER, GREEN, GREY, ORANGE, RED, plt, save

GRADIENTS = [[1, 2, 3, 4], [5, 1, 0, 2], [2, 2, 6, 1], [0, 4, 2, 7]]  # one row per rank
COLOURS = [BLUE, ORANGE, GREEN, RED]  # for the rank that owns an element


def draw(path=FOLDER / 'all_reduce.svg'):
    ranks = range(len(GRADIENTS))
    sums = [sum(column) for column in zip(*GRADIENTS)]
    steps = [
        ('each rank: its own gradients', GRADIENTS),
        (
            'after reduce-scatter:\nthe sum of its own element',
            [[sums[i] if i == r else None for i in ranks] for r in ranks],
        ),
        ('after all-gather:\nall sums', [sums for _ in ranks]),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4))
    for axis, (title, rows) in zip(axes, steps):
        for rank, row in enumerate(rows):
            for i, value in enumerate(row):
                axis.add_patch(
                    plt.Rectangle(
                        (i + 0.04, -rank - 0.9),
                        0.92,
                        0.8,
                        facecolor='none' if value is None else COLOURS[i],
                        alpha=None if value is None else 0.45 if rows is GRADIENTS else 0.85,
                        edgecolor=GREY if value is None else 'none',
                        linestyle=':',
                    )
                )
                if value is not None:
                    axis.text(i + 0.5, -rank - 0.5, value, ha='center', va='center', fontsize=18)
        axis.set_xlim(-0.05, 4.05)
        axis.set_ylim(-4, 0)
        axis.set_title(title, fontsize=14)
        axis.set_xticks([])
        axis.set_yticks([-rank - 0.5 for rank in ranks], [f'rank {rank}' for rank in ranks] if axis is axes[0] else [])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    save(figure, path)


if __name__ == '__main__':
    draw()
