"""The command lines of `mambapeft search` and `mambapeft tune`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.run.arguments import ArgumentParser, positive
from mambapeft_vision.search.search import PROTOCOLS, Search
from mambapeft_vision.search.space import read_space
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import check_name
from mambapeft_vision.utils.typed import nearest

FOLDER = Path("searches")


def search_parser(prog: str, description: str | None, defaults: Mapping[str, str], tuned: bool) -> ArgumentParser:
    """The options of a search, for `parse`.

    Args:
        defaults: defaults of the options `space`, `trials` and `protocol`.
        tuned: whether `--method` names the preset whose settings are searched.
    """
    parser = ArgumentParser(prog, description, usage="%(prog)s [options] [key=value ...]")
    parser.add_argument("--space", metavar="NAME", help="a file of configs/search (default: %(default)s)")
    if tuned:
        parser.add_argument("--method", metavar="PRESET", help="the preset to tune")
    parser.add_argument(
        "--trials", type=positive, metavar="N", help="trials of all workers together (default: %(default)s)"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, help="images that trials are tested on (default: %(default)s)")
    parser.add_argument("--storage", metavar="URL", help="database that workers without a common disk share")
    parser.add_argument("--name", help="name of the study and its folder, searches/NAME")
    parser.add_argument("--seeds", metavar="0,1", help="short for seed=0,1")
    parser.set_defaults(**defaults)
    return parser


def parse(
    arguments: Sequence[str], configs: Path, defaults: Mapping[str, str], tuned: bool, description: str | None = None
) -> Search:
    """A search from its command line. Raises UserError."""
    prog = f"mambapeft {'tune' if tuned else 'search'}"
    options, overrides = search_parser(prog, description, defaults, tuned).parse_with_overrides(arguments)
    presets = read_presets(configs / "method")
    preset = options.method if tuned else None
    if tuned and preset is None:
        raise UserError("tuning needs a preset; expected --method PRESET, such as --method lora_p_x")
    if tuned and preset not in presets:
        raise UserError(f"method={preset}: tuning needs one preset; {nearest(str(preset), presets)}")
    if options.seeds is not None:
        overrides.append(f"seed={options.seeds}")
    # The protocol is part of every name, so that no output of a search on test images can be mistaken.
    name = options.name or "_".join([options.space, *([str(preset)] if tuned else []), options.protocol])
    check_name(name, "name")  # it names a folder, a file and a study
    return Search(
        name=name,
        space=read_space(configs / "search" / f"{options.space}.yaml", presets, preset),
        protocol=options.protocol,
        trials=options.trials,
        folder=FOLDER / name,
        storage=options.storage,
        overrides=tuple(overrides),
    )
