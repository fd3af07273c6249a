"""Labelled images where their owner keeps them: a tree with a folder for each class, or a table of paths and labels."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambapeft_vision.data.own.files import (
    NAMED,
    SPLIT_FOLDERS,
    is_image,
    split_folders,
    split_of,
    visible_files,
    visible_folders,
)
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import is_hidden

MAX_IMAGES = 20_000_000
MAX_CLASSES = 100_000
LONGEST_CLASS_NAME = 300  # characters


@dataclass(frozen=True)
class Source:
    """Labelled images, each named by its path below `root`.

    Args:
        root: folder of the images.
        paths: relative to `root`, with `/`.
        labels: the classes of each image: one, or with several labels any number, in rising order.
        splits: train, val or test for each image, or None where its owner has not split them.
        class_names: by label.
        notes: allowed but unusual properties of the images, one sentence each.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    splits: tuple[str, ...] | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_tree(folder: Path) -> Source:
    """Reads `folder/<class>/**/<image>`, or `folder/{train,val,test}/<class>/**/<image>`, which keeps its splits.

    Classes are in natural order of their names (2 before 10), images in the order of their paths. Hidden files and
    folders are skipped at any depth. An image is known by its ending or, without one, by its content.

    Raises: UserError for fewer than two classes, a class without images, and names that no list can hold.
    """
    parts = parts_of(folder)
    classes = natural_order({child.name for part in parts for child in visible_folders(part)})
    if len(classes) < 2:
        raise too_few_classes(folder, len(classes), "Sort the images into folders, or give a table of paths and labels")
    found: list[tuple[str, int, str | None]] = []
    others: list[Path] = []
    for part, split in parts.items():
        others += sorted(file for file in part.iterdir() if file.is_file() and not is_hidden(file.name))
        for label, name in enumerate(classes):
            for file in visible_files(part / name):
                if is_image(file):
                    found.append((file.relative_to(folder).as_posix(), label, split))
                else:
                    others.append(file)
    empty = [name for label, name in enumerate(classes) if label not in {label for _, label, _ in found}]
    if empty:
        raise UserError(
            f"{folder} has no image in {named(empty)}: expected images in the folder of every class. Remove the "
            f"folders that are no classes."
        )
    check_paths([path for path, _, _ in found], folder)
    check_class_names(classes, folder)
    splits = [split for _, _, split in found if split is not None]
    return Source(
        folder,
        tuple(path for path, _, _ in found),
        tuple((label,) for _, label, _ in found),
        tuple(splits) if splits else None,
        tuple(classes),
        (*_left_out(others), *look_alikes(classes)),
    )


def parts_of(folder: Path) -> dict[Path, str | None]:
    """The folders of splits with their words, or the whole folder without one. Raises UserError for a mixture."""
    parts = split_folders(folder)
    children = visible_folders(folder)
    exact = {SPLIT_FOLDERS[child.name.lower()] for child in children if child.name.lower() in SPLIT_FOLDERS}
    splits = [child for child in children if split_of(child.name) is not None]
    words = {split_of(child.name) for child in splits}
    nested = any(any(visible_folders(child)) for child in splits)  # as folders of classes rarely are
    if not parts and (("train" in exact and len(exact) > 1) or (nested and len(words) > 1)):
        others = [child.name for child in children if child not in splits]
        what = f"and beside them {named(others)}" if others else "without one to train, or one without classes"
        raise UserError(
            f"{folder} has folders of splits {what}: expected folders of splits alone, one of them to train, each with "
            f"a folder for each class, or folders of classes alone. Move what does not belong."
        )
    return parts or {folder: None}


def too_few_classes(folder: Path, count: int, remedy: str) -> UserError:
    """That a folder has folders of `count` classes alone; and where they may be instead."""
    inside = visible_folders(folder)
    if len(inside) == 1 and any(visible_folders(inside[0])):
        remedy = f"Give {inside[0]} if the classes are there"
    return UserError(
        f"{folder} has {count} sub-folders: expected one folder of images for each class, at least two. {remedy}."
    )


def natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which people count: `2` before `10`, and `a2` before `a10`."""

    def key(name: str) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"([0-9]{1,18})", name)
        return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in parts], name

    return sorted(names, key=key)


def split_word(text: str, where: str) -> str:
    """Maps a usual word for a split to train, val or test. Raises UserError for any other word."""
    word = SPLIT_FOLDERS.get(text.strip().lower())
    if word is None:
        raise UserError(f"{where}: {shown(text)} is no split; expected one of {', '.join(sorted(SPLIT_FOLDERS))}.")
    return word


def check_paths(paths: Sequence[str], where: Path) -> None:
    """Raises UserError for names that a line of a list file cannot hold."""
    bad = [path for path in paths if not _fits_in_a_line(path)]
    if bad:
        raise UserError(
            f"{where}: the name of an image must be UTF-8 text without line breaks, control characters, backslashes "
            f"and a space at its end, which {named(bad)} is not. Rename the file or folder."
        )


def check_class_names(names: Sequence[str], where: Path) -> None:
    """Raises UserError for too many classes, or names that no file of names can hold."""
    if len(names) > MAX_CLASSES:
        raise UserError(f"{where} has {len(names):,} classes; expected at most {MAX_CLASSES:,}. Join some.")
    bad = [name for name in names if not name.strip() or len(name) > LONGEST_CLASS_NAME or name != _one_line(name)]
    if bad:
        raise UserError(
            f"{where}: the name of a class must be one line of text of at most {LONGEST_CLASS_NAME} characters, which "
            f"{named(bad)} is not. Rename it."
        )


def look_alikes(names: Sequence[str]) -> list[str]:
    """Notes on classes whose names are the same but for case, spaces around them or the form of their accents."""
    same = defaultdict(list)
    for name in names:
        same[unicodedata.normalize("NFKC", name).casefold().strip()].append(name)
    return [
        f"the classes {' and '.join(map(shown, alike))} differ only in case, spaces or accents, and count as "
        f"{len(alike)} classes."
        for alike in same.values()
        if len(alike) > 1
    ]


def named(things: Sequence[object]) -> str:
    """Names the first things in a text, and says how many more there are."""
    more = f" and {len(things) - NAMED:,} more" if len(things) > NAMED else ""
    return f"{', '.join(shown(str(thing)) for thing in things[:NAMED])}{more}"


def _left_out(files: Sequence[Path]) -> list[str]:
    if not files:
        return []
    listed = ", ".join(plain(file) for file in files[:NAMED])
    more = f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
    what = "is no image of a class and was" if len(files) == 1 else "are no images of a class and were"
    return [f"{listed}{more} {what} left out."]


def _fits_in_a_line(path: str) -> bool:
    return path == _one_line(path) and path == path.strip() and "\\" not in path


def _one_line(text: str) -> str:
    """The text without line breaks and control characters; equal to the text if it has none."""
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp"))
