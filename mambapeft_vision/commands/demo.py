"""Fine-tunes the embedded vim_nano on a task that needs no download, three ways; ends with a table and a picture.

Linear probing, LoRA_p(X) and full fine-tuning with the settings of configs/experiment/demo.yaml, through the sweep:
finished runs are not repeated, so a second call shows table and picture at once. docs/how-to/pretrain.md describes the
backbone and its limits.
"""

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.results.demo import compare, show
from mambapeft_vision.results.tables import collect, read_standard
from mambapeft_vision.sweep.sweep import fixed_sweep, records_of, sweep_parser
from mambapeft_vision.utils.paths import configs_folder

# The longest run first: two workers then end at about the same time.
RUNS = ["experiment=demo", "dataset=mini/digits", "method=full,lora_p_x,linear_probe"]
PICTURE = "demo.png"


def main(arguments: Sequence[str]) -> None:
    configs = configs_folder()
    jobs = fixed_sweep(sweep_parser("mambapeft demo", __doc__), RUNS, arguments, configs)
    records = records_of(jobs)
    (collection,) = collect(records, read_standard(configs))
    picture = Path(jobs[0].plan.config["paths"]["outputs"]).expanduser() / PICTURE
    print(show(collection, picture))
    print(compare({"+".join(record.methods): record for record in records}))
