"""The whole table of MambaPEFT on Vim-S: sweep, collect, compare, one report.

python scripts/reproduce_table1.py [method=...] [dataset=...] [seeds=0] [workers=N] [--dry-run] [--report report.html]

Takes what scripts/sweep_vtab1k.py takes; without `method`, every preset that stands for a row of the published table.
Only the runs of this command are in the report, whatever else is in the outputs folder.
"""

import sys
from pathlib import Path

from mambapeft_vision.integrations.wandb_summary import publish_sweep
from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.paper import PUBLISHED, VIM_S
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import collect, read_standard, tables_of, to_markdown
from mambapeft_vision.run.exit import CRASH, run_cli
from mambapeft_vision.sweep.jobs import plan_jobs
from mambapeft_vision.sweep.sweep import parse, records_of, sweep
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXAMPLES = 3  # runs shown in detail


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    arguments, page = _take_report(sys.argv[1:])
    if not any(argument.startswith("method=") for argument in arguments):
        arguments.append("method=" + ",".join(row.presets[0] for row in PUBLISHED[VIM_S]))
    command = parse(arguments, CONFIGS)
    jobs = plan_jobs(command.overrides, CONFIGS)
    failed = sweep(jobs, command)
    if command.dry_run:
        return
    records = records_of(jobs)
    if not records:
        raise UserError("no run is finished, so there is nothing to report; the errors are above")
    standard = read_standard(CONFIGS)
    publish_sweep(jobs, standard)
    collections = collect(records, standard)
    for collection in collections:
        print(f"\n{to_markdown(tables_of(collection)[0])}")
    examples = [job.folder for job in jobs if (job.folder / PREDICTIONS_FILE).is_file()][:EXAMPLES]
    on_vtab = all(collection.is_vtab for collection in collections)
    title = "MambaPEFT on VTAB-1K, reproduced" if on_vtab else "MambaPEFT's methods on other tasks"
    write_text(page, report(collections, examples, title=title))
    print(f"report: {page}")
    if failed:
        sys.exit(CRASH)


def _take_report(arguments: list[str]) -> tuple[list[str], Path]:
    """Splits `--report FILE` off."""
    if "--report" not in arguments:
        return arguments, Path("report.html")
    place = arguments.index("--report")
    if place + 1 == len(arguments):
        raise UserError("--report names no file; expected e.g. --report report.html")
    return arguments[:place] + arguments[place + 2 :], Path(arguments[place + 1])


if __name__ == "__main__":
    run_cli(main)
