"""Own images made a task: the splits are drawn once and recorded, and the images stay where they are.

A task's folder holds what every task's does (data/README.md): the four list files and `images`, here a link to where
the images are. Beside them stand `classes.txt` (the class names, one a line, by label), `files.csv` (a line for
each image, see index.py) and `task.json` (where the images came from, how they were split, notes).

Images that were added, removed, relabelled or changed are noticed, and the splits are drawn again; the former record is
kept beside it. So is one whose own files are damaged or were changed.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from mambapeft_vision.data.image_list import MAX_LIST_BYTES, MOST_CLASSES
from mambapeft_vision.data.manifest import TaskEntry, drop_entry, read_entry, task_sha256, write_entry
from mambapeft_vision.data.own.draw import TEST, TRAIN, VAL, draw_splits, strata_of
from mambapeft_vision.data.own.index import INDEX_FILE, IndexedFile, index_text, per_class, read_index
from mambapeft_vision.data.own.notes import notes_of
from mambapeft_vision.data.own.source import Source, named, read_tree
from mambapeft_vision.data.own.table import USUAL, Columns, is_table, read_table
from mambapeft_vision.data.prepare.verify import FileFinding, inspect_file
from mambapeft_vision.utils.atomic import atomic_folder, write_json, write_text
from mambapeft_vision.utils.console import warn
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_json
from mambapeft_vision.utils.lock import one_at_a_time
from mambapeft_vision.utils.progress import ConsoleProgress, ProgressMeter
from mambapeft_vision.utils.threads import map_in_threads
from mambapeft_vision.utils.untrusted import read_bytes, read_json, read_lines

CLASSES_FILE, RECORD_FILE, IMAGES = "classes.txt", "task.json", "images"
# List file → the splits whose images it holds; the names are those of VTAB-1K, whatever the numbers.
LISTS = {"train800": (TRAIN,), "val200": (VAL,), "train800val200": (TRAIN, VAL), "test": (TEST,)}


@dataclass(frozen=True)
class OwnImages:
    """The user's own images: where they are, and how they are split if they are not split yet.

    Args:
        path: a tree of class folders, or a table.
        root: folder that the paths of a table are relative to; None: the table's.
        columns: columns of a table.
        several: whether an image may have any number of labels.
        test_share, val_share: shares of each class's images.
        seed: seed of the draw.
    """

    path: Path
    root: Path | None = None
    columns: Columns = USUAL
    several: bool = False
    test_share: float = 0.2
    val_share: float = 0.2
    seed: int = 0

    def read(self) -> Source:
        """Reads the present images and labels. Raises UserError."""
        try:
            if self.path.is_dir():
                if self.several:
                    raise UserError(
                        f"{self.path}: images with several labels need a table of paths and labels. Give it"
                    )
                return read_tree(self.path)
            if self.path.is_file() and is_table(self.path):
                return read_table(self.path, self.root, self.columns, self.several)
        except OSError as error:
            raise UserError(f"{error.filename or self.path} cannot be read ({error.strerror}). Repair it.") from error
        what = "no table" if self.path.is_file() else "missing"
        raise UserError(
            f"dataset.path={self.path} is {what}: expected a folder with one folder of images for each class, or a "
            f"table of paths and labels (.csv, .tsv, .parquet). Correct the path."
        )

    def folder_below(self, place: Path) -> Path:
        """The task's folder: another one for other images or another way to split them."""
        settings = {**asdict(self), "path": str(self.path.absolute()), "root": self.root and str(self.root.absolute())}
        name = "".join(c if c.isalnum() else "-" for c in self.path.stem)[:40]
        return place / f"{name}-{sha256_json(settings)[:12]}"


def lay_out(own: OwnImages, folder: Path) -> None:
    """Draws and records the splits in `folder`, unless they are recorded there and the images have not changed.

    Raises: UserError for images that cannot be read, named all together.
    """
    source = own.read()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder):
        known = read_index(folder)
        if known is not None and not _is_whole(folder, known):
            warn(f"{folder}: its files are not as they were written; it is made again")
            known = None
        if known is not None and _is_recorded(source, known, folder):
            return
        files = _indexed(source, own, known or [])
        if known is not None and _is_same(source, files, known, folder):  # only copied or touched
            write_text(folder / INDEX_FILE, index_text(files))
            write_entry(folder.parent, folder.name, _entry(folder, files))
            return
        if folder.exists():
            drop_entry(folder.parent, folder.name)
            folder.rename(_free_name(folder))
        with atomic_folder(folder) as temporary:
            _write(temporary, source, own, files, again=known is not None)
        write_entry(folder.parent, folder.name, _entry(folder, files))


def is_recorded(own: OwnImages, folder: Path) -> bool:
    """Whether the record in `folder` describes the present images; nothing is written."""
    known = read_index(folder)
    if known is None or not _is_whole(folder, known):
        return False
    source = own.read()
    return _is_recorded(source, known, folder) or _is_same(source, _indexed(source, own, known), known, folder)


def read_classes(folder: Path) -> tuple[str, ...] | None:
    """The class names of a task's folder, by label; None where it has none."""
    file = folder / CLASSES_FILE
    if not file.is_file():
        return None
    try:
        lines = read_lines(file, max_bytes=64_000_000, max_lines=MOST_CLASSES, follow_links=True)
        names = tuple(line.removesuffix("\n").rstrip("\r") for line in lines)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). Write a class name a line, in UTF-8.") from None
    return (names[0].removeprefix("\ufeff"), *names[1:]) if names else ("",)


def read_notes(folder: Path) -> list[str]:
    """The notes on the images of a task's folder, one sentence each."""
    file = folder / RECORD_FILE
    if not file.is_file():
        return []
    content = read_json(file)
    notes = content.get("notes", []) if isinstance(content, dict) else []
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _is_whole(folder: Path, known: Sequence[IndexedFile]) -> bool:
    """Whether list files and index are those that the manifest's entry was written for."""
    try:
        entry = read_entry(folder.parent, folder.name)
        if entry is None:
            return False
        lists = _hashes_of_lists(folder, entry.lists)
    except (OSError, UserError):
        return False
    of_index = {name: hashlib.sha256(_list_text(known, splits)).hexdigest() for name, splits in LISTS.items()}
    return lists == entry.lists == lists | of_index and task_sha256(_file_hashes(known, lists)) == entry.sha256


def _is_recorded(source: Source, known: Sequence[IndexedFile], folder: Path) -> bool:
    """Whether names, labels, given splits, sizes and times of change equal the record's."""
    given = source.splits or ("",) * len(source.paths)
    now = {
        path: (_label_text(labels), split, *_status(source.root / path))
        for path, labels, split in zip(source.paths, source.labels, given, strict=True)
    }
    then = {file.path: (file.labels, file.given, file.bytes, file.changed_ns) for file in known}
    return now == then and read_classes(folder) == source.class_names


def _is_same(source: Source, now: Sequence[IndexedFile], then: Sequence[IndexedFile], folder: Path) -> bool:
    """Whether names, classes, splits and content equal the record's."""
    return _content(now) == _content(then) and read_classes(folder) == source.class_names


def _indexed(source: Source, own: OwnImages, known: Sequence[IndexedFile]) -> list[IndexedFile]:
    """Every image read, hashed and decoded once (those that are known and unchanged are not), and its split."""
    recorded = {file.path: file for file in known}
    statuses = {path: _status(source.root / path) for path in source.paths}
    unchanged = {p for p, f in recorded.items() if statuses.get(p) == (f.bytes, f.changed_ns)}
    new = [path for path in source.paths if path not in unchanged]
    found = dict(zip(new, _inspect([source.root / path for path in new]), strict=True))
    bad = [f"{source.root / path}: {finding.error}" for path, finding in found.items() if finding.error]
    if bad:
        raise UserError(
            f"{len(bad):,} of {len(source.paths):,} images cannot be used: {' '.join(bad[:5])} Repair or remove "
            f"{'it' if len(bad) == 1 else 'them'}."
        )
    hashes = [recorded[p].sha256 if p in unchanged else found[p].sha256 for p in source.paths]
    splits = _splits_of(source, own, hashes)
    given = source.splits or ("",) * len(source.paths)
    return [
        IndexedFile(path, _label_text(labels), split, word, *statuses[path], sha256)
        for path, labels, split, word, sha256 in zip(source.paths, source.labels, splits, given, hashes, strict=True)
    ]


def _splits_of(source: Source, own: OwnImages, hashes: Sequence[str]) -> list[str]:
    strata = strata_of(source.labels)
    if source.splits is None:
        _require_two_images(source, hashes)
        return draw_splits(strata, hashes, test_share=own.test_share, val_share=own.val_share, seed=own.seed)
    splits = list(source.splits)
    if TRAIN not in splits or set(splits) == {TRAIN}:
        raise UserError(f"{own.path} marks {', '.join(sorted(set(splits)))} alone; expected train and test. Mark both.")
    if TEST not in splits:  # then the validation images are the test images
        splits = [TEST if split == VAL else split for split in splits]
    if VAL not in splits:
        pool = [index for index, split in enumerate(splits) if split == TRAIN]
        chosen = draw_splits(
            [strata[i] for i in pool], [hashes[i] for i in pool], test_share=0, val_share=own.val_share, seed=own.seed
        )
        for index, split in zip(pool, chosen, strict=True):
            splits[index] = split
    return splits


def _require_two_images(source: Source, hashes: Sequence[str]) -> None:
    different: dict[int, set[str]] = defaultdict(set)
    for labels, content in zip(source.labels, hashes, strict=True):
        for label in labels:
            different[label].add(content)
    few = [name for label, name in enumerate(source.class_names) if len(different[label]) < 2]
    if few and all(len(labels) == 1 for labels in source.labels):
        raise UserError(
            f"{source.root}: {named(few)} {'has' if len(few) == 1 else 'have'} fewer than two different images; "
            f"expected one to train and one to test at least. Add images, or remove the class."
        )


def _inspect(files: Sequence[Path]) -> list[FileFinding]:
    meter = ProgressMeter(len(files), ConsoleProgress("check images", "images") if len(files) > 500 else None)
    findings = []
    for finding in map_in_threads(partial(inspect_file, decode=True), files):
        meter.advance()
        findings.append(finding)
    return findings


def _write(folder: Path, source: Source, own: OwnImages, files: Sequence[IndexedFile], *, again: bool) -> None:
    for name, splits in LISTS.items():
        (folder / f"{name}.txt").write_bytes(_list_text(files, splits))
    (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in source.class_names), encoding="utf-8")
    (folder / INDEX_FILE).write_text(index_text(files), encoding="utf-8")
    (folder / IMAGES).symlink_to(source.root.absolute(), target_is_directory=True)
    record = {
        "path": str(own.path.absolute()),
        "root": str(source.root.absolute()),
        "splits": "as given" if source.splits else {"seed": own.seed, "test": own.test_share, "val": own.val_share},
        "images": dict(Counter(file.split for file in files)),
        "classes": len(source.class_names),
        "notes": [*_overview(source, own, files, again), *source.notes, *notes_of(source, files)],
    }
    write_json(folder / RECORD_FILE, record)


def _list_text(files: Sequence[IndexedFile], splits: Sequence[str]) -> bytes:
    return "".join(f"{IMAGES}/{file.path} {file.labels}\n" for file in files if file.split in splits).encode()


def _overview(source: Source, own: OwnImages, files: Sequence[IndexedFile], again: bool) -> list[str]:
    counts = Counter(file.split for file in files)
    numbers = f"{counts[TRAIN]:,} to train, {counts[VAL]:,} to validate, {counts[TEST]:,} to test"
    how = "splits as given" if source.splits else f"splits drawn with seed {own.seed}"
    notes = [f"{len(files):,} images of {len(source.class_names):,} classes in {own.path}: {numbers}; {how}."]
    if source.splits and TEST not in source.splits:
        notes.append("no images are marked for testing: those marked for validation are, and others are drawn for it.")
    if again:
        notes.append("the images are not those of the former record: their splits were drawn again.")
    return notes


def _entry(folder: Path, files: Sequence[IndexedFile]) -> TaskEntry:
    lists = _hashes_of_lists(folder, LISTS)
    return TaskEntry(
        sha256=task_sha256(_file_hashes(files, lists)),
        lists=lists,
        images=len(files),
        bytes=sum(file.bytes for file in files),
        classes_seen={name: len(+per_class(files, splits)) for name, splits in LISTS.items()},
        decoded=True,
    )


def _hashes_of_lists(folder: Path, names: Iterable[str]) -> dict[str, str]:
    files = {name: read_bytes(folder / f"{name}.txt", max_bytes=MAX_LIST_BYTES) for name in names}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _file_hashes(files: Sequence[IndexedFile], lists: Mapping[str, str]) -> dict[str, str]:
    """sha256 by path, as a task's fingerprint takes them."""
    return {f"{IMAGES}/{file.path}": file.sha256 for file in files} | {f"{n}.txt": sha for n, sha in lists.items()}


def _content(files: Sequence[IndexedFile]) -> list[tuple[str, ...]]:
    return sorted((file.path, file.labels, file.split, file.sha256) for file in files)


def _label_text(labels: Sequence[int]) -> str:
    return ",".join(map(str, labels)) or "-"


def _status(file: Path) -> tuple[int, int]:
    """Bytes and time of change: ctime, as programs set mtime back. Raises UserError for a file that is missing."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}). Correct its path, or remove it.") from error
    return status.st_size, status.st_ctime_ns if os.name == "posix" else status.st_mtime_ns


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    return aside
