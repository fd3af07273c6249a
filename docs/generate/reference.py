"""Reference tables made from the code: config keys, methods, backbones, commands, and the fields of a result."""

import dataclasses
import importlib
import inspect
import io
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any

import timm
import torch
from pictures import rows

import mambapeft_vision
from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.adapter.presets import Preset, read_presets, registered_name
from mambapeft_vision.backbones.registry import one_block
from mambapeft_vision.cli import COMMANDS, main
from mambapeft_vision.methods.method import Method
from mambapeft_vision.results import record
from mambapeft_vision.run import config_reference
from mambapeft_vision.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
BACKBONES = {"vim_s": "Vim-S", "vim_b": "Vim-B", "vit_s": "ViT-S"}


def table(header: Sequence[str], lines: Iterable[Sequence[str]], align: str = "") -> str:
    """A Markdown table. align: a letter for each column, l or r; default: all l."""
    marks = {"l": "---", "r": "--:"}
    rule = [marks[letter] for letter in (align or "l" * len(header))]
    rows = [list(header), rule, *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


# -- config keys ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a yaml file: its path in the section, its value as written, and the comment beside or above it."""

    path: str
    value: str
    comment: str


def keys_of(file: Path) -> Iterator[Key]:
    """The keys of a config file, those of nested sections with dots, without Hydra's own."""
    above: list[str] = []
    section = ""
    lines = file.read_text(encoding="utf-8").splitlines()
    for line in dropwhile(lambda line: line.startswith("#"), lines):  # the file's own header describes no key
        if line.lstrip().startswith("#"):
            above.append(line.strip("# "))
            continue
        found = re.fullmatch(r"(\s*)([A-Za-z_]\w*):\s*(.*?)(?:\s*#\s*(.*))?", line)
        if found is None:
            above = []
            continue
        indent, name, value, comment = found.groups()
        section = section if indent else ""
        if name in ("defaults", "hydra", "_target_"):
            section = "hydra"
        elif section != "hydra":
            text = " ".join([*above, comment or ""]).strip()
            if value:
                yield Key(f"{section}.{name}" if section else name, value, text)
            else:
                section = name
        above = []


def group_keys(file: str, prefix: str) -> str:
    """A table of the keys of one option of a group: types from the target's arguments, meanings from the comments."""
    types = _types_of(re.findall(r"^_target_: (\S+)", (CONFIGS / file).read_text(encoding="utf-8"), re.MULTILINE)[0])
    lines = []
    for key in keys_of(CONFIGS / file):
        default = "required" if key.value == "???" else f"`{key.value}`"
        lines.append([f"`{prefix}{key.path}`", types[key.path], default, key.comment])
    return table(["key", "type", "default", "meaning"], lines)


def _types_of(target: str) -> dict[str, str]:
    """The types of what a `_target_` takes, by the names of its arguments."""
    function = _target(target)
    return {name: _name_of(parameter.annotation) for name, parameter in inspect.signature(function).parameters.items()}


def _target(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def schema_keys(root: str, section: str = "", prefix: str = "") -> str:
    """A table of a config's keys: those of a section, or those of the top level and of `paths`.

    prefix: written before each name.
    """
    lines = []
    for key in config_reference.reference(root):
        inside = key.name.startswith(f"{section}.") if section else root != "train" or _is_at_top(key.name)
        if inside and key.kind != "section":
            default = f"`{key.default}`" if key.default else "required"
            lines.append([f"`{prefix}{key.name}`", key.kind, default, key.meaning])
    return table(["key", "type", "default", "meaning"], lines)


def _is_at_top(name: str) -> bool:
    return "." not in name or name.startswith("paths.")


def options(group: str) -> str:
    """The names that a group of configs takes, those of each folder in a line."""
    files = sorted((CONFIGS / group).rglob("*.yaml"), key=lambda file: (file.parent != CONFIGS / group, file))
    names = [file.relative_to(CONFIGS / group).with_suffix("") for file in files]
    lines = [", ".join(f"`{name}`" for name in found) for _, found in groupby(names, key=lambda name: name.parent)]
    return "\n".join(f"* {line}" for line in lines)


def _name_of(kind: Any) -> str:
    """A type as the schema's tables write it: "str or null"; a "|" would end a table's cell."""
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    for written, shown in (("typing.", ""), ("str | pathlib.Path", "str"), ("None", "null"), (" | ", " or ")):
        name = name.replace(written, shown)
    return name


# -- methods --------------------------------------------------------------------------------------------------


def method_table() -> str:
    """Every preset in one line, with what its methods say once they are attached to a block of the backbone."""
    lines = []
    for preset in read_presets(CONFIGS / "method").values():
        methods = _attached(preset)
        obstacles = {method.merge_obstacle for method in methods}
        lines.append(
            [
                f"[`{preset.name}`](#{preset.name})",
                _first_sentence(preset.what),
                BACKBONES.get(preset.backbone, preset.backbone),
                f"{preset.count:,}",
                preset.paper,
                "yes" if obstacles == {None} else "in part" if None in obstacles else "no",
                "yes" if all(method.identity_at_init for method in methods) else "no",
            ]
        )
    header = ["preset", "what it is", "sizes for", "parameters", "paper", "merges", "starts as the base model"]
    return table(header, lines, "lllrlll")


def _attached(preset: Preset) -> list[Method]:
    """The methods of a preset on one block of its backbone, without values."""
    name = registered_name(CONFIGS, preset.backbone)
    with torch.device("meta"):
        methods = {key: build_method(key, spec, preset.name) for key, spec in preset.methods_on(name).items()}
        adapt(timm.create_model(name, num_classes=0, **one_block(name)), methods, 2)
    return list(methods.values())


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a word; `arXiv 2411.03855` has none."""
    return re.split(r"\. (?=[A-Z])", text)[0].rstrip(".")


def method_sections() -> str:
    """The sections of docs/methods.md, which GitHub shows too; links into the code become names of files."""
    _, sections = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("\n## ", 1)
    return re.sub(r"\[\S+\]\(\.\./(\S+)\)", r"`\1`", f"## {sections}")


def method_arguments() -> str:
    """The arguments of every method class that a preset uses."""
    presets = read_presets(CONFIGS / "method").values()
    classes: set[type[Method]] = {_target(spec["_target_"]) for preset in presets for spec in preset.methods.values()}
    return "\n".join(_arguments_of(cls) for cls in sorted(classes, key=lambda cls: cls.__name__))


def _arguments_of(cls: type[Method]) -> str:
    meanings = {**config_reference.meanings(Method), **config_reference.meanings(cls)}
    lines: list[list[str]] = []
    for base in reversed(cls.__mro__):
        if "__init__" not in vars(base) or not issubclass(base, Method):
            continue
        for parameter in inspect.signature(base.__init__).parameters.values():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
            kind = _name_of(parameter.annotation)
            line = [f"`{parameter.name}`", f"`{kind}`", default, meanings.get(parameter.name, "")]
            lines = [other for other in lines if other[0] != line[0]] + [line]
    return f"#### {cls.__name__}\n\n{table(['argument', 'type', 'default', 'meaning'], lines)}\n"


# -- backbones ------------------------------------------------------------------------------------------------


def backbone_table() -> str:
    """Every backbone of configs/backbone: sizes, weights and licence from docs/backbones.md, published accuracy."""
    published = {row["config"]: row["top1"] for row in rows("published_accuracy.csv")}
    text = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").partition("\n## ")[0]
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    unknown = sorted(set(published) - {name for name, *_ in lines})
    if unknown:
        raise ValueError(f"docs/published_accuracy.csv names {', '.join(unknown)}; expected names of docs/backbones.md")
    cells = [
        [f"`{name}`", f"`{timm_name}`", *sizes, published.get(name, ""), weights]
        for name, timm_name, *sizes, weights in lines
    ]
    header = ["`backbone=`", *header[1:-1], "top\u20111 %", header[-1]]  # a hyphen that does not break
    return table(header, cells, "ll" + "r" * (len(header) - 3) + "l")


# -- results and commands -------------------------------------------------------------------------------------


def result_fields() -> str:
    """The fields of result.json, from the comments beside them."""
    lines = []
    for line in inspect.getsource(record.RunRecord).splitlines():
        found = re.fullmatch(r"    (\w+): ([^=#]+?)(?: = \w+)?(?:  # (.*))?", line)
        if found is not None:
            lines.append([f"`{found[1]}`", f"`{found[2].strip().replace(' | ', ' or ')}`", found[3] or ""])
    return table(["field", "type", "meaning"], lines)


def errors() -> str:
    """Every class of errors that end a command with a message and no traceback."""
    for _, name, _ in pkgutil.walk_packages(mambapeft_vision.__path__, "mambapeft_vision."):
        if not name.startswith("mambapeft_vision.benchmarks"):
            importlib.import_module(name)
    lines = []
    for kind in _with_subclasses(UserError):
        lines.append([f"`{kind.__name__}`", f"`{kind.__bases__[0].__name__}`", _first_line(kind), kind.__module__])
    return table(["class", "is a", "meaning", "module"], lines)


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    for other in sorted(kind.__subclasses__(), key=lambda found: found.__name__):
        yield from _with_subclasses(other)


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def commands() -> str:
    """Every command's own help."""
    listed = table(["command", "what it does"], [[f"[`{name}`](#{name})", what] for name, what in COMMANDS.items()])
    return "\n\n".join([listed, *(f"## {name}\n\n```text\n{_help_of(name)}\n```" for name in COMMANDS)])


def _help_of(command: str) -> str:
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        main([command, "--help"])
    return shown.getvalue().strip()
