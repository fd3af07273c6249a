"""Tables of all finished runs below some folders, beside the published numbers.

Format html is one self-contained page with the tables and the plots. --all writes every form of them into a folder:
report.html, tables.md, tables.csv, tables.tex and the plots as PNG files.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.results.plots import named_apart, pictures_of_collections, save_png
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import (
    Collection,
    Found,
    collect,
    find_results,
    read_standard,
    tables_of,
    to_csv,
    to_latex,
    to_markdown,
)
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.outdated import outdated_note
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft tables", __doc__)
    parser.add_argument("places", nargs="*", default=["outputs"], help="folders with runs, or result.json files")
    parser.add_argument("--format", default="md", choices=["md", "csv", "latex", "html"])
    parser.add_argument("--out", help="write to this file instead of the terminal")
    parser.add_argument("--all", metavar="DIR", type=Path, help="write every table and picture into this folder")
    parser.add_argument("--allow-mixed", action="store_true", help="runs on different images or weights in one table")
    options = parser.parse_args(arguments)
    collections = collections_below(options.places, allow_mixed=options.allow_mixed)
    if options.all is not None:
        write_all(collections, options.all)
    elif options.out is not None:
        write_text(options.out, _text(collections, options.format))
    else:
        print(_text(collections, options.format), end="")


def collections_below(places: Sequence[str], *, allow_mixed: bool) -> list[Collection]:
    """The finished runs below some folders, sorted for tables. Raises UserError where there are none."""
    records = [found.record for found in results_below(places)]
    return collect(records, read_standard(configs_folder()), allow_mixed=allow_mixed)


def results_below(places: Sequence[str]) -> list[Found]:
    """The finished runs below some folders; a line on stderr says how many have other inputs than are present now.

    Raises UserError where there are none.
    """
    found = find_results(places)
    if not found:
        raise UserError(f"no finished run (result.json) below {', '.join(places)}; train something first")
    note = outdated_note(found)
    if note:
        say(note, sys.stderr)
    return found


def write_all(collections: list[Collection], folder: Path) -> None:
    """Writes the report, the tables in all formats and the plots into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = pictures_of_collections(collections)
    write_text(folder / "report.html", report(collections, title="Results", pictures=pictures))
    for name, form in (("tables.md", "md"), ("tables.csv", "csv"), ("tables.tex", "latex")):
        write_text(folder / name, _text(collections, form))
    for name, content in named_apart(pictures).items():
        save_png(content, folder / f"{name}.png")
    print(f"{sum(len(row.records) for c in collections for row in c.rows)} runs, every table and picture: {folder}")


def _text(collections: list[Collection], form: str) -> str:
    if form == "html":
        return report(collections, title="Results")
    if form == "csv":
        return to_csv(collections)
    render = to_markdown if form == "md" else to_latex
    return "\n".join(render(table) for collection in collections for table in tables_of(collection))
