"""Reads the presets, configs/method/*.yaml: their methods, and what their headers say.

The header is the file's leading comment: lines of text (a description, then the formula as the last line), then
`key: value` lines: backbone (default vim_s), count (trained parameters without the head), paper, run.
"""

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.adapter.scaling import scaled
from mambapeft_vision.adapter.specs import for_backbone
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.registry import one_block
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import nearest
from mambapeft_vision.utils.untrusted import SafeLoader, read_yaml

_KEYS = ("backbone", "count", "paper", "run")


@dataclass(frozen=True)
class Preset:
    """One yaml of configs/method."""

    name: str
    what: str
    formula: str
    count: int
    paper: str
    run: str
    backbone: str
    specs: dict[str, dict[str, Any]]  # method's name → _target_ and arguments, with sizes by backbone
    overrides: dict[str, Any] = field(default_factory=dict)  # other config groups that it changes

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The specs with the sizes of the backbone that the preset is written for."""
        return self.methods_on(None)

    def methods_on(self, backbone: str | None) -> dict[str, dict[str, Any]]:
        """The specs with the published sizes for a backbone, by its registered name; see `specs.for_backbone`."""
        return for_backbone(self.specs, backbone)


def read_preset(path: str | Path) -> Preset:
    """Reads a preset. Raises UserError naming the file and the header line that is missing or wrong."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    lines = [line.removeprefix("#").strip() for line in _leading_comment(text)]
    header = {k: v for k, v in (_key_value(line) for line in lines) if k is not None}
    prose = [line for line in lines if _key_value(line)[0] is None and not line.startswith("@package")]
    missing = [key for key in _KEYS[1:] if key not in header]
    if missing or len(prose) < 2:
        raise UserError(
            f"{path}: the header needs what the method is, its formula and the lines count:, paper:, run:; "
            f"missing: {', '.join(missing) or 'the text or the formula'}"
        )
    if not re.fullmatch(r"\d{1,3}(,\d{3})*|\d+", header["count"]):
        raise UserError(f"{path}: count: {header['count']!r}; expected a whole number such as 1,769,472")
    content = SafeLoader(text).get_single_data() or {}
    is_global = "# @package _global_" in text.splitlines()
    return Preset(
        name=path.stem,
        what=" ".join(prose[:-1]),
        formula=prose[-1],
        count=int(header["count"].replace(",", "")),
        paper=header["paper"],
        run=header["run"],
        backbone=header.get("backbone", "vim_s"),
        specs=content["method"] if is_global else content,
        overrides={k: v for k, v in content.items() if k != "method"} if is_global else {},
    )


def read_presets(folder: str | Path) -> dict[str, Preset]:
    """Every preset of a folder, by name."""
    return {path.stem: read_preset(path) for path in sorted(Path(folder).glob("*.yaml"))}


def registered_name(configs: Path, backbone: str) -> str:
    """The registered name in a backbone's config: `vim_nano_patch8_64` for vim_nano. Raises UserError if unknown."""
    known = sorted(file.stem for file in (configs / "backbone").glob("*.yaml"))
    if backbone not in known:
        raise UserError(f"backbone={backbone} is unknown; {nearest(backbone, known)}")
    name: str = read_yaml(configs / "backbone" / f"{backbone}.yaml", references=True)["name"]
    return name


def fitting_presets(
    folder: str | Path, backbone: str, *, of_vim_s: bool = False, names: Collection[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Which presets of a folder attach to a backbone, found by attaching each to one block of it.

    Args:
        backbone: name of the architecture, such as vim_nano_patch8_64.
        of_vim_s: with sizes scaled from Vim-S, instead of those that the presets state for this backbone.
        names: the presets to try; None: all.
    Returns: the names of the presets that attach, and for each other preset the reason why it does not.
    """
    fitting, reasons = [], {}
    with torch.device("meta"):
        bare = create_backbone(backbone, "random", **one_block(backbone))
    for name, preset in read_presets(folder).items():
        if names is not None and name not in names:
            continue
        try:
            with torch.device("meta"):
                model = copy.deepcopy(bare)
                specs = scaled(preset.methods, model) if of_vim_s else preset.methods_on(backbone)
                adapt(model, {key: build_method(key, spec, name) for key, spec in specs.items()}, 2)
        except UserError as error:
            reasons[name] = str(error).splitlines()[0]
        else:
            fitting.append(name)
    return fitting, reasons


def _leading_comment(text: str) -> list[str]:
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:end]


def _key_value(line: str) -> tuple[str | None, str]:
    key, separator, value = line.partition(":")
    return (key, value.strip()) if separator and key in _KEYS else (None, line)
