"""Finished runs below folders."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mambapeft_vision.results.bundle import read_bundle
from mambapeft_vision.results.layout import BUNDLE_SUFFIX, RESULT_FILE, SET_ASIDE
from mambapeft_vision.results.record import RunRecord, read_record
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.untrusted import files_below


@dataclass(frozen=True)
class Found:
    """A result and, where it is a run's own file, the run's folder."""

    record: RunRecord
    folder: Path | None = None


def find_records(
    places: Iterable[str | Path], unreadable: Callable[[UserError], None] | None = None
) -> list[RunRecord]:
    """The records of `find_results`."""
    return [found.record for found in find_results(places, unreadable)]


def find_results(places: Iterable[str | Path], unreadable: Callable[[UserError], None] | None = None) -> list[Found]:
    """Every finished run below `places`, and all runs of bundles (`*.runs.json`); runs set aside do not count.

    Args:
        unreadable: called for each damaged file, which is then left out; default: it is raised.

    Raises: UserError for a place that does not exist, or a damaged file.
    """
    files: list[Path] = []
    bundles: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"{place} does not exist; expected a folder with finished runs, such as outputs")
        if place.is_file():
            (bundles if place.name.endswith(BUNDLE_SUFFIX) else files).append(place)
        else:
            found = files_below(place)
            files += [file for file in found if file.name == RESULT_FILE]
            bundles += [file for file in found if file.name.endswith(BUNDLE_SUFFIX)]
    results: list[Found] = []
    for file in files:
        if SET_ASIDE not in file.parent.name:
            results += [Found(record, file.parent) for record in _read(partial(_unless_gone, file), unreadable)]
    for bundle in bundles:
        results += map(Found, _read(partial(read_bundle, bundle), unreadable))
    return results


def _read(read: Callable[[], list[RunRecord]], unreadable: Callable[[UserError], None] | None) -> list[RunRecord]:
    try:
        return read()
    except UserError as error:
        if unreadable is None:
            raise
        unreadable(error)
        return []


def _unless_gone(file: Path) -> list[RunRecord]:
    try:
        return [read_record(file)]
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # set aside since it was found
            return []
        raise
