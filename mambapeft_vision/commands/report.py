"""Every table and picture of finished runs, written into a folder: report.html, tables.md, .csv, .tex, plots.

mambapeft report [outputs ...] [--out report]
"""

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.commands.tables import collections_below, write_all
from mambapeft_vision.run.arguments import ArgumentParser


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft report", __doc__)
    parser.add_argument("places", nargs="*", default=["outputs"], help="folders with runs, or result.json files")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--allow-mixed", action="store_true", help="runs on different images or weights in one table")
    options = parser.parse_args(arguments)
    write_all(collections_below(options.places, allow_mixed=options.allow_mixed), options.out)
