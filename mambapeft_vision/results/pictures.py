"""Pictures of one run: its training curves, its confusion matrix and a page of test images with predictions."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mambapeft_vision.results.layout import CONFUSION_FILE, CURVES_FILE, METRICS_FILE, PREDICTIONS_FILE
from mambapeft_vision.results.plots import confusion_matrix, drawn, figure_text, save, save_png, training_curves
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.utils.text import plain

# Okabe and Ito's green and orange: told apart with any kind of colour blindness.
RIGHT, WRONG = "#009E73", "#D55E00"
COLUMNS, ROWS = 8, 4


def draw_from_files(folder: Path, *, title: str, num_classes: int | None = None) -> None:
    """Draws curves.png and confusion.png from metrics.csv and predictions.npz of a run's folder.

    A picture that cannot be drawn or written is left out and named on stderr; it must not fail the run.
    """
    figures = {
        METRICS_FILE: (CURVES_FILE, partial(training_curves, {title: folder})),
        PREDICTIONS_FILE: (CONFUSION_FILE, partial(confusion_matrix, folder, title, num_classes)),
    }
    for source, (target, draw) in figures.items():
        if (folder / source).is_file() and (content := drawn(target, draw)) is not None:
            _write(content, folder / target)


def _write(content: bytes, path: Path) -> None:
    try:
        save_png(content, path)
    except OSError as error:
        print(f"warning: {plain(path)} is not written ({error.strerror})", file=sys.stderr)


def run_title(record: RunRecord) -> str:
    """The title of a run's pictures: methods, task and seed."""
    return f"{'+'.join(record.methods)} on {record.task}, seed {record.seed}"


def page_of_predictions(
    images: np.ndarray,
    predicted: Sequence[int],
    labels: Sequence[int],
    path: str | Path,
    *,
    title: str,
    class_names: Sequence[str] | None = None,
) -> None:
    """A page of up to 32 images, each with its predicted label, and the true one where they differ.

    Args:
        images: uint8 [n, 3, H, W].
        predicted, labels: n class numbers each.
        path: path of the PNG, written atomically.
        class_names: by number; without them the numbers are shown.
    """
    figure = Figure(figsize=(COLUMNS * 1.25, ROWS * 1.55 + 0.5), layout="constrained")
    figure.suptitle(figure_text(title))
    for place, axes in enumerate(figure.subplots(ROWS, COLUMNS).flat):
        axes.set_axis_off()
        axes.set(xticks=[], yticks=[])  # else their places are computed all the same, in more time than all the rest
        if place < len(images):
            _draw(axes, images[place], int(predicted[place]), int(labels[place]), class_names)
    save(figure, path, dpi=110)


def _draw(axes: Axes, image: np.ndarray, predicted: int, label: int, names: Sequence[str] | None) -> None:
    right = predicted == label
    # Grey images have one channel; of more than three the first three are shown.
    grey = len(image) < 3
    pixels = image[0] if grey else image[:3].transpose(1, 2, 0)
    axes.imshow(pixels, interpolation="nearest", cmap="gray" if grey else None, vmin=0, vmax=255)
    was, true = (str(k) if names is None else figure_text(short_name(names[k])) for k in (predicted, label))
    # Signs as well as colours, for those who see no colours and for print.
    text = f"✓ {was}" if right else f"✗ {was}, is {true}" if names is None else f"✗ {was}\nis {true}"
    size = 10 if names is None else 7
    axes.set_title(text, color=RIGHT if right else WRONG, fontsize=size, fontweight="bold")


def short_name(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
