"""Checks on a CPU that pretraining helps and that LoRA_p(X) adds to it: scratch < linear_probe < lora_p_x.

Four methods (the fourth is full fine-tuning), three tasks that need no download, two seeds, on the embedded vim_nano,
through the sweep: finished runs are not repeated. Ends with tables and the verdict on the mean over tasks and seeds;
exit code 1 where the order is lost. Not a part of `make test`: it trains for a while.
"""

from collections.abc import Sequence

from mambapeft_vision.results.compare import ordering
from mambapeft_vision.results.tables import collect, read_standard, tables_of, to_markdown
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.sweep.sweep import fixed_sweep, records_of, sweep_parser
from mambapeft_vision.utils.paths import configs_folder

RUNS = [
    "experiment=demo",
    "dataset=mini/digits,mini/sprites_loc,mini/solids_count",
    "method=scratch,linear_probe,lora_p_x,full",
    "seed=0,1",
    "trainer.device=cpu",
]
EXPECTED = ("scratch", "linear_probe", "lora_p_x")  # of full fine-tuning nothing is expected


def main(arguments: Sequence[str]) -> int:
    configs = configs_folder()
    records = records_of(fixed_sweep(sweep_parser("mambapeft check-science", __doc__), RUNS, arguments, configs))
    (collection,) = collect(records, read_standard(configs))
    for table in tables_of(collection):
        print(f"\n{to_markdown(table)}")
    verdict = ordering(records, EXPECTED)
    print(verdict)
    return CRASH if verdict.broken else 0
