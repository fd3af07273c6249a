"""Shows every finished run in one page, explorer.html: sort it, filter it by family, backbone and task, and point at a
row for its command and its confusions. The page contains everything that it shows and loads nothing.

mambapeft explore [outputs ...] [--out explorer.html]
"""

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.commands.tables import results_below
from mambapeft_vision.results.explorer import explorer, read_names
from mambapeft_vision.results.tables import read_standard
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.paths import configs_folder


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft explore", __doc__)
    parser.add_argument("places", nargs="*", default=["outputs"], help="folders with runs, result.json or .runs.json")
    parser.add_argument("--out", type=Path, default=Path("explorer.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--title", default="Results", help="title of the page")
    options = parser.parse_args(arguments)
    configs = configs_folder()
    found = results_below(options.places)
    write_text(options.out, explorer(found, read_standard(configs), read_names(configs), title=options.title))
    print(f"{len(found):,} results: {options.out}")
