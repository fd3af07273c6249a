"""Notes on own images once they are split: uneven classes, classes missing from a split, duplicates."""

from collections import defaultdict
from collections.abc import Sequence

from mambapeft_vision.data.own.draw import TEST, TRAIN, VAL
from mambapeft_vision.data.own.index import IndexedFile, per_class
from mambapeft_vision.data.own.source import Source, named

_UNEVEN = 3  # times as many training images of one class as of another are worth a note


def notes_of(source: Source, files: Sequence[IndexedFile]) -> list[str]:
    return [*_unevenness(source, files), *_absences(source, files), *_duplicates(files)]


def _unevenness(source: Source, files: Sequence[IndexedFile]) -> list[str]:
    counts = per_class(files, (TRAIN, VAL))
    seen = {label: count for label, count in counts.items() if count}
    if not seen:
        return []
    most, fewest = max(seen, key=lambda k: seen[k]), min(seen, key=lambda k: seen[k])
    if seen[most] <= _UNEVEN * seen[fewest]:
        return []
    return [
        f"the classes are uneven: {source.class_names[most]!r} has {seen[most]:,} images to train and validate, "
        f"{source.class_names[fewest]!r} has {seen[fewest]:,}."
    ]


def _absences(source: Source, files: Sequence[IndexedFile]) -> list[str]:
    notes = []
    for words, purpose in (((TRAIN, VAL), "to train"), ((TEST,), "to test")):
        counts = per_class(files, words)
        absent = [name for label, name in enumerate(source.class_names) if not counts[label]]
        if absent:
            notes.append(f"no image {purpose} has the class {named(absent)}.")
    return notes


def _duplicates(files: Sequence[IndexedFile]) -> list[str]:
    """Notes on images of the same bytes: in several splits, or with other labels."""
    same = defaultdict(list)
    for file in files:
        same[file.sha256].append(file)
    twins = [group for group in same.values() if len(group) > 1]
    shared = [group for group in twins if {file.split == TEST for file in group} == {True, False}]
    relabelled = [group for group in twins if len({file.labels for file in group}) > 1]
    notes = []
    for groups, what in ((shared, "stand both among training and test images"), (relabelled, "have different labels")):
        if groups:
            notes.append(f"{len(groups):,} images {what}: {named([' = '.join(f.path for f in g) for g in groups])}.")
    return notes
