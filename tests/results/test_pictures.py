"""The page of predictions."""

import numpy as np
import pytest
from PIL import Image

from mambapeft_vision.results.pictures import RIGHT, WRONG, page_of_predictions


def pixels_of(path, colour: str) -> int:
    """How many pixels are close to a colour (text is antialiased)."""
    with Image.open(path) as image:
        page = np.asarray(image.convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(page - wanted).max(axis=-1) < 12).sum())


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("right", [True, False])
def test_colours_tell_right_from_wrong(tmp_path, count, right):
    images = np.full((count, 3, 8, 8), 128, dtype=np.uint8)
    labels = [3] * count
    predicted = labels if right else [5] * count
    page_of_predictions(images, predicted, labels, tmp_path / "page.png", title="a page")
    shown, absent = (RIGHT, WRONG) if right else (WRONG, RIGHT)
    assert pixels_of(tmp_path / "page.png", shown) > 20 * count
    assert pixels_of(tmp_path / "page.png", absent) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["page.png"]


def test_images_are_drawn_as_they_are(tmp_path):
    image = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    image[0, 2] = 255  # blue
    page_of_predictions(image, [0], [0], tmp_path / "page.png", title="")
    assert pixels_of(tmp_path / "page.png", "#0000ff") > 1000
