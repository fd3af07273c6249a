"""A sweep: many runs from one command, each done once, whatever happens in between."""

import argparse
import dataclasses
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.results.layout import FAILURE_FILE, SWEEP_LOGS
from mambapeft_vision.results.record import RunRecord, is_finished, read_record
from mambapeft_vision.results.tables import find_records
from mambapeft_vision.run.arguments import ArgumentParser, positive
from mambapeft_vision.run.exit import CRASH
from mambapeft_vision.run.finish import remove_leftovers
from mambapeft_vision.sweep.display import Display
from mambapeft_vision.sweep.estimates import Rate, Speeds, read_rates
from mambapeft_vision.sweep.jobs import Job, State, plan_jobs
from mambapeft_vision.sweep.pool import Pool, visible_gpus
from mambapeft_vision.sweep.worker_cache import task_key
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError, disk_errors_of
from mambapeft_vision.utils.paths import configs_folder
from mambapeft_vision.utils.processes import available_cpus
from mambapeft_vision.utils.progress import format_duration
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import refuse_links

LOGS = SWEEP_LOGS


@dataclass(frozen=True)
class Command:
    """A sweep's command line. workers: None for one a GPU, or one on a CPU; rates: measured ones, for estimates."""

    overrides: list[str]
    workers: int | None = None
    dry_run: bool = False
    rates: Sequence[Rate] = ()


def sweep_parser(prog: str = "mambapeft sweep", description: str | None = None) -> ArgumentParser:
    """The options that every sweep takes, for `command_of`."""
    parser = ArgumentParser(prog, description, usage="%(prog)s [options] [key=value ...]")
    parser.add_argument("--seeds", metavar="0,1,2", help="short for seed=0,1,2")
    parser.add_argument("--workers", type=positive, metavar="N", help="runs at a time (default: one a GPU)")
    parser.add_argument("--rates", metavar="FILE", help="measured images/s, as docs/rates.csv, to estimate times from")
    parser.add_argument("--dry-run", action="store_true", help="only list what would run")
    return parser


def command_of(options: argparse.Namespace, overrides: Sequence[str], configs: Path) -> Command:
    """A sweep's command from parsed options. Raises UserError for rates that cannot be read.

    Args:
        configs: folder with the presets that a file of rates names.
    """
    seeds = [] if options.seeds is None else [f"seed={options.seeds}"]
    rates = [] if options.rates is None else read_rates(options.rates, read_presets(configs / "method"))
    return Command([*overrides, *seeds], options.workers, options.dry_run, rates)


def parse(arguments: Sequence[str], configs: Path | None = None) -> Command:
    """`command_of` a command line. Raises UserError."""
    options, overrides = sweep_parser().parse_with_overrides(arguments)
    return command_of(options, overrides, configs_folder() if configs is None else configs)


def with_defaults(defaults: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """A command line that begins with those defaults whose key it does not give itself; seeds= is seed=."""
    given = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    if "seeds" in given:
        given.add("seed")
    return [*(default for default in defaults if default.partition("=")[0] not in given), *arguments]


def on_every_core(command: Command, jobs: Sequence[Job]) -> Command:
    """With a worker for each CPU core, unless the command says how many or there are GPUs; for small backbones."""
    if command.workers is not None or gpus_of(jobs):
        return command
    return dataclasses.replace(command, workers=min(available_cpus(), len(jobs)))


def fixed_sweep(parser: ArgumentParser, runs: Sequence[str], arguments: Sequence[str], configs: Path) -> list[Job]:
    """The runs of a command that is one sweep on a CPU, all of them finished by the time this returns.

    Ends the process after --help and --dry-run, and with exit code 1 where runs failed.

    Args:
        parser: made by `sweep_parser`.
        runs: the sweep's overrides, which `arguments` can replace one by one.
        configs: folder with train.yaml.
    """
    options, overrides = parser.parse_with_overrides(with_defaults(runs, arguments))
    command = command_of(options, overrides, configs)
    jobs = plan_jobs(command.overrides, configs)
    failed = sweep(jobs, on_every_core(command, jobs))
    if command.dry_run or failed:
        sys.exit(CRASH if failed else 0)
    return jobs


def sweep(jobs: Sequence[Job], command: Command) -> int:
    """Runs those of the jobs (`plan_jobs` of the command's overrides) that are not finished yet, or lists them.

    Returns: the number of failed runs.
    Raises: KeyboardInterrupt after ending the workers.
    """
    todo = [job for job in jobs if job.state is not State.FINISHED]
    finished = [job for job in jobs if job.state is State.FINISHED]
    outputs = Path(jobs[0].plan.config["paths"]["outputs"]).expanduser()
    speeds = Speeds(known_runs(outputs), command.rates)
    gpus = gpus_of(jobs)
    workers = command.workers or max(1, len(gpus))
    if command.dry_run:
        print(describe(jobs, speeds, workers))
        return 0
    for job in finished:
        if is_finished(job.folder):  # still
            remove_leftovers(job.folder)
    say(f"{len(jobs)} runs, {len(finished)} of them finished before; {workers} at a time")
    if not todo:
        return 0
    refuse_links(outputs / LOGS, outputs)
    with disk_errors_of(str(outputs), "paths.outputs=DIR", "Nothing was begun"):
        (outputs / LOGS).mkdir(parents=True, exist_ok=True)
    if workers > 1:
        todo = longest_first(todo, speeds)
    display = _run(todo, len(finished), speeds, workers, Pool(workers, gpus, outputs / LOGS))
    say(_closing(display, outputs))
    return len(display.failures)


def longest_first(jobs: Sequence[Job], speeds: Speeds) -> list[Job]:
    """The jobs in an order in which no worker begins the longest task when the others have nothing more to do.

    Tasks come by the time of all their runs. Where that of one run is unknown, by their test images, because all train
    on equally many. Within a task the order stays.
    """
    seconds = [speeds.seconds(job.plan) for job in jobs]
    known = all(estimate is not None for estimate in seconds)
    totals: dict[str, float] = defaultdict(float)
    for job, estimate in zip(jobs, seconds, strict=True):
        size = estimate if known else job.plan.config["dataset"].get("num_test")
        totals[task_key(job.plan)] += size or 0
    return sorted(jobs, key=lambda job: -totals[task_key(job.plan)])


def known_runs(outputs: Path) -> list[RunRecord]:
    """The results that estimates are made from. A file that cannot be read is left out."""

    def leave_out(error: UserError) -> None:
        say(f"warning: left out of the estimates of time: {plain(error)}")

    return find_records([outputs], unreadable=leave_out) if outputs.exists() else []


def describe(jobs: Sequence[Job], speeds: Speeds, workers: int) -> str:
    """Lists the runs, their states and the estimated time, in text."""
    todo = [job for job in jobs if job.state is not State.FINISHED]
    lines = [f"{job.state.value:<9} {_duration(speeds.seconds(job.plan)):>9}  {job.label}" for job in todo]
    lines += [f"{'finished':<9} {'':>9}  {job.label}" for job in jobs if job.state is State.FINISHED]
    counts = Counter(job.state.value for job in jobs)
    total = speeds.total(job.plan for job in todo)
    return "\n".join(
        [
            *lines,
            "",
            f"{len(jobs)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()),
            "time unknown: some of these runs have neither a recorded run nor a rate (rates=FILE) to estimate it from"
            if total is None
            else f"about {format_duration(total / workers)} with {workers} at a time, by recorded runs and rates",
        ]
    )


def records_of(jobs: Sequence[Job]) -> list[RunRecord]:
    """The results of the jobs that are finished by now."""
    return [read_record(job.folder) for job in jobs if is_finished(job.folder)]


def _run(todo: Sequence[Job], finished: int, speeds: Speeds, workers: int, pool: Pool) -> Display:
    with ended_by_sigterm(), Display(todo, finished, speeds, workers) as display:
        pool.run(todo, display)
    return display


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within this context SIGTERM interrupts as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def gpus_of(jobs: Sequence[Job]) -> list[str]:
    """GPUs to deal out to workers: none where the runs name their device themselves."""
    devices = {job.plan.recipe.device for job in jobs}
    return visible_gpus() if devices <= {"auto", "cuda"} else []


def _closing(display: Display, outputs: Path) -> str:
    files = {job.folder: job.folder / FAILURE_FILE for job, _ in display.failures}
    lines = [
        f"  {job.label}: {error}" + (f"\n    {files[job.folder]}" if files[job.folder].is_file() else "")
        for job, error in display.failures
    ]
    if lines:
        lines = [f"{len(lines)} of the runs failed; the same command tries them again:", *lines]
    return "\n".join([display.state(), *lines, f"tables: mambapeft tables {outputs}"])


def _duration(seconds: float | None) -> str:
    return "?" if seconds is None else format_duration(seconds)
