"""
Draws where the memory of a micro-step is, for GPT-2 124M on one GPU: derived tensor by tensor (planner/memory.py), next
to the measured peak (benchmarks/results/memory_h200.json).

    python docs/pictures/activations.py    # writes activations.svg, prints the table of docs/activations.md
"""

import json

from style import BLUE, FOLDER, GREEN, GREY, ORANGE, PINK, RED, SKY, plt, save

ROOT = FOLDER.parent.parent
GIB = 2**30
H, LAYERS, HEADS, VOCAB, CONTEXT = 768, 12, 12, 50304, 1024
PARAMETERS = 124_373_760


def parts(sequences, workspace=0.063 * GIB):
    """
    Returns {part: bytes} of DDP's compiled model in the second micro-step on one GPU; docs/activations.md derives it.
    """
    tokens = sequences * CONTEXT
    return {
        'weights, gradients,\nAdamW': 16 * PARAMETERS,
        'weights in 16 bits': 2 * PARAMETERS,
        'blocks: LayerNorm': tokens * LAYERS * (12 * H + 16),
        'blocks: attention': tokens * LAYERS * (8 * H + 4 * HEADS),
        'blocks: MLP': tokens * LAYERS * 16 * H,
        'vocabulary': 6 * tokens * VOCAB,
        'outside the blocks,\nworkspace': tokens * (6 * H + 16) + workspace,
    }


def measured(sequences):
    """Returns the allocated bytes of the run that parts() describes: DDP's model, compiled, without CUDA graphs."""
    report = json.loads((ROOT / 'benchmarks/results/memory_h200.json').read_text())
    rows = [
        row['allocated']
        for row in report['rows']
        if (row['trainer'], row['size'], row['batch_size'], row['block_size']) == ('ddp', '124M', sequences, CONTEXT)
        and row['options'] == {'cuda_graph': False}
    ]
    (allocated,) = rows
    return allocated


def table():
    """Returns the table of docs/activations.md: derived and measured bytes; a test compares them."""
    lines = [
        '| sequences of 1024 | derived, bytes | measured peak, bytes | difference | vocabulary |',
        '|---|---|---|---|---|',
    ]
    for sequences in (1, 12, 32):
        derived, peak = sum(parts(sequences).values()), measured(sequences)
        share = parts(sequences)['vocabulary'] / derived
        difference = f'{derived / peak - 1:+.2%}'.replace('-0.00', '0.00')
        lines.append(f'| {sequences} | {derived:,.0f} | {peak:,} | {difference} | {share:.0%} |')
    return '\n'.join(lines)


def draw(path=FOLDER / 'activations.svg'):
    figure, axis = plt.subplots(figsize=(11, 4))
    names, colours = list(parts(1)), [BLUE, SKY, GREEN, ORANGE, RED, PINK, GREY]
    batches = [1, 12, 32]
    for y, sequences in enumerate(batches):
        left = 0.0
        for name, colour in zip(names, colours):
            size = parts(sequences)[name] / GIB
            axis.barh(y, size, 0.6, left, color=colour, edgecolor='white', label=name if y == 0 else None)
            left += size
        share = parts(sequences)['vocabulary'] / sum(parts(sequences).values())
        peak = measured(sequences) / GIB
        axis.plot(
            [peak, peak], [y - 0.42, y + 0.42], color='black', linewidth=2, label='measured peak' if y == 0 else None
        )
        axis.text(peak + 0.2, y, f'{peak:.2f} GiB\nvocabulary {share:.0%}', va='center')
    axis.set_yticks(range(len(batches)), [f'{n} × 1024 tokens' for n in batches])
    axis.tick_params(axis='y', length=0)
    axis.set_xlabel('GiB')
    axis.set_xlim(0, 25.5)
    axis.invert_yaxis()
    axis.legend(loc='upper right', frameon=False, fontsize=11, ncols=2)
    save(figure, path)


if __name__ == '__main__':
    draw()
    print(table())
