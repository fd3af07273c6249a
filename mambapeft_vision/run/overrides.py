"""Hydra overrides that list choices: glob() over options in subfolders, and the name of the sweep that they make.

Light to import, as config.py is.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.text import override

MULTIRUN = {"-m", "--multirun"}
NO_PART_OF_A_SWEEP = ("paths.", "logger", "hydra", "sweep")  # where and how it runs


def prepare_multirun(arguments: Sequence[str], configs: Path) -> list[str]:
    """Completes a command line of `mambapeft train`: expands glob(), names the sweep and the folder of this start.

    Without --multirun, only `~` is expanded.

    Raises: UserError for a glob that matches nothing.
    """
    arguments = [_at_home(argument) for argument in arguments]
    if not MULTIRUN & set(arguments):
        return arguments
    folders = [configs, *_config_folders(arguments)]
    expanded = [_expanded(argument, folders) for argument in arguments]
    places = [number for number, text in enumerate(expanded) if "=" in text and not text.startswith("-")]
    overrides = [expanded[number] for number in places]
    added = [f"hydra.sweep.subdir=launch-{uuid.uuid4().hex[:8]}"]
    if not any(text.startswith("sweep=") for text in overrides):
        added.append(f"sweep={sweep_name(overrides)}")
    # Beside the other overrides: argparse takes them from one place alone.
    place = places[-1] + 1 if places else len(expanded)
    return [*expanded[:place], *added, *expanded[place:]]


def glob_options(override: Override, folders: Sequence[Path]) -> tuple[str, ...]:
    """The options that `group=glob(...)` stands for: names of yaml files below the group's folder in any of `folders`.

    Hydra's own glob() does not see options in subfolders, such as those of dataset/vtab.
    Raises: UserError where there are none.
    """
    pattern = override.value()
    assert isinstance(pattern, Glob)  # callers have asked
    groups = [folder / override.key_or_group for folder in folders]
    known = {str(file.relative_to(group).with_suffix("")) for group in groups for file in group.rglob("*.yaml")}
    names = tuple(pattern.filter(sorted(known)))
    if not names:
        raise UserError(
            f"{override.input_line} matches nothing in {' or '.join(map(str, groups))}; "
            f"expected e.g. dataset=glob(vtab/*) or method=glob(lora_p_*)"
        )
    return names


def sweep_name(overrides: Sequence[str]) -> str:
    """Names a sweep by a hash of its choices: the same for the same choices, in any order and on any machine."""
    deciding = sorted(text for text in overrides if not text.lstrip("+~").startswith(NO_PART_OF_A_SWEEP))
    return f"sweep-{hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:8]}"


def _expanded(argument: str, folders: Sequence[Path]) -> str:
    if argument.startswith("-") or "=glob(" not in argument:
        return argument
    parsed = OverridesParser.create().parse_override(argument)
    if not isinstance(parsed.value(), Glob):
        return argument
    return f"{argument.partition('=')[0]}={','.join(glob_options(parsed, folders))}"


def _at_home(argument: str) -> str:
    """`paths.outputs=~/…` with the home folder written out: Hydra makes a folder below it, and would call it `~`."""
    key, _, value = argument.partition("=")
    path = value.strip("'\"")
    return override(key, user_path(path)) if key == "paths.outputs" and path.startswith("~") else argument


def _config_folders(arguments: Sequence[str]) -> Iterator[Path]:
    """Yields the folders of `--config-dir DIR`, in the forms that argparse takes."""
    for number, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            yield from map(Path, [value] if value else arguments[number + 1 : number + 2])
