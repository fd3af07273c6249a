"""Mini tasks from datasets that torchvision downloads, into the layout of all tasks.

torchvision fetches (and checks) the archives once, into a folder of their own; 800 + 200 images to train and at most
2,000 to test are drawn from them and stored as PNG, shrunk where they are larger than 128 pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambapeft_vision.data.png import encode_png
from mambapeft_vision.data.prepare.importer import LabelledImages, lay_out_task, split_labelled
from mambapeft_vision.data.prepare.verify import TaskReport
from mambapeft_vision.data.tasks import Task
from mambapeft_vision.utils.atomic import errors_name
from mambapeft_vision.utils.errors import WRITE_ERRORS, UserError

MOST_TEST = 2000
LONGEST_SIDE = 128  # pixels; uncompressed, the whole DTD would take gigabytes
Part = dict[str, Any]  # arguments of a dataset's class, besides root and download


@dataclass(frozen=True)
class Fetched:
    """A task and where it comes from.

    Args:
        dataset: name of the class in torchvision.datasets.
        train, test: arguments for each of their parts; without test, test images are drawn from what training leaves.
        size: approximate size of the download.
    """

    task: Task
    dataset: str
    train: tuple[Part, ...]
    test: tuple[Part, ...]
    size: str


def _fetched(name: str, group: str, classes: int, num_test: int, dataset: str, **more: Any) -> Fetched:
    return Fetched(Task(name, group, classes, num_test, family="mini"), dataset, **more)


_FLAGS = {"train": ({"train": True},), "test": ({"train": False},)}
_SPLITS = {"train": ({"split": "train"},), "test": ({"split": "test"},)}
_WITH_VAL = _SPLITS | {"train": ({"split": "train"}, {"split": "val"})}
_WHOLE: dict[str, tuple[Part, ...]] = {"train": ({},), "test": ()}

FETCHED: dict[str, Fetched] = {
    fetched.task.folder: fetched
    for fetched in (
        _fetched("usps", "natural", 10, MOST_TEST, "USPS", size="8 MB", **_FLAGS),
        _fetched("fashion", "natural", 10, MOST_TEST, "FashionMNIST", size="30 MB", **_FLAGS),
        _fetched("kmnist", "natural", 10, MOST_TEST, "KMNIST", size="20 MB", **_FLAGS),
        _fetched("svhn", "natural", 10, MOST_TEST, "SVHN", size="250 MB", **_SPLITS),
        _fetched("dtd", "natural", 47, 1880, "DTD", size="600 MB", **_WITH_VAL),
        _fetched("eurosat", "specialized", 10, MOST_TEST, "EuroSAT", size="90 MB", **_WHOLE),
    )
}


def fetch_task(fetched: Fetched, root: Path, downloads: Path, *, seed: int = 0) -> TaskReport:
    """Downloads a dataset, unless it is there, and lays its task out in `root/<name>`.

    Args:
        downloads: folder for torchvision's archives.
        seed: seed of the choice of images.
    Raises: UserError for a download that is missing or damaged, and for images that do not fit the task.
    """
    train = [_open(fetched, part, downloads) for part in fetched.train]
    test = [_open(fetched, part, downloads) for part in fetched.test]
    labelled = _labelled(fetched, train, test, downloads)
    return lay_out_task(
        fetched.task, root / fetched.task.folder, split_labelled(labelled, max_test=MOST_TEST, seed=seed)
    )


def _open(fetched: Fetched, part: Part, downloads: Path) -> Any:
    from torchvision import datasets  # slow to import

    try:
        with errors_name(downloads):
            return getattr(datasets, fetched.dataset)(root=str(downloads), download=True, **part)
    except (OSError, RuntimeError) as error:  # no network; torchvision's own word for a damaged archive
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            raise
        raise UserError(
            f"{fetched.task.name}: torchvision.datasets.{fetched.dataset} cannot be downloaded to {downloads} "
            f"({type(error).__name__}: {error}); expected a connection to the internet and {fetched.size} of space. "
            f"Try again, or bring {downloads} along from a machine where this command ran, or import the images by "
            f"`mambapeft prepare mini import PATH --name {fetched.task.folder}`."
        ) from error


def _labelled(fetched: Fetched, train: list[Any], test: list[Any], source: Path) -> LabelledImages:
    """The parts one after the other; images are encoded when they are read."""
    places = [(dataset, index) for dataset in (*train, *test) for index in range(len(dataset))]
    labels = np.array([int(label) for dataset in (*train, *test) for label in _labels(dataset)], dtype=np.int64)
    classes = fetched.task.num_classes
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise UserError(
            f"{fetched.task.name}: labels of torchvision.datasets.{fetched.dataset} run from {labels.min()} to "
            f"{labels.max()}; expected 0 to {classes - 1}. Report it: the dataset is not what this table says."
        )
    splits = None
    if test:
        splits = np.repeat(["train", "test"], [sum(map(len, train)), sum(map(len, test))])
    names = tuple(map(str, range(classes)))

    def name(index: int) -> str:
        return f"image {places[index][1]} of torchvision.datasets.{fetched.dataset}"

    return LabelledImages(source, labels, splits, names, lambda i: _png(*places[i]), name)


def _labels(dataset: Any) -> Iterable[int]:
    """torchvision's datasets keep labels under many names; what all of them have is (image, label) by index."""
    return (dataset[index][1] for index in range(len(dataset)))


def _png(dataset: Any, index: int) -> bytes:
    image, _ = dataset[index]
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # keeps the shape; smaller images stay as they are
    return encode_png(image)
