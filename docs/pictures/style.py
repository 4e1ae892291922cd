"""Colours and sizes of all pictures. The colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    '#000000 #999999 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7'.split()
)
WEIGHTS, GRADIENTS, MOMENTS = BLUE, ORANGE, GREEN  # the same colours in every picture

plt.rcParams.update(
    {
        'font.size': 13,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'svg.hashsalt': 'chapters',  # makes the file reproducible
        'svg.fonttype': 'path',  # looks the same on machines without the font
        'figure.constrained_layout.use': True,
    }
)


def save(figure, path: Path):
    figure.savefig(path, metadata={'Date': None}, facecolor='white')
    plt.close(figure)
