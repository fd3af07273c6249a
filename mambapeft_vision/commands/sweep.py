"""Many runs from one command: tasks x methods x seeds, shared out over the GPUs.

  mambapeft sweep method=lora_p_x,hybrid seeds=0,1,2 [dataset=vtab/cifar,vtab/dtd] [workers=N] [--dry-run]

Anything else is a Hydra override, as `mambapeft train` takes them; commas, range() and glob() list choices. Without
`dataset`, the 19 tasks of VTAB-1K are taken. Finished runs are not repeated; after an interruption the same command
continues. Started several times, on one machine or on many with a common folder, the commands share the runs.
"""

from collections.abc import Sequence

from mambapeft_vision.integrations.wandb_summary import publish_sweep
from mambapeft_vision.results.tables import read_standard
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.sweep.jobs import plan_jobs
from mambapeft_vision.sweep.sweep import command_of, sweep, sweep_parser
from mambapeft_vision.utils.paths import configs_folder


def main(arguments: Sequence[str]) -> int:
    configs = configs_folder()
    options, overrides = sweep_parser(description=__doc__).parse_with_overrides(arguments)
    command = command_of(options, overrides, configs)
    jobs = plan_jobs(command.overrides, configs)
    failed = sweep(jobs, command)
    if not command.dry_run:
        publish_sweep(jobs, read_standard(configs))
    return CRASH if failed else 0
