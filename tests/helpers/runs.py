"""Tiny runs for tests: a task of 40 images, the smallest backbone, a few epochs."""

import csv
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch import Callback
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.run import train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TRAIN_IMAGES, TEST_IMAGES, CLASSES = 40, 20, 3
SMALL_BACKBONE = ["backbone=vim_pico", "+backbone.depth=2", "+backbone.embed_dim=32"]
SMALL_VIT = ["backbone=vit_s", "backbone.weights=random", "+backbone.depth=2", "+backbone.embed_dim=32"]
SMALL_MAMBAREG = ["backbone=mambareg_s", *SMALL_VIT[1:]]


def lay_out_task(folder: Path) -> Path:
    """A learnable task in the layout of data/README.md: the class is the brightest colour channel."""
    random = np.random.RandomState(0)
    for split, count in {"train800val200": TRAIN_IMAGES, "test": TEST_IMAGES}.items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            pixels = random.randint(0, 128, (8, 8, 3), dtype=np.uint8)
            pixels[..., number % CLASSES] += 64
            path = f"images/{split}/{number:06d}.png"
            Image.fromarray(pixels).save(folder / path)
            lines.append(f"{path} {number % CLASSES}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def overrides(task: Path, outputs: Path, *more: str) -> list[str]:
    """The command line of a tiny run: five epochs of three steps, the last batch partial, a checkpoint an epoch."""
    return [
        *SMALL_BACKBONE,
        "dataset=folder",
        "dataset.name=custom/tiny",
        f"dataset.folder={task}",
        f"dataset.num_classes={CLASSES}",
        "dataset.batch_size=16",
        "trainer.max_epochs=5",
        "trainer.warmup_epochs=1",
        "trainer.device=cpu",
        "trainer.checkpoint_every_s=0",
        "trainer.learning_rate=1e-2",
        "method.lora_p_x.rank=4",
        f"paths.outputs={outputs}",
        *more,
    ]


def compose_train(command: Sequence[str]) -> DictConfig:
    return compose("train", command)


def compose_root(name: str, command: Sequence[str]) -> DictConfig:
    return compose(name, command)


def run(command: Sequence[str], *callbacks: Callback) -> RunRecord | None:
    """The run that the command asks for. callbacks: more of Lightning's, such as faults (helpers/faults.py)."""
    return train(compose_train(command), command, callbacks=callbacks)


def heed_ctrl_c() -> None:
    """For a new process: what a shell starts in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def only_run_folder(outputs: Path) -> Path:
    """The folder of the one run below `outputs`, those set aside not counted."""
    (config,) = (file for file in outputs.glob("*/*/*/*/config.yaml") if ".replaced-" not in file.parent.name)
    return config.parent


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter.safetensors")


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))
