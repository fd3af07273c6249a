"""Writes docs/methods.md from the headers of configs/method/*.yaml.

python scripts/make_methods_doc.py [--check]

With --check nothing is written; the exit status is 1 when docs/methods.md is not up to date.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.adapter.presets import Preset, read_presets

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "methods.md"

HEAD = """\
# Methods

Generated from the headers of `configs/method/*.yaml` by `python scripts/make_methods_doc.py`; do not edit.

A preset is one yaml. `method=[a,b]` trains several together, in any order. Parameters are without the head;
`mambapeft count` compares them with the published table.
"""

BACKBONES = {"vim_s": "Vim-S", "vim_b": "Vim-B", "vit_s": "ViT-S", "mambareg_s": "Mamba-Reg-S"}


def sections(presets: dict[str, Preset]) -> dict[str, list[Preset]]:
    """Presets by heading: single methods, hybrids, and those for other backbones."""
    found: dict[str, list[Preset]] = {"Methods": [], "Hybrids": []}
    for preset in presets.values():
        if preset.backbone != "vim_s":
            heading = f"For {BACKBONES.get(preset.backbone, preset.backbone)}"
        else:
            heading = "Hybrids" if len(preset.methods) > 1 else "Methods"
        found.setdefault(heading, []).append(preset)
    return {heading: presets for heading, presets in found.items() if presets}


def section(preset: Preset) -> str:
    """One preset's own section."""
    files = sorted({spec["_target_"].split(".")[-2] for spec in preset.methods.values()})
    links = ", ".join(f"[{file}.py](../mambapeft_vision/methods/{file}.py)" for file in files)
    return f"""\
### {preset.name}

{preset.what}

    {preset.formula}

{preset.count:,} parameters on {BACKBONES.get(preset.backbone, preset.backbone)}. Paper: {preset.paper}. Code: {links}.

    {preset.run}
"""


def document(presets: dict[str, Preset]) -> str:
    """The whole of docs/methods.md."""
    parts = [HEAD]
    for heading, members in sections(presets).items():
        parts += [f"## {heading}\n", *map(section, members)]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes docs/methods.md from the presets' headers.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when it is not up to date")
    check = parser.parse_args(arguments).check
    text = document(read_presets(ROOT / "configs" / "method"))
    if check:
        return 0 if DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == text else 1
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
