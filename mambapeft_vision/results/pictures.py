"""Pictures of one run: its training curves, its confusion matrix and a page of test images with predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mambapeft_vision.results.plots import confusion_matrix, save, training_curves
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.utils.atomic import atomic_path

PAGE_FILE, CURVES_FILE, CONFUSION_FILE = "predictions.png", "curves.png", "confusion.png"

# Okabe and Ito's green and orange: told apart with any kind of colour blindness.
RIGHT, WRONG = "#009E73", "#D55E00"
COLUMNS, ROWS = 8, 4


def draw_from_files(folder: Path, *, title: str, num_classes: int) -> None:
    """Draws what metrics.csv and predictions.npz of a run's folder tell: curves.png and confusion.png."""
    if (folder / "metrics.csv").is_file():
        save(training_curves({title: folder}), folder / CURVES_FILE)
    if (folder / "predictions.npz").is_file():
        save(confusion_matrix(folder, title, num_classes), folder / CONFUSION_FILE)


def run_title(record: RunRecord) -> str:
    return f"{'+'.join(record.methods)} on {record.task}, seed {record.seed}"


def pictures_of(folder: Path) -> dict[str, Path]:
    """The pictures that there are in a run's folder, by name."""
    files = {"predictions": PAGE_FILE, "curves": CURVES_FILE, "confusion": CONFUSION_FILE}
    return {name: folder / file for name, file in files.items() if (folder / file).is_file()}


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
