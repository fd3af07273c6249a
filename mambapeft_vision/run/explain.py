"""`mambapeft explain`: which parts of an image a prediction rests on, found by covering them one by one.

Occlusion sensitivity (Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2): a square is filled with the image's mean
colour, and the fall of the class's probability says how important it was. Predictions are all that this needs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mambapeft_vision.adapter.predict import Prediction, batched, predictions, prepared
from mambapeft_vision.results.plots import figure_text, save
from mambapeft_vision.run.trained import TrainedModel
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import shown
from mambapeft_vision.utils.typed import nearest

_BATCH = 64


@dataclass(frozen=True)
class Explanation:
    """What an image's prediction rests on.

    Args:
        pixels: uint8 [C, H, W], as the model sees the image.
        importance: float32 [grid, grid]: the fall of the probability of the class where a square is covered.
        class_name: the class that `importance` is about.
        probability: the probability of this class for the whole image.
    """

    prediction: Prediction
    pixels: np.ndarray
    importance: np.ndarray
    class_name: str
    probability: float


def explain(trained: TrainedModel, image: Path, *, grid: int = 14, class_name: str | None = None) -> Explanation:
    """Covers `grid` x `grid` squares of an image one by one.

    Args:
        class_name: the class to explain; None: the most probable one.

    Raises: UserError for an image that cannot be read, an unknown class, and squares smaller than a pixel.
    """
    pixels = prepared(image, str(image), trained.preprocessing)
    if not 1 <= grid <= min(pixels.shape[1:]):
        raise UserError(f"--grid {grid}: expected 1 to {min(pixels.shape[1:])}, the pixels of a side")
    shares = trained.probabilities([pixels])
    (prediction,) = predictions(trained.model, [str(image)], shares, top=5)
    label = prediction.label if class_name is None else _label_of(trained, class_name)
    importance = occlusion(trained, pixels, label, float(shares[0, label]), grid)
    name = prediction.class_name if class_name is None else class_name
    return Explanation(prediction, pixels, importance, name, float(shares[0, label]))


def occlusion(trained: TrainedModel, pixels: np.ndarray, label: int, whole: float, grid: int) -> np.ndarray:
    """The fall of the probability of `label` when a square is covered, for each square: float32 [grid, grid].

    whole: that probability with nothing covered.
    """
    colour = pixels.mean(axis=(1, 2), keepdims=True).round().astype(np.uint8)
    rows, columns = (np.linspace(0, side, grid + 1).round().astype(int) for side in pixels.shape[1:])
    falls: list[float] = []
    for batch in batched(((row, column) for row in range(grid) for column in range(grid)), _BATCH):
        covered = np.repeat(pixels[None], len(batch), axis=0)
        for copy, (row, column) in zip(covered, batch, strict=True):
            copy[:, rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = colour
        falls += (whole - trained.probabilities(list(covered))[:, label]).tolist()
    return np.array(falls, dtype=np.float32).reshape(grid, grid)


def draw(found: Explanation, path: Path) -> None:
    """A PNG: the image, and a map of evidence for the class (orange) and against it (purple)."""
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    plain_axes, axes = figure.subplots(1, 2)
    grey = len(found.pixels) < 3
    image = found.pixels[0] if grey else found.pixels[:3].transpose(1, 2, 0)
    extent = (0, image.shape[1], image.shape[0], 0)
    plain_axes.imshow(image, cmap="gray" if grey else None, vmin=0, vmax=255, extent=extent)
    plain_axes.set_title(figure_text(f"{found.prediction.class_name}: {found.prediction.probability:.0%}"))
    luminance = image if grey else image.mean(axis=2)
    axes.imshow(luminance, cmap="gray", vmin=0, vmax=255, extent=extent)
    most = max(float(np.abs(found.importance).max()), 1e-6)
    heat = axes.imshow(found.importance, cmap="PuOr_r", vmin=-most, vmax=most, alpha=0.6, extent=extent)
    figure.colorbar(heat, ax=axes, shrink=0.8, label="fall of the probability where covered")
    axes.set_title(figure_text(f"what speaks for {found.class_name} ({found.probability:.0%})"))
    for each in (plain_axes, axes):
        each.set_axis_off()
    save(figure, path, dpi=110)


def _label_of(trained: TrainedModel, class_name: str) -> int:
    names = trained.model.class_names or tuple(map(str, range(trained.model.backbone.num_classes)))
    if class_name not in names:
        raise UserError(f"--class {shown(class_name)} is no class of the model; {nearest(class_name, names)}")
    return names.index(class_name)
