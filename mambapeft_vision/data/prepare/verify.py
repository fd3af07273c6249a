"""Checks a task folder from its list files down to the pixels, and fingerprints it."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from mambapeft_vision.data.image_list import ImageList, parse_list
from mambapeft_vision.data.manifest import TaskEntry, task_sha256
from mambapeft_vision.data.preprocessing import MAX_IMAGE_BYTES, check_image, describe_failure, open_image
from mambapeft_vision.data.tasks import SPLITS, Task
from mambapeft_vision.data.verified import States, state_of
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.progress import ProgressCallback, ProgressMeter
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import read_bytes

CHUNK = 128  # images handed to a worker process at once


@dataclass(frozen=True)
class TaskReport:
    """Outcome for one task.

    Args:
        entry: for the manifest; None when there are problems.
        problems: each as `file:line: what`, all of them.
        notes: odd but allowed.
        states: of the images just before they were read, for the manifest.
    """

    task: Task
    entry: TaskEntry | None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    states: States = field(default_factory=dict)


@dataclass(frozen=True)
class FileFinding:
    """The outcome of reading one image file: sha256 and size in bytes, or the error."""

    sha256: str = ""
    size: int = 0
    error: str = ""


def verify_task(
    task: Task,
    folder: Path,
    *,
    decode: bool = True,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> TaskReport:
    """Checks list files, labels, counts and every image of the task in `folder`; reports all problems.

    Args:
        decode: decode every image completely; else only its header is read (all bytes are hashed either way).
        executor: worker processes for the images; None works in this process.
        progress: called with the images done.
    """
    if not folder.is_dir():
        return TaskReport(task, None, [f"{folder}: the task's folder is missing."])
    problems: list[str] = []
    notes: list[str] = []
    listings: dict[str, ImageList] = {}
    for split in SPLITS:
        file = folder / f"{split}.txt"
        if not file.is_file():
            problems.append(f"{file}: the list file is missing.")
            continue
        try:
            listings[split], bad_lines = parse_list(file, task.num_classes)
        except UserError as error:  # no plain file, or too large
            problems.append(f"{error}.")
            continue
        problems += bad_lines or _count_problems(task, split, listings[split])
    notes += _label_notes(task, listings)

    states = {split: state_of(listing) for split, listing in listings.items()}
    images = {entry.path: f"{listing.file}:{entry.line}" for listing in listings.values() for entry in listing.entries}
    findings = _inspect_all(folder, list(images), decode=decode, executor=executor, progress=progress)
    problems += [
        f"{images[path]}: {plain(folder / path, 1_000)}: {found.error}"
        for path, found in findings.items()
        if found.error
    ]
    notes += _shared_images(listings, findings)
    if problems:
        return TaskReport(task, None, problems, notes)

    hashes = {path: found.sha256 for path, found in findings.items()}
    hashes |= {listing.file.name: listing.sha256 for listing in listings.values()}
    entry = TaskEntry(
        sha256=task_sha256(hashes),
        lists={split: listing.sha256 for split, listing in listings.items()},
        images=len(findings),
        bytes=sum(found.size for found in findings.values()),
        classes_seen={split: len(set(listing.labels().tolist())) for split, listing in listings.items()},
        decoded=decode,
    )
    return TaskReport(task, entry, problems, notes, states)


def inspect_file(file: Path, decode: bool) -> FileFinding:
    """Reads, hashes and opens one image; `decode` makes Pillow decode all pixels."""
    try:
        content = read_bytes(file, max_bytes=MAX_IMAGE_BYTES, follow_links=True)
    except OSError as error:
        return FileFinding(error=f"cannot read the image ({error.strerror or error}).")
    except UserError as error:
        return FileFinding(error=f"cannot read the image ({error}).")
    try:
        if decode:
            check_image(content)
        else:
            with open_image(content):
                pass
    except Exception as error:  # Pillow's readers raise far more than OSError on damaged files
        return FileFinding(error=f"cannot decode the image ({describe_failure(error)}).")
    return FileFinding(hashlib.sha256(content).hexdigest(), len(content))


def _inspect_all(
    folder: Path,
    paths: Sequence[str],
    *,
    decode: bool,
    executor: Executor | None,
    progress: ProgressCallback | None,
) -> dict[str, FileFinding]:
    meter = ProgressMeter(len(paths), progress)
    findings: dict[str, FileFinding] = {}
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    work = (itertools.repeat(folder), chunks, itertools.repeat(decode))
    results: Iterator[list[FileFinding]] = (map if executor is None else executor.map)(_inspect_chunk, *work)
    for chunk, found in zip(chunks, results, strict=True):
        findings.update(zip(chunk, found, strict=True))
        meter.advance(len(chunk))
    return findings


def _inspect_chunk(folder: Path, paths: Sequence[str], decode: bool) -> list[FileFinding]:
    return [inspect_file(folder / path, decode) for path in paths]


def _count_problems(task: Task, split: str, listing: ImageList) -> list[str]:
    valid = task.valid_counts(split)
    if len(listing) in valid:
        return []
    expected = " or ".join(f"{count:,}" for count in valid)
    return [f"{listing.file}: {len(listing):,} images listed; expected {expected}."]


def _shared_images(listings: dict[str, ImageList], findings: dict[str, FileFinding]) -> list[str]:
    """Notes on test images that equal training images, byte for byte."""
    if not {"train800val200", "test"} <= listings.keys():
        return []
    trained = {findings[entry.path].sha256 for entry in listings["train800val200"].entries} - {""}
    shared = [entry.path for entry in listings["test"].entries if findings[entry.path].sha256 in trained]
    if not shared:
        return []
    return [
        f"{len(shared):,} of {len(listings['test']):,} test images equal a training image, such as {plain(shared[0])}."
    ]


def _label_notes(task: Task, listings: dict[str, ImageList]) -> list[str]:
    """Notes on labels that a sound release does not have, but that need not make a task useless."""
    notes = []
    labels = {split: Counter(listing.labels().tolist()) for split, listing in listings.items()}
    if "test" in labels and len(labels["test"]) < task.num_classes:
        notes.append(f"{len(labels['test'])} of {task.num_classes} classes appear in test.txt.")
    if "test" in labels and "train800val200" in labels:
        untrained = sorted(labels["test"].keys() - labels["train800val200"].keys())
        if untrained:
            notes.append(f"{len(untrained)} classes of test.txt are not in train800val200.txt, such as {untrained[0]}.")
    if len(labels) == len(SPLITS) and labels["train800"] + labels["val200"] != labels["train800val200"]:
        notes.append("train800val200.txt does not have the labels of train800.txt and val200.txt together.")
    return notes
