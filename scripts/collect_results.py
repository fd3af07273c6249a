"""Tables of all finished runs below some folders, beside the published numbers.

python scripts/collect_results.py [outputs ...] [--format md|csv|latex|html] [--out FILE] [--allow-mixed]
python scripts/collect_results.py [outputs ...] --all DIR

html is one self-contained page with the tables and the plots. --all writes every form of them into a folder:
report.html, tables.md, tables.csv, tables.tex and the plots as PNG files.
"""

import argparse
from pathlib import Path

from mambapeft_vision.results.plots import named_apart, pictures_of_collection, save_png
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import (
    Collection,
    collect,
    find_records,
    read_standard,
    tables_of,
    to_csv,
    to_latex,
    to_markdown,
)
from mambapeft_vision.run.exit import run_cli
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of all finished runs, beside the published numbers.")
    parser.add_argument("places", nargs="*", default=["outputs"], help="folders with runs, or result.json files")
    parser.add_argument("--format", default="md", choices=["md", "csv", "latex", "html"])
    parser.add_argument("--out", help="write to this file instead of the terminal")
    parser.add_argument("--all", metavar="DIR", type=Path, help="write every table and picture into this folder")
    parser.add_argument("--allow-mixed", action="store_true", help="runs on different images or weights in one table")
    arguments = parser.parse_args()
    records = find_records(arguments.places)
    if not records:
        raise UserError(f"no finished run (result.json) below {', '.join(arguments.places)}; train something first")
    collections = collect(records, read_standard(CONFIGS), allow_mixed=arguments.allow_mixed)
    if arguments.all is not None:
        _write_all(collections, arguments.all)
    elif arguments.out is not None:
        write_text(arguments.out, _text(collections, arguments.format))
    else:
        print(_text(collections, arguments.format), end="")


def _write_all(collections: list[Collection], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [pictures_of_collection(collection) for collection in collections]
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


if __name__ == "__main__":
    run_cli(main)
