"""Benchmarks with published splits, over images that the user has: the FGVC five and the few-shot five.

FGVC: the splits of VPT (Jia et al. 2022, arXiv 2203.12119), one JSON a split, path → label. Labels begin at 1, or have
gaps, and are numbered anew. Few-shot: the lists of NOAH (Zhang et al. 2022, arXiv 2206.04673), `path label` a line, for
1, 2, 4, 8 and 16 shots and three seeds.

A task is laid out as own images are (data/own/layout.py): list files and a link to the images, every image read, hashed
and decoded once. Missing images and wrong numbers of images are errors; images in two splits are noted.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from mambapeft_vision.data.manifest import read_entry, task_sha256, write_entry
from mambapeft_vision.data.own.draw import TEST, TRAIN, VAL
from mambapeft_vision.data.own.index import read_index
from mambapeft_vision.data.own.layout import IMAGES, OwnImages, lay_out, read_notes
from mambapeft_vision.data.own.source import Source, check_paths, named
from mambapeft_vision.utils.atomic import write_bytes
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import read_json, read_lines

SHOTS, SEEDS = (1, 2, 4, 8, 16), (0, 1, 2)
_MAX_LIST_BYTES = 100_000_000
Labels = dict[str, int]  # path → label


@dataclass(frozen=True)
class Published:
    """A data set with published splits.

    Args:
        folder: folder of the task.
        counts: images by split; any of several numbers in circulation is valid. Empty: not known.
        lists: the folder's name in the publication.
        hint: a common mistake with the images, for messages.
    """

    folder: str
    num_classes: int
    counts: Mapping[str, tuple[int, ...]]
    lists: str = ""
    hint: str = ""


def _counts(train: tuple[int, ...], val: tuple[int, ...], test: int) -> dict[str, tuple[int, ...]]:
    return {TRAIN: train, VAL: val, TEST: (test,)}


_CARS = "The split has car_ims/ with six digits; Kaggle's copy has two folders with five."
FGVC = {
    task.folder: task
    for task in (
        Published("cub", 200, _counts((5393, 5394), (600,), 5794)),
        Published("nabirds", 555, _counts((21_536,), (2393,), 24_633)),
        Published("flowers", 102, _counts((1020,), (1020,), 6149)),
        Published("dogs", 120, _counts((10_800,), (1200,), 8580)),
        Published("cars", 196, _counts((7329, 8144), (815,), 8041), hint=_CARS),
    )
}
FEW_SHOT = {
    task.folder: task
    for task in (
        Published("food101", 101, {}, "food101"),
        Published("cars", 196, {}, "standford-cars", _CARS),  # as the publication spells it
        Published("flowers", 102, {}, "oxford-flowers102"),
        Published("aircraft", 100, {}, "fgvc-aircraft"),
        Published("pets", 37, {}, "oxford-pets"),
    )
}


@dataclass(frozen=True)
class _Listed(OwnImages):
    """Images whose labels and splits are known already."""

    source: Source | None = None

    def read(self) -> Source:
        assert self.source is not None
        return self.source


def prepare_fgvc(task: Published, lists: Path, images: Path, folder: Path) -> list[str]:
    """Makes a task of the FGVC five in `folder`; returns notes on it.

    Args:
        lists: folder with train.json, val.json and test.json.
        images: the folder that their paths are relative to.

    Raises: UserError for other numbers of images or classes than published, and for images that are missing.
    """
    given = {split: _read_json_labels(lists / f"{split}.json") for split in (TRAIN, VAL, TEST)}
    _check_counts(task, {split: len(labels) for split, labels in given.items()}, lists)
    return _lay_out(task, given, lists, images, folder)


def prepare_few_shot(task: Published, lists: Path, images: Path, folder: Path) -> list[str]:
    """Makes a task of the few-shot five in `folder`, with a list `shots4_seed1.txt` for each number of shots and seed.

    Args:
        lists: folder with train_meta.list.num_shot_1.seed_0 and so on, val_meta.list and test_meta.list.
        images: the folder that their paths are relative to.

    Returns: notes on the task. Raises: UserError as `prepare_fgvc`.
    """
    notes: list[str] = []
    few = {
        f"shots{shots}_seed{seed}": read_list_labels(
            lists / f"train_meta.list.num_shot_{shots}.seed_{seed}", task, notes
        )
        for shots in SHOTS
        for seed in SEEDS
    }
    for name, labels in few.items():
        notes += _wrong_shots(name, labels, task)
    train = {path: label for labels in few.values() for path, label in labels.items()}
    val, test = (read_list_labels(lists / f"{split}_meta.list", task, notes) for split in (VAL, TEST))
    notes += _lay_out(task, {TRAIN: train, VAL: val, TEST: test}, lists, images, folder)
    _add_lists(folder, few)
    return notes


def _lay_out(task: Published, given: Mapping[str, Labels], lists: Path, images: Path, folder: Path) -> list[str]:
    if folder.exists():
        raise UserError(f"{folder} exists: expected a new folder. Delete it, or give another --root.")
    numbers = sorted({label for labels in given.values() for label in labels.values()})
    if len(numbers) != task.num_classes:
        raise UserError(
            f"{lists} has {len(numbers)} classes: expected {task.num_classes} of {task.folder}. Get it again."
        )
    new = {number: label for label, number in enumerate(numbers)}
    split_of: dict[str, str] = {}
    label_of: Labels = {}
    for split in (VAL, TRAIN, TEST):  # if an image is in two splits, the later one counts
        split_of |= dict.fromkeys(given[split], split)
        label_of |= {path: new[label] for path, label in given[split].items()}
    paths = sorted(split_of)
    check_paths(paths, lists)
    _refuse_missing(task, paths, images)
    notes = tuple(_leaks(given))
    source = Source(
        images,
        tuple(paths),
        tuple((label_of[path],) for path in paths),
        tuple(split_of[path] for path in paths),
        _class_names(label_of, numbers),
        notes if numbers == list(range(len(numbers))) else (_renumbered(numbers), *notes),
    )
    lay_out(_Listed(lists, source=source), folder)
    return read_notes(folder)


def _leaks(given: Mapping[str, Labels]) -> list[str]:
    """Images that stand in two splits, by name; the same content under other names is found when it is hashed."""
    notes = []
    for one, other, kept in ((TRAIN, VAL, TRAIN), (TRAIN, TEST, TEST), (VAL, TEST, TEST)):
        shared = sorted(given[one].keys() & given[other].keys())
        if shared:
            notes.append(
                f"{len(shared):,} of {len(given[other]):,} images of {other} are in {one} too, such as "
                f"{named(shared[:2])}; they count as {kept}."
            )
        other_label = [path for path in shared if given[one][path] != given[other][path]]
        if other_label:
            notes.append(f"{len(other_label):,} of them have other labels there, such as {named(other_label[:2])}.")
    return notes


def _renumbered(numbers: Sequence[int]) -> str:
    return f"labels {numbers[0]} … {numbers[-1]} were numbered anew, from 0 to {len(numbers) - 1}."


def _class_names(label_of: Labels, numbers: Sequence[int]) -> tuple[str, ...]:
    """The folder of a class's images where each class has one of its own, else the published label."""
    folders = defaultdict(set)
    for path, label in label_of.items():
        folders[label].add(PurePosixPath(path).parent.name)
    names = [folders[label].pop() if len(folders[label]) == 1 else "" for label in range(len(numbers))]
    return tuple(names) if all(names) and len(set(names)) == len(names) else tuple(map(str, numbers))


def _refuse_missing(task: Published, paths: Sequence[str], images: Path) -> None:
    missing = [path for path in paths if not os.path.isfile(images / path)]  # False for a path that is too long
    if missing:
        raise UserError(
            f"{images} lacks {len(missing):,} of {len(paths):,} images: {named(missing)}. Correct --images, or "
            f"get them. {task.hint}".rstrip()
        )


def _check_counts(task: Published, found: Mapping[str, int], lists: Path) -> None:
    wrong = [
        f"{split} {found[split]:,} (expected {' or '.join(f'{count:,}' for count in counts)})"
        for split, counts in task.counts.items()
        if found[split] not in counts
    ]
    if wrong:
        raise UserError(f"{lists}: not the published numbers of images: {', '.join(wrong)}. Get the lists again.")


def _wrong_shots(name: str, labels: Labels, task: Published) -> list[str]:
    """A note if a list does not hold its number of shots of every class."""
    shots = int(name.removeprefix("shots").partition("_")[0])
    counts = Counter(labels.values())
    other = [label for label in range(task.num_classes) if counts[label] != shots]
    return [f"{name} has not {shots} images of {len(other)} classes, such as {other[0]}."] if other else []


def _add_lists(folder: Path, few: Mapping[str, Labels]) -> None:
    """Writes the lists of shots and enters them into the manifest."""
    entry, index = read_entry(folder.parent, folder.name), read_index(folder)
    assert entry is not None and index is not None
    lists = dict(entry.lists)
    for name, labels in few.items():
        content = "".join(f"{IMAGES}/{path} {label}\n" for path, label in labels.items()).encode()
        write_bytes(folder / f"{name}.txt", content)
        lists[name] = hashlib.sha256(content).hexdigest()
    hashes = {f"{IMAGES}/{file.path}": file.sha256 for file in index} | {f"{n}.txt": sha for n, sha in lists.items()}
    seen = entry.classes_seen | {name: len(set(labels.values())) for name, labels in few.items()}
    write_entry(folder.parent, folder.name, replace(entry, sha256=task_sha256(hashes), lists=lists, classes_seen=seen))


def _read_json_labels(file: Path) -> Labels:
    try:
        content = read_json(file, max_bytes=_MAX_LIST_BYTES)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). Correct --lists.") from error
    if not isinstance(content, dict) or not all(_is_label(value) for value in content.values()):
        raise UserError(f"{file} is no list of labels; expected an object of paths and whole numbers. Get it again.")
    return {str(path): int(label) for path, label in content.items()}


def _is_label(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_list_labels(file: Path, task: Published, notes: list[str]) -> Labels:
    """The labels of a list. Some published lists name every image twice, which is noted."""
    labels: Labels = {}
    repeated = 0
    try:
        for number, line in enumerate(read_lines(file, max_bytes=_MAX_LIST_BYTES), 1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            if not path or not label.isascii() or not label.isdecimal() or int(label[:9]) >= task.num_classes:
                raise UserError(
                    f"{file}:{number}: {shown(line.strip())}; expected a path and a label of 0 to "
                    f"{task.num_classes - 1}. Get it again."
                )
            repeated += path in labels
            if labels.setdefault(path, int(label[:9])) != int(label[:9]):
                raise UserError(f"{file}:{number}: {plain(path)} has another label above. Get it again.")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). Correct --lists.") from error
    if repeated:
        notes.append(f"{file.name} names {repeated:,} images a second time; they count once.")
    return labels
