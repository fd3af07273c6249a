"""report.html: tables and plots of many runs in one self-contained file."""

import base64
import html
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from matplotlib.figure import Figure

from mambapeft_vision.results.pictures import PAGE_FILE, run_title
from mambapeft_vision.results.plots import (
    accuracy_against_parameters,
    confusion_matrix,
    png,
    task_bars,
    training_curves,
)
from mambapeft_vision.results.record import read_record
from mambapeft_vision.results.tables import MISSING, Collection, Table, tables_of

MOST_CURVES = 7  # that colours and markers tell apart
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #111; }
td.missing { color: #767676; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
p.note { color: #444; margin: .3rem 0; }
""".strip()


def report(collections: Sequence[Collection], examples: Sequence[Path] = (), *, title: str) -> str:
    """The page.

    Args:
        collections: what it shows, in this order.
        examples: folders of finished runs whose curves, confusion matrix and page of test images are shown.
    """
    sections = [_section(collection) for collection in collections]
    if examples:
        sections.append(_examples(examples))
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="note">Made {made} from result.json files.</p>',
            *sections,
            "</body></html>",
            "",
        ]
    )


def _section(collection: Collection) -> str:
    parts = [_table(table) for table in tables_of(collection)]
    scatter = accuracy_against_parameters(collection)
    if scatter is not None:
        parts.append(_figure(scatter, "Accuracy against trained numbers"))
    parts.append(_figure(task_bars(collection), "Every task and method"))
    records = [record for row in collection.rows for record in row.records.values()]
    parts.append(_note(f"{len(records)} runs on {', '.join(sorted({record.device_name for record in records}))}."))
    return "\n".join(["<section>", *parts, "</section>"])


def _examples(folders: Sequence[Path]) -> str:
    named = {run_title(read_record(folder)): folder for folder in folders}
    shown = dict(list(named.items())[:MOST_CURVES])
    parts = ["<section><h2>Single runs</h2>", _figure(training_curves(shown), "Training curves")]
    for name, folder in shown.items():
        classes = read_record(folder).config["dataset"]["num_classes"]
        parts.append(_figure(confusion_matrix(folder, name, classes), f"Confusion matrix of {name}"))
        picture = folder / PAGE_FILE
        if picture.is_file():
            parts.append(_image(picture.read_bytes(), f"Test images of {name}"))
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    notes = "\n".join(map(_note, table.notes))
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>\n{notes}"
    )


def _cell(text: str) -> str:
    return f'<td class="missing">{text}</td>' if text == MISSING else f"<td>{html.escape(text)}</td>"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _figure(figure: Figure, caption: str) -> str:
    return _image(png(figure), caption)


def _image(content: bytes, caption: str) -> str:
    data, text = base64.b64encode(content).decode(), html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
