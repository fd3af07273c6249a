"""What a pretrained backbone's features are worth: logistic regression on them, task by task.

    python scripts/bench_features.py --backbone vim_nano_patch8_64 --data data/mini [--weights FILE …] [--csv FILE]

scikit-learn's logistic regression on standardised features of the 1,000 training images, tested on the test images:
top-1 in %. Without `--weights`: the weights that come with the backbone, and random ones (seed 0) beside them.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.benchmarks.measured import csv_text, write_rows
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.images import ImageSet, decode_list
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.utils.errors import UserError

C = 0.05  # inverse strength of the regression's penalty; chosen once, with vim_nano's first weights
BATCH = 100
_MOST_CLASSES = 1000


@torch.no_grad()
def features(backbone: Any, images: ImageSet, preprocessing: Preprocessing) -> Tensor:
    """Features before the head, float32 [n, D], of a backbone in evaluation mode."""
    normalise = Normalise(preprocessing)
    tokens = (backbone.forward_features(normalise(chunk)) for chunk in images.images.split(BATCH))
    return torch.cat([backbone.forward_head(one, pre_logits=True) for one in tokens]).float()


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy in % of a logistic regression. train, test: features [n, D] and labels [n]."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
    model.fit(*(values.numpy() for values in train))
    return 100 * float(model.score(*(values.numpy() for values in test)))


def probe_tasks(backbone: Any, folders: Sequence[Path]) -> dict[str, float]:
    """Accuracy in % on each task folder in the layout of VTAB-1K, by its name."""
    backbone.eval()
    preprocessing = Preprocessing.from_timm(backbone.pretrained_cfg)
    found = {}
    for folder in folders:
        sets = []
        for split in ("train800val200", "test"):
            listing = read_list(folder / f"{split}.txt", _MOST_CLASSES, remedy="Run mambapeft prepare mini.")
            images = decode_list(listing, preprocessing)
            sets.append((features(backbone, images, preprocessing), images.labels))
        found[folder.name] = probe(*sets)
    return found


def columns(model_name: str, weights: Sequence[Path]) -> dict[str, Any]:
    """The backbones to compare, by the name of their column."""
    if not weights:
        return {kind: create_backbone(model_name, kind) for kind in ("official", "random")}
    return {file.stem: create_backbone(model_name, str(file)) for file in weights}


def as_rows(found: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """Accuracies of each column by task → a row a task, and their mean."""
    tasks = list(next(iter(found.values())))
    rows = [{"task": task, **{name: f"{of[task]:.1f}" for name, of in found.items()}} for task in tasks]
    means = {name: f"**{sum(of.values()) / len(of):.1f}**" for name, of in found.items()}
    return [*rows, {"task": f"**mean of {len(tasks)}**", **means}]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; `--csv` writes it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vim_nano_patch8_64", help="registered name (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/mini"), help="folder of the tasks' folders")
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="files to compare, a column each")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args(argv)
    folders = sorted(file.parent for file in arguments.data.glob("*/train800val200.txt"))
    if not folders:
        raise UserError(
            f"{arguments.data}: no task found. Run `mambapeft prepare mini all --from DIR --out {arguments.data}`"
        )
    found = {name: probe_tasks(one, folders) for name, one in columns(arguments.backbone, arguments.weights).items()}
    rows = as_rows(found)
    print(csv_text(rows), end="")
    if arguments.csv:
        write_rows(arguments.csv, rows)
