"""Ensembles of finished runs, from their stored probabilities: nothing is trained, no model is built.

  mambapeft ensemble outputs/mini/usps/lora_p_x            the seeds of a method on a task
  mambapeft ensemble outputs/mini/*/{lora_p_x,conv1d}      for each task, all runs of two methods
  mambapeft ensemble outputs --by seed                     for each task and seed, all methods
  mambapeft ensemble runs=RUN,RUN                          two runs

A place is the folder of a finished run, or one with such folders below. Runs of one task on the same test images (by
their fingerprint) and splits make one ensemble. Its accuracy and parameters are recorded below --out as a result with
the setting `ensemble`, which `mambapeft tables` and `report` show in a row of its own.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mambapeft_vision.results.layout import PREDICTIONS_FILE, RESULT_FILE
from mambapeft_vision.results.record import is_derived
from mambapeft_vision.results.tables import find_results
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.ensemble import Member, ensemble
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft ensemble", __doc__)
    parser.add_argument("places", nargs="+", metavar="RUN", help="folders of finished runs, or folders above them")
    parser.add_argument(
        "--by", choices=["task", "seed"], default="task", help="one ensemble for each task, or for each task and seed"
    )
    parser.add_argument("--label", help="name in tables (default: `3 seeds`, `2 methods` or `5 runs`)")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    places = [Path(part) for word in options.places for part in word.removeprefix("runs=").split(",")]
    made = 0
    for name, members in grouped(find_members(places), by_seed=options.by == "seed").items():
        if len(members) < 2:
            say(f"{name}: one run, so no ensemble")
            continue
        folder, record = ensemble(members, options.out.expanduser(), options.label)
        alone = ", ".join(f"{100 * member.record.accuracy:.2f}" for member in members)
        say(f"{name}: {100 * record.accuracy:.2f} % of {len(members)} runs ({alone}); {folder}")
        made += 1
    if not made:
        raise UserError("nothing was averaged; expected two or more runs of one task")


def find_members(places: Iterable[Path]) -> list[Member]:
    """The finished runs at or below some places, without ensembles and runs set aside. Raises UserError."""
    by_folder: dict[Path, Member] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place} is no folder; expected that of a finished run, or one with such below")
        found = [Member(one.folder, one.record) for one in find_results([place]) if one.folder is not None]
        if not found:
            raise UserError(f"no finished run ({RESULT_FILE}) in {place}")
        by_folder |= {member.folder: member for member in found}
    members = [member for member in by_folder.values() if not is_derived(member.record)]
    lacking = [member.folder for member in members if not (member.folder / PREDICTIONS_FILE).is_file()]
    if lacking:
        raise UserError(f"{lacking[0]} has no {PREDICTIONS_FILE} ({len(lacking)} runs lack it); run again")
    return members


def grouped(members: Iterable[Member], *, by_seed: bool) -> dict[str, list[Member]]:
    """Runs that can be averaged, by what they have in common."""
    found: dict[str, list[Member]] = {}
    for member in members:
        record = member.record
        dataset = record.config["dataset"]
        name = f"{record.task} ({dataset['train_split']} / {dataset['test_split']})"
        found.setdefault(plain(f"{name} seed {record.seed}" if by_seed else name), []).append(member)
    return found
