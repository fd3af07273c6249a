"""The mini benchmark: every preset that fits a small backbone on the 13 tasks of dataset=mini/*, and its tables.

  mambapeft prepare mini all --from DIR    once: the tasks
  mambapeft mini recipe                    every run at the paper's learning rate, three seeds
  mambapeft mini search                    five learning rates a method, scored on val200 of five tasks
  mambapeft mini refine                    four more trials a method: decay, and scale or rates in between
  mambapeft mini tuned                     the runs at each method's best trial that `recipe` has not done
  mambapeft mini memba                     why Memba is where it is: leak, threshold, chunks, reset, identity
  mambapeft mini ensemble                  means of the best methods' probabilities, over seeds and over methods
  mambapeft mini interpolate               the best methods between pretrained and adapted weights
  mambapeft mini all                       the four stages, the ensembles and the interpolations, one after another
  mambapeft mini pack                      all results of a backbone in one file, results/mini/BACKBONE.runs.json
  mambapeft mini unpack FILE               such a file as finished runs, to continue on another machine
  mambapeft mini document                  the tables and pictures of a backbone, into --out
  mambapeft mini compare                   all backbones in one table, and the correlations of their orders

--backbone NAME (default vim_nano) names a config of configs/backbone. Each command continues where it stopped. Hydra
overrides (trainer.max_epochs=20, paths.outputs=DIR, ...) go to every run and must be the same in every command.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambapeft_vision.adapter.presets import registered_name
from mambapeft_vision.benchmarks.mini import (
    STAGES,
    TASKS,
    VIM_NANO,
    Benchmark,
    benchmark_methods,
    jobs_of_stage,
    specs_of,
)
from mambapeft_vision.benchmarks.mini_derived import ensembles, interpolations
from mambapeft_vision.benchmarks.mini_memba import memba_jobs, memba_table
from mambapeft_vision.benchmarks.mini_settings import RATES, SEARCH_TASKS, Choice, Setting, choices, refinements
from mambapeft_vision.results.bundle import write_bundle
from mambapeft_vision.results.layout import BUNDLE_SUFFIX
from mambapeft_vision.results.record import RunRecord, is_finished, write_record
from mambapeft_vision.results.tables import find_records, read_standard, to_markdown
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.run.interpolate import How
from mambapeft_vision.run.run_config import make_run_folder, run_folder
from mambapeft_vision.sweep.deadline import run_in_time
from mambapeft_vision.sweep.jobs import Job, State
from mambapeft_vision.sweep.pool import visible_gpus
from mambapeft_vision.sweep.sweep import records_of
from mambapeft_vision.sweep.worker_cache import Kept
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder

RESULTS = Path("results/mini")
_NO_MEMBERS = "no tuned runs with stored probabilities are here; expected those of `mambapeft mini tuned`"


def main(arguments: Sequence[str], started: float | None = None) -> int | None:
    """The command. started: when it began on the monotonic clock, so that --max-minutes counts the imports too."""
    options = _parser().parse_args(arguments)
    options.started = time.monotonic() if started is None else started
    code: int | None = options.run(options)
    return code


# Runs


def run_stage(options: argparse.Namespace) -> int | None:
    return CRASH if _stage(options.command, _benchmark(options), options) is None else None


def run_all(options: argparse.Namespace) -> int | None:
    benchmark = _benchmark(options)
    for stage in STAGES:
        complete = _stage(stage, benchmark, options)
        if not complete and not options.dry_run:
            return CRASH if complete is None else None
    if options.dry_run:
        return None
    if time.monotonic() > _deadline(options):
        print("ensembles and interpolations are left; the same command continues")
        return None
    found = _choices(benchmark)
    if not _ensembles(benchmark, found, options):
        print(f"no ensembles: {_NO_MEMBERS}")  # results that were unpacked
    _interpolations(benchmark, found, options)
    return None


def _stage(name: str, benchmark: Benchmark, options: argparse.Namespace) -> bool | None:
    """As `_run`, and then says what a search has chosen."""
    complete = _run(name, jobs_of_stage(name, benchmark, _settings(name, benchmark)), options)
    if name in ("search", "refine") and complete:
        print_choices(_choices(benchmark))
    return complete


def run_memba(options: argparse.Namespace) -> int | None:
    benchmark = _benchmark(options)
    jobs = memba_jobs(benchmark)
    complete = _run("memba", jobs, options)
    if complete:
        print(to_markdown(memba_table(records_of(jobs), read_standard(benchmark.configs), benchmark.search_tasks)))
    return CRASH if complete is None else None


def run_ensembles(options: argparse.Namespace) -> None:
    benchmark = _benchmark(options)
    if not _ensembles(benchmark, _choices(benchmark), options):
        raise UserError(_NO_MEMBERS)


def _ensembles(benchmark: Benchmark, found: Mapping[str, Choice], options: argparse.Namespace) -> int:
    """Returns how many were made."""
    made = 0
    for name, record in ensembles(benchmark, found, options.best):
        print(f"{name}: {100 * record.accuracy:.2f} %", flush=True)
        made += 1
    return made


def run_interpolations(options: argparse.Namespace) -> None:
    benchmark = _benchmark(options)
    _interpolations(benchmark, _choices(benchmark), options)


def _interpolations(benchmark: Benchmark, found: Mapping[str, Choice], options: argparse.Namespace) -> None:
    how = How(options.device, cache=options.cache, sources=Kept(len(benchmark.tasks)).sources)
    for line in interpolations(benchmark, found, options.best, how):
        print(line, flush=True)


def _run(stage: str, jobs: Sequence[Job], options: argparse.Namespace) -> bool | None:
    """Runs the unfinished jobs until the time is over. Returns whether all are finished now; None if some failed."""
    print(f"{stage}, planned after {time.monotonic() - options.started:.1f} s: {_counts(jobs)}", flush=True)
    if options.dry_run or not jobs:
        return False
    workers = options.workers or max(1, len(visible_gpus()))
    follower = run_in_time(jobs, workers, deadline=_deadline(options), tasks=len(options.tasks))
    left = sum(job.state is not State.FINISHED for job in jobs) - len(follower.records)
    print(follower.state())
    print(f"{left} runs are left; the same command continues" if left else f"{stage} is complete", flush=True)
    return None if follower.failures else not left


def _deadline(options: argparse.Namespace) -> float:
    """On the monotonic clock, seconds."""
    return options.started + 60 * options.max_minutes


def _settings(stage: str, benchmark: Benchmark) -> dict[str, list[Setting]]:
    """The settings of each method that a stage runs, for the stages that follow from a search."""
    if stage not in ("refine", "tuned"):
        return {}
    found = _choices(benchmark)
    left_out = [name for name in benchmark.methods if name not in found]
    if left_out:
        print(f"without a rate, so left out until `search` is done: {', '.join(left_out)}", flush=True)
    if stage == "tuned":
        return {name: [choice.setting] for name, choice in found.items()}
    return _refinements(found, benchmark)


def _refinements(found: Mapping[str, Choice], benchmark: Benchmark) -> dict[str, list[Setting]]:
    return {
        name: refinements(choice.rate, specs_of(benchmark.configs, name), benchmark.rates)
        for name, choice in found.items()
    }


def print_choices(found: dict[str, Choice]) -> None:
    for name, choice in found.items():
        means = ", ".join(f"{setting}: {mean:.2f}" for setting, mean in choice.means.items())
        print(f"{name:<22} {choice.setting}{' (at the edge)' if choice.at_edge else ''}   {means}")


def _choices(benchmark: Benchmark) -> dict[str, Choice]:
    standard = read_standard(benchmark.configs)
    searched = records_of(jobs_of_stage("search", benchmark))
    found = choices(searched, standard, benchmark.search_tasks, benchmark.rates)
    refined = records_of(jobs_of_stage("refine", benchmark, _refinements(found, benchmark)))
    return choices([*searched, *refined], standard, benchmark.search_tasks, benchmark.rates)


def _counts(jobs: Sequence[Job]) -> str:
    counts = Counter(job.state.value for job in jobs)
    return f"{len(jobs)} runs ({', '.join(f'{number} {state}' for state, number in sorted(counts.items()))})"


def _benchmark(options: argparse.Namespace) -> Benchmark:
    configs = configs_folder()
    methods, reasons = benchmark_methods(configs, options.methods, options.backbone)
    if options.methods is None:
        print(f"{len(methods)} presets; for other backbones, so left out: {', '.join(reasons)}", flush=True)
    for argument in options.overrides:
        if "=" not in argument or argument.startswith("-"):
            raise UserError(f"{argument} is unknown; expected Hydra overrides, or see --help")
    return Benchmark(
        configs=configs,
        methods=methods,
        backbone=options.backbone,
        tasks=options.tasks,
        seeds=options.seeds,
        rates=options.rates,
        search_tasks=options.search_tasks,
        overrides=options.overrides,
    )


# Files


def pack(options: argparse.Namespace) -> None:
    records = _records_of_backbone(options)
    out = options.out or RESULTS / f"{options.backbone}{BUNDLE_SUFFIX}"
    write_bundle(out, records)
    print(f"{len(records)} runs in {out}, {out.stat().st_size:,} bytes")


def unpack(options: argparse.Namespace) -> None:
    """Writes finished runs from a packed file, so that this machine continues from there."""
    records = find_records([options.bundle])
    for record in records:
        folder = run_folder(options.out, record.task, record.methods, record.seed, record.fingerprint)
        if not is_finished(folder):
            write_record(make_run_folder(options.out, record), record)
    print(f"{len(records)} finished runs in {options.out}")


def document(options: argparse.Namespace) -> None:
    from mambapeft_vision.benchmarks.mini_document import write_document  # needs SciPy, which no run does

    write_document(options.out, _records_of_backbone(options), read_standard(configs_folder()))
    print(options.out)


def compare(options: argparse.Namespace) -> None:
    from mambapeft_vision.benchmarks.mini_backbones import write_comparison

    write_comparison(options.out, find_records(options.places), read_standard(configs_folder()))
    print(options.out)


def _records_of_backbone(options: argparse.Namespace) -> list[RunRecord]:
    """The results of mini tasks below the given places with the backbone that is asked for. Raises UserError."""
    name = registered_name(configs_folder(), options.backbone)
    found = [r for r in find_records(options.places) if r.task.startswith("mini/") and r.backbone == name]
    if not found:
        places = ", ".join(map(str, options.places))
        raise UserError(f"no finished run of a mini task with {options.backbone} below {places}; see --help")
    return found


def _names(text: str) -> list[str]:
    return text.split(",")


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return numbers


def _parser() -> ArgumentParser:
    parser = ArgumentParser("mambapeft mini", __doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    backbone = ArgumentParser(add_help=False)
    backbone.add_argument("--backbone", default=VIM_NANO, metavar="NAME", help="a config (default: %(default)s)")
    benchmark = _benchmark_parser(backbone)
    running = _running_parser(benchmark)
    best, device = _best_parser(), _device_parser()
    for stage, what in STAGES.items():
        commands.add_parser(stage, help=what, parents=[running]).set_defaults(run=run_stage)
    memba = "Memba's parts, one changed at a time, on val200 of five tasks"
    commands.add_parser("memba", help=memba, parents=[running]).set_defaults(run=run_memba)
    averaged = commands.add_parser(
        "ensemble", help="ensembles of the tuned runs of the best methods", parents=[benchmark, best]
    )
    averaged.set_defaults(run=run_ensembles)
    between = commands.add_parser(
        "interpolate", help="the tuned runs of the best methods", parents=[benchmark, best, device]
    )
    between.set_defaults(run=run_interpolations)
    every = commands.add_parser(
        "all", help="the four stages, then `ensemble` and `interpolate`", parents=[running, best, device]
    )
    every.set_defaults(run=run_all)
    outputs, results = _places_parser(Path("outputs")), _places_parser(RESULTS)
    packed = commands.add_parser("pack", help="the results of a backbone in one file", parents=[backbone, outputs])
    packed.add_argument("--out", type=Path, help="default: results/mini/BACKBONE.runs.json")
    packed.set_defaults(run=pack)
    unpacked = commands.add_parser("unpack", help="the results in such a file as finished runs, which are not repeated")
    unpacked.add_argument("bundle", type=Path)
    unpacked.add_argument("--out", type=Path, default=Path("outputs"))
    unpacked.set_defaults(run=unpack)
    written = commands.add_parser("document", help="tables and pictures of a backbone", parents=[backbone, results])
    written.add_argument("--out", type=Path, default=Path("results/report/mini-benchmark.md"))
    written.set_defaults(run=document)
    compared = commands.add_parser("compare", help="all backbones in one table", parents=[results])
    compared.add_argument("--out", type=Path, default=Path("results/report/mini-backbones.md"))
    compared.set_defaults(run=compare)
    return parser


def _running_parser(benchmark: ArgumentParser) -> ArgumentParser:
    """The options of commands that train."""
    parser = ArgumentParser(add_help=False, parents=[benchmark])
    parser.add_argument("--workers", type=int, help="processes that run at a time (default: one a GPU)")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="stop in time and keep finished runs")
    parser.add_argument("--dry-run", action="store_true", help="only list what would run")
    return parser


def _best_parser() -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--best", type=int, default=5, metavar="N", help="methods (default: %(default)s)")
    return parser


def _device_parser() -> ArgumentParser:
    """Where interpolated weights are tested, and on which images."""
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--cache", default="data/cache", metavar="DIR", help="folder of decoded images (default: %(default)s)"
    )
    return parser


def _places_parser(default: Path) -> ArgumentParser:
    """One a default: what a command sets as the default of a shared argument would be every command's."""
    parser = ArgumentParser(add_help=False)
    what = f"folders with runs, or files of `pack` (default: {default})"
    parser.add_argument("places", nargs="*", type=Path, default=[default], metavar="PLACE", help=what)
    return parser


def _benchmark_parser(backbone: ArgumentParser) -> ArgumentParser:
    """The options that say which benchmark it is; equal for all commands that plan its runs."""
    parser = ArgumentParser(add_help=False, parents=[backbone])
    parser.add_argument("--methods", type=_names, metavar="A,B", help="presets; default: all that fit")
    parser.add_argument("--tasks", type=_names, metavar="A,B", default=TASKS, help="default: all 13")
    parser.add_argument("--seeds", type=_list_of(int), metavar="0,1", default=(0, 1, 2), help="default: 0,1,2")
    parser.add_argument("--rates", type=_list_of(float), metavar="X,Y", default=RATES, help="learning rates tried")
    parser.add_argument("--search-tasks", type=_names, metavar="A,B", default=SEARCH_TASKS, help="tasks to tune on")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="for every run, e.g. trainer.max_epochs=20")
    return parser
