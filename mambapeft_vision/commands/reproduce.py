"""The whole table of MambaPEFT on Vim-S: sweep, collect, compare, one report.

Takes what `mambapeft sweep` takes; without `method`, every preset that stands for a row of the published table.
Only the runs of this command are in the report, whatever else is in the outputs folder.
"""

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.integrations.wandb_summary import publish_sweep
from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.paper import PUBLISHED, VIM_S
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import collect, read_standard, tables_of, to_markdown
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.sweep.jobs import plan_jobs
from mambapeft_vision.sweep.sweep import command_of, records_of, sweep, sweep_parser
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder

EXAMPLES = 3  # runs shown in detail


def main(arguments: Sequence[str]) -> int:
    configs = configs_folder()
    parser = sweep_parser("mambapeft reproduce", __doc__)
    parser.add_argument("--report", type=Path, default=Path("report.html"), metavar="FILE", help="page to write")
    options, overrides = parser.parse_with_overrides(arguments)
    if not any(override.startswith("method=") for override in overrides):
        overrides.append("method=" + ",".join(row.presets[0] for row in PUBLISHED[VIM_S]))
    command = command_of(options, overrides, configs)
    jobs = plan_jobs(command.overrides, configs)
    failed = sweep(jobs, command)
    if command.dry_run:
        return 0
    records = records_of(jobs)
    if not records:
        raise UserError("no run is finished, so there is nothing to report; the errors are above")
    standard = read_standard(configs)
    publish_sweep(jobs, standard)
    collections = collect(records, standard)
    for collection in collections:
        print(f"\n{to_markdown(tables_of(collection)[0])}")
    examples = [job.folder for job in jobs if (job.folder / PREDICTIONS_FILE).is_file()][:EXAMPLES]
    on_vtab = all(collection.is_vtab for collection in collections)
    title = "MambaPEFT on VTAB-1K, reproduced" if on_vtab else "MambaPEFT's methods on other tasks"
    write_text(options.report, report(collections, examples, title=title))
    print(f"report: {options.report}")
    return CRASH if failed else 0
