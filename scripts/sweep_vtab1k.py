"""Many runs from one command: tasks x methods x seeds, shared out over the GPUs.

python scripts/sweep_vtab1k.py method=lora_p_x,hybrid seeds=0,1,2 [dataset=vtab/cifar,vtab/dtd] [workers=N] [--dry-run]

Anything else is a Hydra override, as train.py takes them; commas, range() and glob() list choices. Without `dataset`,
the 19 tasks of VTAB-1K are taken. Finished runs are not repeated; after an interruption the same command goes on.
Started several times, on one machine or many with a common folder, the commands share the runs out.
rates=FILE: measured images/s (docs/rates.csv), from which times are told before any run is recorded.
"""

import sys
from pathlib import Path

from mambapeft_vision.integrations.wandb_summary import publish_sweep
from mambapeft_vision.results.tables import read_standard
from mambapeft_vision.run.exit import CRASH, run_cli
from mambapeft_vision.sweep.jobs import plan_jobs
from mambapeft_vision.sweep.sweep import parse, sweep

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    command = parse(arguments, CONFIGS)
    jobs = plan_jobs(command.overrides, CONFIGS)
    failed = sweep(jobs, command)
    if not command.dry_run:
        publish_sweep(jobs, read_standard(CONFIGS))
    if failed:
        sys.exit(CRASH)


if __name__ == "__main__":
    run_cli(main)
