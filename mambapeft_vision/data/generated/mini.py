"""The mini tasks: small, in the layout of VTAB-1K, for runs of seconds to minutes.

The tasks of `GENERATED` need no download: they are drawn, or come with a dependency, and are laid out at first use.
The tasks of `IMPORTED` have sources with licences of their own. `mambapeft prepare mini` lays them out, and also those
of `torchvision_tasks.FETCHED`, which torchvision downloads.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from mambapeft_vision.data.generated import dsprites
from mambapeft_vision.data.generated import solids as scenes
from mambapeft_vision.data.generated.digits import lay_out_digits
from mambapeft_vision.data.manifest import read_entry, write_entry
from mambapeft_vision.data.module import TaskDataModule
from mambapeft_vision.data.png import encode_png
from mambapeft_vision.data.prepare.importer import EncodedImage, EncodedSplits, lay_out_task
from mambapeft_vision.data.prepare.torchvision_tasks import FETCHED
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.data.tasks import Task
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.lock import one_at_a_time
from mambapeft_vision.utils.progress import ConsoleProgress, ProgressMeter

DRAW_SEED = 0
SPRITES_SEED = 1  # all of these images equal those of the published file


def _mini(folder: str, group: str, num_classes: int, num_test: int) -> Task:
    return Task(folder, group, num_classes, num_test, family="mini")


IMPORTED: dict[str, Task] = {
    task.folder: task
    for task in (
        _mini("groceries", "natural", 14, 393),
        _mini("usps", "natural", 10, 2000),
        _mini("fashion", "natural", 10, 2000),
        _mini("brain_mri", "specialized", 2, 655),
        _mini("solar_cells", "specialized", 4, 1624),
        _mini("satellite_climate", "specialized", 14, 529),
        _mini("scene_count", "structured", 8, 1500),
        _mini("scene_distance", "structured", 6, 1500),
        _mini("norb_azimuth", "structured", 18, 2000),
        _mini("norb_elevation", "structured", 9, 2000),
        _mini("maze_distance", "structured", 6, 1039),
        _mini("dsprites_loc", "structured", 16, 2000),
        _mini("dsprites_ori", "structured", 16, 2000),
    )
}

GENERATED: dict[str, Task] = {
    task.folder: task
    for task in (
        _mini("digits", "natural", 10, 797),
        _mini("sprites_loc", "structured", 16, 1000),
        _mini("sprites_ori", "structured", 16, 1000),
        _mini("solids_count", "structured", scenes.MOST - scenes.FEWEST + 1, 1000),
        _mini("solids_distance", "structured", len(scenes.DISTANCE_EDGES) + 1, 1000),
    )
}


class MiniDataModule(TaskDataModule):
    """A mini task; a generated one is laid out where `folder` does not exist."""

    def lay_out(self) -> None:
        task = GENERATED.get(self.name.removeprefix("mini/"))
        if task is not None:
            lay_out_generated(task, self.folder)

    def remedy(self) -> str:
        name = self.name.removeprefix("mini/")
        if name in GENERATED:
            return f"Delete {self.folder} and start again: it is laid out anew by itself."
        fetch = f"mambapeft prepare mini fetch {name}` (a download) or `" if name in FETCHED else ""
        return f"Lay it out with `{fetch}mambapeft prepare mini import PATH --name {name}` (data/README.md)."


def lay_out_generated(task: Task, folder: Path) -> None:
    """Draws and lays out a task of `GENERATED`, unless it is there; always the same images, byte for byte."""
    if task.folder == "digits":
        lay_out_digits(folder)
        return
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder):
            if not folder.exists():  # otherwise another process has drawn it meanwhile
                _lay_out(task, folder)
    if read_entry(folder.parent, folder.name) is None:  # killed just before it was noted
        report = verify_task(task, folder)
        if report.entry is None:
            raise UserError(f"{report.problems[0]} Delete {folder} and start again: it is laid out anew by itself.")
        write_entry(folder.parent, folder.name, report.entry, report.states)


def _lay_out(task: Task, folder: Path) -> None:
    try:
        lay_out_task(task, folder, draw_splits(task))
    except OSError:
        if not folder.is_dir():  # otherwise, on a file system without locks, another process was quicker
            raise


def draw_splits(task: Task) -> EncodedSplits:
    """Draws and encodes all images of a task, with progress."""
    number = task.num_train + task.num_val + task.num_test
    meter = ProgressMeter(number, ConsoleProgress(f"draw {task.name}", "images"))
    encoded = []
    for pixels, label in _SOURCES[task.folder](number):
        encoded.append(EncodedImage(encode_png(Image.fromarray(pixels)), int(label)))
        meter.advance()
    train, val = task.num_train, task.num_train + task.num_val
    return EncodedSplits(encoded[:train], encoded[train:val], encoded[val:])


Drawn = Iterable[tuple[np.ndarray, int]]


def _sprites(labels: Callable[[np.ndarray], np.ndarray]) -> Callable[[int], Drawn]:
    def images(number: int) -> Drawn:
        factors = dsprites.sample(number, SPRITES_SEED)
        return ((dsprites.draw(*row), label) for row, label in zip(factors, labels(factors), strict=True))

    return images


def _solids(label: Callable[[list[scenes.Solid]], int]) -> Callable[[int], Drawn]:
    return lambda number: ((scenes.render(s), label(s)) for s in scenes.sample(number, DRAW_SEED))


_SOURCES: dict[str, Callable[[int], Drawn]] = {
    "sprites_loc": _sprites(dsprites.location_labels),
    "sprites_ori": _sprites(dsprites.orientation_labels),
    "solids_count": _solids(scenes.count_label),
    "solids_distance": _solids(scenes.distance_label),
}
