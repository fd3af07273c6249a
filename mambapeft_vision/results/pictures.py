"""Pictures of a run's predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mambapeft_vision.atomic import atomic_path

# Okabe and Ito's green and orange: told apart with any kind of colour blindness.
RIGHT, WRONG = "#009E73", "#D55E00"
COLUMNS, ROWS = 8, 4


def page_of_predictions(
    images: np.ndarray,
    predicted: Sequence[int],
    labels: Sequence[int],
    path: str | Path,
    *,
    title: str,
) -> None:
    """A page of up to 32 images, each with its predicted label, and the true one where they differ.

    Args:
        images: uint8 [n, 3, H, W].
        predicted, labels: n class numbers each.
        path: of the PNG, written atomically.
    """
    figure = Figure(figsize=(COLUMNS * 1.25, ROWS * 1.55 + 0.5), layout="constrained")
    figure.suptitle(title)
    for place, axes in enumerate(figure.subplots(ROWS, COLUMNS).flat):
        axes.set_axis_off()
        if place < len(images):
            _draw(axes, images[place], int(predicted[place]), int(labels[place]))
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110)


def _draw(axes, image: np.ndarray, predicted: int, label: int) -> None:
    right = predicted == label
    axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
    # Signs as well as colours, for those who see no colours and for print.
    text = f"✓ {predicted}" if right else f"✗ {predicted}, is {label}"
    axes.set_title(text, color=RIGHT if right else WRONG, fontsize=10, fontweight="bold")
