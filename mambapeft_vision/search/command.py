"""The command lines of scripts/search_hybrid.py and scripts/tune.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.search.search import PROTOCOLS, Search
from mambapeft_vision.search.space import read_space
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import check_name

FOLDER = Path("searches")
OWN = ("space", "trials", "protocol", "storage", "name", "seeds")


def parse(arguments: Sequence[str], configs: Path, defaults: Mapping[str, str], tuned: bool) -> Search:
    """`key=value` for the keys of OWN; everything else is a Hydra override of the runs.

    Args:
        defaults: of those keys.
        tuned: whether `method=` names the preset whose settings are searched.
    Raises: UserError.
    """
    own, overrides = dict(defaults), []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or key.startswith("-"):
            raise UserError(f"{argument} is unknown; expected {', '.join(f'{k}=...' for k in OWN)} or Hydra overrides")
        if key in OWN or (tuned and key == "method"):
            own[key] = value
        else:
            overrides.append(argument)
    presets = read_presets(configs / "method")
    if tuned and own.get("method") not in presets:
        raise UserError(
            f"method={own.get('method')}: tuning needs one preset; {nearest(str(own.get('method')), presets)}"
        )
    if own["protocol"] not in PROTOCOLS:
        raise UserError(f"protocol={own['protocol']}; expected one of {', '.join(PROTOCOLS)}")
    if not own["trials"].isdecimal() or int(own["trials"]) < 1:
        raise UserError(f"trials={own['trials']}; expected a whole number of at least 1")
    if "seeds" in own:
        overrides.append(f"seed={own['seeds']}")
    # The protocol is part of every name, so that no output of a search on test images can be mistaken.
    name = own.get("name") or "_".join([own["space"], *([own["method"]] if tuned else []), own["protocol"]])
    check_name(name, "name")  # of a folder, a file and a study
    return Search(
        name=name,
        space=read_space(configs / "search" / f"{own['space']}.yaml", presets, own.get("method")),
        protocol=own["protocol"],
        trials=int(own["trials"]),
        folder=FOLDER / name,
        storage=own.get("storage"),
        overrides=tuple(overrides),
    )
