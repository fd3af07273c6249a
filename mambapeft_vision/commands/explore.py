"""Every finished run in one page, explorer.html: sort, filter by family, backbone and task; point at a row for its
command and its confusions. The page holds everything that it shows and loads nothing.

mambapeft explore [outputs ...] [--out explorer.html]
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mambapeft_vision.results.explorer import Found, explorer, read_names
from mambapeft_vision.results.layout import RESULT_FILE, SET_ASIDE
from mambapeft_vision.results.record import read_record
from mambapeft_vision.results.tables import find_records, read_standard
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft explore", __doc__)
    parser.add_argument("places", nargs="*", default=["outputs"], help="folders with runs, result.json or .runs.json")
    parser.add_argument("--out", type=Path, default=Path("explorer.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--title", default="Results", help="of the page")
    options = parser.parse_args(arguments)
    configs = configs_folder()
    found = [one for place in options.places for one in _found(Path(place))]
    if not found:
        raise UserError(f"no finished run (result.json) below {', '.join(options.places)}; train something first")
    write_text(options.out, explorer(found, read_standard(configs), read_names(configs), title=options.title))
    print(f"{len(found):,} results: {options.out}")


def _found(place: Path) -> Iterator[Found]:
    """The results below a place: those of runs with their folders, those of bundles without."""
    if place.is_dir():
        for file in sorted(place.rglob(RESULT_FILE)):
            if SET_ASIDE not in file.parent.name:
                yield Found(read_record(file), file.parent)
        for bundle in sorted(place.rglob("*.runs.json")):
            yield from map(Found, find_records([bundle]))
    else:
        yield from map(Found, find_records([place]))
