"""The mini benchmark: every preset that fits vim_nano on the 13 tasks of dataset=mini/*, and its tables.

    python scripts/prepare_mini.py all --from DIR         once: the tasks
    python scripts/mini_benchmark.py recipe               every run at the paper's learning rate, three seeds
    python scripts/mini_benchmark.py search               one learning rate a method, chosen on val200 of five tasks
    python scripts/mini_benchmark.py tuned                the runs at the chosen rates that recipe has not done
    python scripts/mini_benchmark.py pack                 all results in one file, results/mini/mini.runs.json
    python scripts/mini_benchmark.py unpack               such a file as finished runs, to go on on another machine
    python scripts/mini_benchmark.py document             its tables and pictures, into --out

Each command continues where it stopped. Hydra overrides (trainer.max_epochs=20, paths.outputs=DIR, ...) go to every
run and must be the same in every command.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mambapeft_vision.benchmarks.mini import (
    RATES,
    SEARCH_TASKS,
    STAGES,
    TASKS,
    Benchmark,
    Choice,
    benchmark_methods,
    choices,
    jobs_of_stage,
)
from mambapeft_vision.results.bundle import write_bundle
from mambapeft_vision.results.record import is_finished, write_record
from mambapeft_vision.results.tables import find_records, read_standard
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.run.run_config import run_folder
from mambapeft_vision.sweep.deadline import run_in_time
from mambapeft_vision.sweep.jobs import Job, State
from mambapeft_vision.sweep.pool import visible_gpus
from mambapeft_vision.sweep.sweep import records_of
from mambapeft_vision.utils.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(arguments: Sequence[str] | None = None, started: float | None = None) -> None:
    """The command. started: when it began on the monotonic clock, so that --max-minutes counts the imports too."""
    options = _parser().parse_args(arguments)
    options.started = time.monotonic() if started is None else started
    options.run(options)


# Runs


def run_stage(options: argparse.Namespace) -> None:
    benchmark = _benchmark(options)
    choice = None
    if options.command == "tuned":
        choice = {name: found.rate for name, found in _choices(benchmark).items()}
        left_out = [name for name in benchmark.methods if name not in choice]
        if left_out:
            print(f"without a rate, so left out until `search` is done: {', '.join(left_out)}", flush=True)
    jobs = jobs_of_stage(options.command, benchmark, choice)
    print(f"planned in {time.monotonic() - options.started:.1f} s: {_counts(jobs)}", flush=True)
    if options.dry_run or not jobs:
        return
    deadline = options.started + 60 * options.max_minutes
    workers = options.workers or max(1, len(visible_gpus()))
    follower = run_in_time(jobs, workers, deadline=deadline, tasks=len(benchmark.tasks))
    left = sum(job.state is not State.FINISHED for job in jobs) - len(follower.records)
    print(follower.state())
    print(f"{left} runs are left; the same command continues" if left else f"{options.command} is complete", flush=True)
    if options.command == "search" and not left:
        print_choices(_choices(benchmark))
    if follower.failures:
        sys.exit(CRASH)


def print_choices(found: dict[str, Choice]) -> None:
    for name, choice in found.items():
        means = ", ".join(f"{rate:g}: {mean:.2f}" for rate, mean in choice.means.items())
        print(f"{name:<22} lr {choice.rate:g}{' (at the edge)' if choice.at_edge else ''}   {means}")


def _choices(benchmark: Benchmark) -> dict[str, Choice]:
    records = records_of(jobs_of_stage("search", benchmark))
    return choices(records, read_standard(CONFIGS), benchmark.search_tasks, len(benchmark.rates))


def _counts(jobs: Sequence[Job]) -> str:
    counts = Counter(job.state.value for job in jobs)
    return f"{len(jobs)} runs ({', '.join(f'{number} {state}' for state, number in sorted(counts.items()))})"


def _benchmark(options: argparse.Namespace) -> Benchmark:
    methods, reasons = benchmark_methods(CONFIGS, options.methods)
    if options.methods is None:
        print(f"{len(methods)} presets; for other backbones, so left out: {', '.join(reasons)}", flush=True)
    for argument in options.overrides:
        if "=" not in argument or argument.startswith("-"):
            raise UserError(f"{argument} is unknown; expected Hydra overrides, or see --help")
    return Benchmark(
        CONFIGS, methods, options.tasks, options.seeds, options.rates, options.search_tasks, options.overrides
    )


# Files


def pack(options: argparse.Namespace) -> None:
    records = [record for record in find_records(options.places) if record.task.startswith("mini/")]
    if not records:
        raise UserError(f"no finished run of a mini task below {', '.join(map(str, options.places))}")
    write_bundle(options.out, records)
    print(f"{len(records)} runs in {options.out}, {options.out.stat().st_size:,} bytes")


def unpack(options: argparse.Namespace) -> None:
    """Finished runs as a machine left them, so that another goes on from there."""
    records = find_records([options.bundle])
    for record in records:
        folder = run_folder(options.out, record.task, record.methods, record.seed, record.fingerprint)
        if not is_finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_record(folder, record)
    print(f"{len(records)} finished runs in {options.out}")


def document(options: argparse.Namespace) -> None:
    from mambapeft_vision.benchmarks.mini_document import write_document  # needs SciPy, which no run does

    write_document(options.out, find_records(options.places), read_standard(CONFIGS))
    print(options.out)


def _names(text: str) -> list[str]:
    return text.split(",")


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for stage in STAGES:
        command = commands.add_parser(stage, help="runs of this stage that are not finished")
        command.add_argument("--methods", type=_names, metavar="A,B", help="presets; default: all that fit vim_nano")
        command.add_argument("--tasks", type=_names, metavar="A,B", default=TASKS, help="default: all 13")
        command.add_argument("--seeds", type=_list_of(int), metavar="0,1", default=(0, 1, 2), help="default: 0,1,2")
        command.add_argument("--rates", type=_list_of(float), metavar="X,Y", default=RATES, help="of the search")
        command.add_argument("--search-tasks", type=_names, metavar="A,B", default=SEARCH_TASKS, help="of the search")
        command.add_argument("--workers", type=int, help="processes that run at a time (default: one a GPU)")
        command.add_argument("--max-minutes", type=float, default=float("inf"), help="ends in time, keeps what is done")
        command.add_argument("--dry-run", action="store_true", help="only say what would run")
        command.add_argument(
            "overrides", nargs="*", metavar="OVERRIDE", help="of every run, e.g. trainer.max_epochs=20"
        )
        command.set_defaults(run=run_stage)
    packed = commands.add_parser("pack", help="the results of all runs in one file")
    packed.add_argument(
        "places", nargs="*", type=Path, default=[Path("outputs")], help="folders with runs, or such files"
    )
    packed.add_argument("--out", type=Path, default=Path("results/mini/mini.runs.json"))
    packed.set_defaults(run=pack)
    unpacked = commands.add_parser("unpack", help="the results in such a file as finished runs, which are not repeated")
    unpacked.add_argument("bundle", nargs="?", type=Path, default=Path("results/mini/mini.runs.json"))
    unpacked.add_argument("--out", type=Path, default=Path("outputs"))
    unpacked.set_defaults(run=unpack)
    written = commands.add_parser("document", help="tables and pictures of the runs")
    written.add_argument("places", nargs="*", type=Path, default=[Path("results/mini")])
    written.add_argument("--out", type=Path, default=Path("results/report/mini-benchmark.md"))
    written.set_defaults(run=document)
    return parser
