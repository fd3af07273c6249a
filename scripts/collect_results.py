"""Tables of all finished runs below some folders, beside the published numbers.

python scripts/collect_results.py [outputs ...] [--format md|csv|latex|html] [--out FILE] [--allow-mixed]

html is one self-contained page with the tables and the plots.
"""

import argparse
from pathlib import Path

from mambapeft_vision.atomic import write_text
from mambapeft_vision.errors import UserError
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import (
    collect,
    find_records,
    read_standard,
    tables_of,
    to_csv,
    to_latex,
    to_markdown,
)
from mambapeft_vision.training.cli import run_cli

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of all finished runs, beside the published numbers.")
    parser.add_argument("places", nargs="*", default=["outputs"], help="folders with runs, or result.json files")
    parser.add_argument("--format", default="md", choices=["md", "csv", "latex", "html"])
    parser.add_argument("--out", help="write to this file instead of the terminal")
    parser.add_argument("--allow-mixed", action="store_true", help="runs on different images or weights in one table")
    arguments = parser.parse_args()
    text = _text(arguments)
    if arguments.out is None:
        print(text, end="")
    else:
        write_text(arguments.out, text)


def _text(arguments: argparse.Namespace) -> str:
    records = find_records(arguments.places)
    if not records:
        raise UserError(f"no finished run (result.json) below {', '.join(arguments.places)}; train something first")
    collections = collect(records, read_standard(CONFIGS), allow_mixed=arguments.allow_mixed)
    if arguments.format == "html":
        return report(collections, title="Results")
    if arguments.format == "csv":
        return to_csv(collections)
    render = to_markdown if arguments.format == "md" else to_latex
    return "\n".join(render(table) for collection in collections for table in tables_of(collection))


if __name__ == "__main__":
    run_cli(main)
