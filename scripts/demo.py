"""Fine-tunes the embedded vim_nano on a task that needs no download, three ways; ends with a table and a picture.

python scripts/demo.py [workers=N] [--dry-run] [any Hydra override]

Linear probing, LoRA_p(X) and full fine-tuning with the settings of configs/experiment/demo.yaml, through the sweep:
finished runs are not repeated, so a second call shows table and picture at once. docs/pretraining.md says what the
backbone is, and what it is not.
"""

import sys
from pathlib import Path

from mambapeft_vision.results.demo import compare, show
from mambapeft_vision.results.tables import collect, read_standard
from mambapeft_vision.run.exit import run_cli
from mambapeft_vision.sweep.sweep import fixed_sweep, records_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# The longest run first: two workers then end at about the same time.
RUNS = ["experiment=demo", "dataset=mini/digits", "method=full,lora_p_x,linear_probe"]
PICTURE = "demo.png"


def main() -> None:
    jobs = fixed_sweep(__doc__, RUNS, sys.argv[1:], CONFIGS)
    records = records_of(jobs)
    (collection,) = collect(records, read_standard(CONFIGS))
    picture = Path(jobs[0].plan.config["paths"]["outputs"]).expanduser() / PICTURE
    print(show(collection, picture))
    print(compare({"+".join(record.methods): record for record in records}))


if __name__ == "__main__":
    run_cli(main)
