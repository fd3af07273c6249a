"""The mini benchmark's tables and pictures for the site, and docs/mini.csv for the pictures.

python docs/generate/mini_benchmark.py        writes docs/mini.csv from results/mini
"""

import csv
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import fmean

from mambapeft_vision.benchmarks.mini_backbones import comparison
from mambapeft_vision.benchmarks.mini_document import BEGIN, END, stages_of, write_document
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import Standard, find_records, read_standard

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "mini"
VIM_NANO = RESULTS / "vim_nano.runs.json"
CSV = ROOT / "docs" / "mini.csv"


@cache
def records(place: Path = RESULTS) -> list[RunRecord]:
    """The runs of a file, or of all backbones."""
    return list(find_records([place]))


def summary() -> list[dict[str, str]]:
    """Every preset's trained parameters, and its mean accuracy in % over tasks and seeds at both settings."""
    standard = read_standard(ROOT / "configs")
    stages = stages_of(records(VIM_NANO), standard)
    recipe, tuned = _by_preset(stages.recipe, standard), _by_preset(stages.tuned, standard)
    return [
        {
            "method": name,
            "trained": str(found[0].trainable),
            "accuracy": _mean(found),
            "tuned": _mean(tuned[name]),
            "runs": str(len(found)),
        }
        for name, found in sorted(recipe.items())
    ]


def _by_preset(runs: Iterable[RunRecord], standard: Standard) -> dict[str, list[RunRecord]]:
    found: dict[str, list[RunRecord]] = defaultdict(list)
    for record in runs:
        found[standard.describe(record.config)[0]].append(record)
    return found


def _mean(runs: Iterable[RunRecord]) -> str:
    return f"{100 * fmean(record.accuracy for record in runs):.2f}"


@cache
def document(backbone: str = "vim_nano") -> tuple[str, dict[str, bytes]]:
    """The generated part of a backbone's page, and its pictures by file name."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / ("mini.md" if backbone == "vim_nano" else f"mini-{backbone}.md")
        write_document(page, records(RESULTS / f"{backbone}.runs.json"), read_standard(ROOT / "configs"))
        made = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
        return made.strip(), _pictures(folder)


@cache
def backbones() -> tuple[str, dict[str, bytes]]:
    """The comparison of all backbones whose results are in git, and its picture."""
    with tempfile.TemporaryDirectory() as folder:
        text = comparison(Path(folder) / "mini-backbones", records(), read_standard(ROOT / "configs"))
        return text, _pictures(folder)


def compared() -> str:
    """The comparison of all backbones."""
    return backbones()[0]


def tables(backbone: str) -> str:
    """All tables of a backbone."""
    return document(backbone)[0]


def pictures() -> dict[str, bytes]:
    """All of them, by file name."""
    found = dict(backbones()[1])
    for file in RESULTS.glob("*.runs.json"):
        found |= document(file.name.removesuffix(".runs.json"))[1]
    return found


def _pictures(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def part(*headings: str) -> str:
    """What stands below a heading of vim_nano's document, below another one, and so on; without its subsections.

    A heading is given by how it ends, since its start names backbone and weights.
    """
    text = document()[0]
    for level, heading in enumerate(headings, start=2):
        marks = "#" * level
        sections = re.split(rf"^{marks} (?=\S)", text, flags=re.MULTILINE)[1:]
        found = [section for section in sections if section.splitlines()[0].endswith(heading)]
        if len(found) != 1:
            raise ValueError(
                f"the mini benchmark's document has {len(found)} headings '{marks} …{heading}'; expected one"
            )
        text = found[0].partition("\n")[2]
    return re.split(rf"^#{{2,{len(headings) + 1}}} ", text, flags=re.MULTILINE)[0].strip()


if __name__ == "__main__":
    with open(CSV, "w", newline="", encoding="utf-8") as file:
        file.write("# The mini benchmark with the paper's settings and with chosen ones (tuned); ")
        file.write("made by docs/generate/mini_benchmark.py.\n")
        writer = csv.DictWriter(file, ["method", "trained", "accuracy", "tuned", "runs"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(summary())
    print(CSV)
