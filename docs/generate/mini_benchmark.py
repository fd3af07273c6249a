"""The mini benchmark's tables and pictures for the site, and docs/mini.csv for the pictures.

python docs/generate/mini_benchmark.py        writes docs/mini.csv from results/mini
"""

import csv
import re
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import fmean

from mambapeft_vision.benchmarks.mini import RECIPE_RATE
from mambapeft_vision.benchmarks.mini_document import write_document
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import find_records, read_standard

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "mini"
CSV = ROOT / "docs" / "mini.csv"


def recipe_summary() -> list[dict[str, str]]:
    """Mean accuracy in % and trained parameters of every preset at the paper's learning rate, over tasks and seeds."""
    runs: dict[str, list[RunRecord]] = defaultdict(list)
    standard = read_standard(ROOT / "configs")
    for record in find_records([RESULTS]):
        config = record.config
        if config["dataset"]["test_split"] == "test" and config["trainer"]["learning_rate"] == RECIPE_RATE:
            runs[standard.describe(config)[0]].append(record)
    return [
        {
            "method": name,
            "trained": str(found[0].trainable),
            "accuracy": f"{100 * fmean(record.accuracy for record in found):.2f}",
            "runs": str(len(found)),
        }
        for name, found in sorted(runs.items())
    ]


@cache
def document() -> tuple[str, dict[str, bytes]]:
    """The generated part of the benchmark's page, and its pictures by file name."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "mini.md"
        write_document(page, find_records([RESULTS]), read_standard(ROOT / "configs"))
        pictures = {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}
        return page.read_text(encoding="utf-8"), pictures


def part(*headings: str) -> str:
    """What stands below a heading of the generated document, below another one, and so on; without its subsections.

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
        file.write("# The mini benchmark at the paper's learning rate, made by docs/generate/mini_benchmark.py.\n")
        writer = csv.DictWriter(file, ["method", "trained", "accuracy", "runs"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(recipe_summary())
    print(CSV)
