"""report.html: tables and plots of many runs in one self-contained file."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import jinja2

from mambapeft_vision.results.files import read_bytes
from mambapeft_vision.results.layout import PAGE_FILE
from mambapeft_vision.results.pictures import run_title
from mambapeft_vision.results.plots import confusion_matrix, drawn, pictures_of_collections, training_curves
from mambapeft_vision.results.record import read_record
from mambapeft_vision.results.tables import MISSING, Collection, Table, tables_of
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain

MOST_CURVES = 7  # as many as colours and markers can distinguish
MOST_PICTURE_BYTES = 20_000_000
LONGEST_TEXT = 2_000  # characters of a cell, title or note
_PNG = b"\x89PNG\r\n\x1a\n"
_CAPTIONS = {"accuracy": "Accuracy against trained parameters", "tasks": "Every task and method"}


@dataclass(frozen=True)
class Picture:
    """A PNG with the text below it."""

    content: bytes
    caption: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.content).decode()


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, tables, pictures, and a sentence at its end."""

    title: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    note: str = ""


def report(
    collections: Sequence[Collection],
    examples: Sequence[Path] = (),
    *,
    title: str,
    pictures: Sequence[Mapping[str, bytes]] | None = None,
) -> str:
    """Makes the page. A picture that cannot be drawn is left out and named on stderr.

    Args:
        collections: the collections to show, in this order.
        examples: folders of finished runs whose curves, confusion matrix and page of test images are shown.
        pictures: `pictures_of_collections`, where they are drawn already.
    """
    pictures = pictures_of_collections(collections) if pictures is None else pictures
    sections = [_section(collection, drawn) for collection, drawn in zip(collections, pictures, strict=True)]
    if examples:
        sections.append(Section("Single runs", [], list(_examples(examples))))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mambapeft_vision.results"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["plain"] = partial(plain, longest=LONGEST_TEXT)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    page = environment.get_template("report.html").render(
        title=plain(title), made=made, sections=sections, missing=MISSING
    )
    return f"{page}\n"


def _section(collection: Collection, drawn: Mapping[str, bytes]) -> Section:
    pictures = [Picture(content, _CAPTIONS[name.partition("-")[0]]) for name, content in drawn.items()]
    records = [record for row in collection.rows for record in row.records.values()]
    devices = ", ".join(sorted({plain(record.device_name) for record in records}))
    return Section("", tables_of(collection), pictures, f"{len(records)} runs on {plain(devices, LONGEST_TEXT)}.")


def _examples(folders: Sequence[Path]) -> Iterator[Picture]:
    records = {folder: read_record(folder) for folder in folders[:MOST_CURVES]}
    names = {folder: run_title(record) for folder, record in records.items()}
    figures = {"Training curves": partial(training_curves, {names[folder]: folder for folder in records})}
    for folder, record in records.items():
        classes = record.config["dataset"].get("num_classes")
        figures[f"Confusion matrix of {names[folder]}"] = partial(confusion_matrix, folder, names[folder], classes)
    for caption, draw in figures.items():
        content = drawn(caption, draw)
        if content is not None:
            yield Picture(content, plain(caption))
    for folder, name in names.items():
        page = _page_of(folder)
        if page is not None:
            yield Picture(page, plain(f"Test images of {name}"))


def _page_of(folder: Path) -> bytes | None:
    """The page of test images of a run, where it is there; never another file that a link names."""
    try:
        content = read_bytes(folder / PAGE_FILE, "a PNG", most=MOST_PICTURE_BYTES)
    except UserError:
        return None
    return content if content.startswith(_PNG) else None
