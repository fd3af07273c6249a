from pathlib import Path

import pytest
from helpers.pretraining import TINY, write_source
from PIL import Image

from mambapeft_vision.pretraining.config import PretrainConfig, SourceConfig


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    sources = {name: {"path": write_source(tmp_path / f"{name}.npz"), "holdout": 0.25} for name in ("one", "two")}
    return PretrainConfig(
        backbone="vim_nano_patch8_64",
        architecture=TINY,
        sources={name: SourceConfig(**source) for name, source in sources.items()},
        out=str(tmp_path / "out" / "weights"),
        steps=30,
        warmup_steps=3,
        batch_size=8,
        learning_rate=0.01,
        ema=0.8,
        precision="fp32",
        device="cpu",
        workers=1,
        evaluations=2,
    )


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with a folder of images for each of two classes."""
    folder = tmp_path / "images"
    for number in range(24):
        file = folder / ("light", "dark")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200 - 160 * (number % 2), number, 0)).save(file)
    return folder
