"""Prints every preset's trained parameters beside the published table.

Models are built without values, so neither data nor weights nor a GPU are needed. Counts are without the head.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.adapter.presets import Preset, read_presets, registered_name
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.results.paper import PaperRow, paper_row
from mambapeft_vision.results.tables.render import Table, to_latex, to_markdown
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.utils.paths import configs_folder

CLASSES = 100  # the head's, which is not counted
FOOTNOTE = """\
Counts are without the head, whose size depends on the task: (D + 1) x classes, D = 384 for Vim-S.
Almost every row of the published Vim-S table is larger than what its configuration trains by the same extra head:
8.50K to 8.63K fits all of these rows. No VTAB-1K task has a head of that size (385 x 22 = 8,470, 385 x 23 = 8,855),
and their mean is 19.0K, so it is no number to aim at."""
COLUMNS = ("preset", "parameters", "table (K)", "table - ours (K)", "why they differ")


@dataclass(frozen=True)
class Count:
    """One line of the output."""

    preset: str
    ours: int
    table_k: int | None
    reason: str

    def cells(self) -> tuple[str, ...]:
        if self.table_k is None:
            return self.preset, f"{self.ours:,}", "-", "-", self.reason
        return (
            self.preset,
            f"{self.ours:,}",
            f"{self.table_k:,}",
            f"{self.table_k - self.ours / 1000:,.1f}",
            self.reason,
        )


def count(preset: Preset, backbone: str) -> int:
    """Trained parameters of a preset on a backbone (a file of configs/backbone), without the head."""
    name = registered_name(configs_folder(), backbone)
    with torch.device("meta"):
        methods = {key: build_method(key, spec, preset.name) for key, spec in preset.methods_on(name).items()}
        model = adapt(create_backbone(name, "random"), methods, CLASSES)
        for method in model.methods.values():
            if method.warming_up:
                method.finish_warmup()  # a finished adapter holds the tensors of the last phase
    trainable: int = model.counts()["trainable"]
    return trainable


def why(preset: str, ours: int, row: PaperRow | None, head: int) -> str:
    """Why the published count differs from ours; "" where they agree."""
    if row is None or row.count_k is None:
        return ""
    extra = row.count_k - ours / 1000
    if abs(extra) <= 0.6:
        return ""
    if abs(extra - head / 1000) <= 0.6:
        return f"the table includes a head of {CLASSES} classes ({head:,})"
    if 7.9 <= extra <= 9.1:
        return "the table includes a head of about 8.5K" + (f"; {row.note}" if row.note else "")
    return row.note or f"unexplained: {extra:+,.1f}K"


def presets_for(backbone: str, presets: dict[str, Preset]) -> list[Preset]:
    """The presets made for a backbone; for a Vim also the presets made for Vim-S."""
    if backbone.startswith("vit"):
        shared = ("full", "scratch", "linear_probe", "bitfit")
        return [p for p in presets.values() if p.backbone == backbone or p.name in shared]
    return [p for p in presets.values() if p.backbone in (backbone, "vim_s")]


def counts(backbone: str) -> tuple[list[Count], list[str]]:
    """All lines for a backbone, and complaints about headers whose `count:` is not what was counted."""
    lines, wrong = [], []
    name = registered_name(configs_folder(), backbone)
    with torch.device("meta"):
        head = (create_backbone(name, "random").head_hidden_size + 1) * CLASSES
    for preset in presets_for(backbone, read_presets(configs_folder() / "method")):
        ours, row = count(preset, backbone), paper_row(preset.name, name)
        lines.append(Count(preset.name, ours, row.count_k if row else None, why(preset.name, ours, row, head)))
        if preset.backbone == backbone and ours != preset.count:
            wrong.append(f"configs/method/{preset.name}.yaml says count: {preset.count:,}, built: {ours:,}")
    return lines, wrong


def render(lines: list[Count], style: str) -> str:
    """The table as Markdown, CSV or LaTeX."""
    rows = [line.cells() for line in lines]
    if style == "csv":
        plain = [[c.replace(",", "") if i in (1, 2, 3) else f'"{c}"' for i, c in enumerate(row)] for row in rows]
        return "\n".join(",".join(row) for row in [COLUMNS, *plain])
    table = Table("", COLUMNS, rows, left=(0, 4))
    return (to_latex if style == "latex" else to_markdown)(table).rstrip()


def main(arguments: Sequence[str]) -> int:
    known = sorted(p.stem for p in (configs_folder() / "backbone").glob("*.yaml"))
    parser = ArgumentParser("mambapeft count", __doc__)
    parser.add_argument("--backbone", default="vim_s", choices=known)
    parser.add_argument("--format", default="md", choices=["md", "csv", "latex"])
    options = parser.parse_args(arguments)
    lines, wrong = counts(options.backbone)
    print(render(lines, options.format))
    if options.format == "md" and options.backbone == "vim_s":
        print(f"\n{FOOTNOTE}")
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0
