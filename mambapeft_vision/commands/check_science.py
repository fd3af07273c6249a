"""Checks on a CPU that pretraining helps and that LoRA_p(X) adds to it: scratch < linear_probe < lora_p_x.

Three methods on the five tasks that need no download, on every small backbone whose weights come with the package (or
on backbone=...), through the sweep: finished runs are not repeated. Ends with tables and a verdict for each backbone on
the mean over groups of tasks, because one task is natural and four are structured; exit code 1 where an order is lost.
Not a part of `make test`: it trains for minutes.
"""

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.results.compare import ordering
from mambapeft_vision.results.tables import collect, read_standard, tables_of, to_markdown
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.sweep.sweep import fixed_sweep, records_of, sweep_parser
from mambapeft_vision.utils.paths import configs_folder

RUNS = (
    "experiment=demo",
    "dataset=mini/digits,mini/sprites_loc,mini/sprites_ori,mini/solids_count,mini/solids_distance",
    "method=scratch,linear_probe,lora_p_x",
    "seed=0",
    "trainer.device=cpu",
)
EXPECTED = ("scratch", "linear_probe", "lora_p_x")


def main(arguments: Sequence[str]) -> int:
    configs = configs_folder()
    parser = sweep_parser("mambapeft check-science", __doc__)
    records = records_of(fixed_sweep(parser, [*RUNS, f"backbone={','.join(backbones(configs))}"], arguments, configs))
    broken = False
    for collection in collect(records, read_standard(configs)):
        for table in tables_of(collection):
            print(f"\n{to_markdown(table)}")
        verdict = ordering([record for row in collection.rows for record in row.records.values()], EXPECTED)
        print(f"{collection.backbone}: {verdict}")
        broken = broken or bool(verdict.broken)
    return CRASH if broken else 0


def backbones(configs: Path) -> list[str]:
    """The configs of the small backbones that are pretrained: their weights are in the package."""
    return sorted(file.stem for file in (configs / "backbone").glob("*_nano.yaml"))
