"""The whole table of MambaPEFT: sweep, collect, compare, one report.

Takes what `mambapeft sweep` takes. Without `method`, every preset of the published table that fits the backbone;
without `backbone`, Vim-S. The report compares with every published row of the same backbone and protocol. Only the runs
of this command are in it, whatever else is in the outputs folder.

--dry-run estimates runs, hours and disk space beforehand; without `backbone` it does so for Vim-S and B, Mamba-Reg,
VideoMamba and VMamba.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mambapeft_vision.adapter.presets import fitting_presets, registered_name
from mambapeft_vision.integrations.wandb_summary import publish_sweep
from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.paper import PUBLISHED, VIM_S
from mambapeft_vision.results.report import report
from mambapeft_vision.results.tables import collect, read_standard, tables_of, to_markdown
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.sweep.costs import GIB, Cost, cache_bytes, cost_of, cost_table
from mambapeft_vision.sweep.estimates import Speeds
from mambapeft_vision.sweep.jobs import Job, plan_jobs
from mambapeft_vision.sweep.sweep import Command, command_of, gpus_of, known_runs, records_of, sweep, sweep_parser
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.paths import configs_folder

EXAMPLES = 3  # runs shown in detail
BACKBONES = ("vim_s", "vim_b", "mambareg_s", "videomamba_s", "vmamba_s")  # in a dry run
PIXELS = 224 * 224


def main(arguments: Sequence[str]) -> int:
    configs = configs_folder()
    options, overrides = _parser(configs).parse_with_overrides(arguments)
    command = command_of(options, overrides, configs)
    if command.dry_run:
        _tell_costs(command, configs)
        return 0
    jobs = _jobs(command.overrides, _backbones(command.overrides) or ["vim_s"], configs)
    failed = sweep(jobs, command)
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


def _parser(configs: Path) -> ArgumentParser:
    parser = sweep_parser("mambapeft reproduce", __doc__)
    parser.add_argument("--report", type=Path, default=Path("report.html"), metavar="FILE", help="page to write")
    measured = configs.parent / "docs" / "rates.csv"  # in a checkout; a wheel has none
    parser.set_defaults(rates=str(measured) if measured.is_file() else None)
    return parser


def _backbones(overrides: Sequence[str]) -> list[str]:
    """The backbones that the command names, or []."""
    named = [override.partition("=")[2] for override in overrides if override.partition("=")[0] == "backbone"]
    return [name for text in named for name in text.split(",")]


def _jobs(overrides: Sequence[str], backbones: Sequence[str], configs: Path) -> list[Job]:
    """The runs on each backbone, with the methods that the command names or that fit. Raises UserError."""
    others = [override for override in overrides if override.partition("=")[0] != "backbone"]
    jobs = []
    for backbone in backbones:
        methods = [] if _names_methods(overrides) else [f"method={','.join(fitting_methods(backbone, configs))}"]
        jobs += plan_jobs([f"backbone={backbone}", *others, *methods], configs)
    return jobs


def _names_methods(overrides: Sequence[str]) -> bool:
    return any(override.startswith("method=") for override in overrides)


@cache
def fitting_methods(backbone: str, configs: Path) -> list[str]:
    """The presets of the published table that fit a backbone, in its order."""
    published = [row.presets[0] for row in PUBLISHED[VIM_S]]
    fitting, _ = fitting_presets(configs / "method", registered_name(configs, backbone), names=published)
    return [name for name in published if name in fitting]


# Before it begins


def _tell_costs(command: Command, configs: Path) -> None:
    """Prints the cost of each backbone's runs, and of what all of them share."""
    costs, all_jobs = [], []
    named = _backbones(command.overrides)
    for backbone in named or BACKBONES:
        cost, jobs = _cost(backbone, command, configs)
        costs.append(cost)
        all_jobs += jobs
    workers = command.workers or max(1, len(gpus_of(all_jobs)))
    print(to_markdown(cost_table(costs, workers)))
    print(f"The decoded images of all tasks take {cache_bytes(all_jobs, PIXELS) / GIB:.1f} GiB once (paths.cache).")
    if not named:
        print("`mambapeft reproduce backbone=NAME[,NAME]` runs them; without backbone=, vim_s.")


def _cost(backbone: str, command: Command, configs: Path) -> tuple[Cost, list[Job]]:
    overrides, note = list(command.overrides), ""
    if _needs_file(backbone, configs) and not any(override.startswith("backbone.weights=") for override in overrides):
        overrides.append("backbone.weights=random")  # so that it can be planned; such runs are other ones
        note = "backbone.weights=FILE"
    jobs = _jobs(overrides, [backbone], configs)
    speeds = Speeds(known_runs(user_path(jobs[0].plan.paths.outputs)), command.rates)
    left_out = 0 if _names_methods(overrides) else len(PUBLISHED[VIM_S]) - len(fitting_methods(backbone, configs))
    return cost_of(backbone, jobs, speeds, left_out, note), jobs


def _needs_file(backbone: str, configs: Path) -> bool:
    """Whether a backbone's config names no weights."""
    return "weights: ???" in (configs / "backbone" / f"{backbone}.yaml").read_text(encoding="utf-8")
