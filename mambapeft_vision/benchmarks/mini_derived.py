"""Two gains without training in the mini benchmark: ensembles of its runs, and interpolation with pretrained weights.

Both take the methods that are best on val200; what is recorded lies beside the runs and is packed with them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from mambapeft_vision.adapter.files import ADAPTER_FILE
from mambapeft_vision.benchmarks.mini import Benchmark, jobs_of_stage
from mambapeft_vision.benchmarks.mini_settings import Choice
from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.record import DERIVED, RunRecord, is_finished, members_of, read_record
from mambapeft_vision.results.tables import find_records
from mambapeft_vision.run.ensemble import Member, ensemble
from mambapeft_vision.run.interpolate import (
    ALPHAS,
    How,
    NotInterpolableError,
    best_of,
    curve,
    interpolate,
    open_interpolation,
)
from mambapeft_vision.sweep.jobs import Job
from mambapeft_vision.utils.names import user_path

PROBE = "linear_probe"


def best_methods(choices: Mapping[str, Choice], count: int) -> list[str]:
    """Those with the highest accuracy on val200, the best first."""
    return sorted(choices, key=lambda name: -choices[name].mean)[:count]


def ensembles(benchmark: Benchmark, choices: Mapping[str, Choice], count: int) -> Iterator[tuple[str, RunRecord]]:
    """Makes, of the best `count` methods, an ensemble of each one's seeds and of all of them with one seed.

    Yields: the members of each ensemble in words, and its result. Runs without stored probabilities are left out.
    Raises: UserError.
    """
    names = best_methods(choices, count)
    jobs = {name: _finished(jobs_of_stage("tuned", benchmark, {name: [choices[name].setting]})) for name in names}
    by_task: dict[tuple[str, str], list[Member]] = defaultdict(list)
    by_seed: dict[tuple[str, int], list[Member]] = defaultdict(list)
    for name, done in jobs.items():
        for job in done:
            if (job.folder / PREDICTIONS_FILE).is_file():
                member = Member(job.folder, read_record(job.folder))
                by_task[name, job.plan.task].append(member)
                by_seed[job.plan.task, job.plan.seed].append(member)
    for (name, task), members in by_task.items():
        if len(members) == len(benchmark.seeds) > 1:
            yield f"{name} on {task}", ensemble(members, _outputs(jobs[name]), f"{len(members)} seeds")[1]
    for (task, seed), members in by_seed.items():
        if len(members) == len(names) > 1:
            label = f"best {len(names)} methods"
            yield f"{label} on {task}, seed {seed}", ensemble(members, _outputs(jobs[names[0]]), label)[1]


def interpolations(
    benchmark: Benchmark, choices: Mapping[str, Choice], count: int, how: How, alphas: Sequence[float] = ALPHAS
) -> Iterator[str]:
    """Interpolates the best `count` methods that fold into the weights: one α a method, as it has one learning rate.

    α is the best mean on val200 of the search tasks, with the search's own runs at the method's setting; then each
    tuned run is tested at it. Where the linear probe was tuned, its head is the one at α = 0.

    Yields: lines that say what was done. What was recorded before is not tested again.
    Raises: UserError.
    """
    probes = _by_place(_stage("refine", benchmark, choices, PROBE)) if PROBE in choices else {}
    tuned_probes = _by_place(_stage("tuned", benchmark, choices, PROBE)) if PROBE in choices else {}
    left = count
    for name in best_methods({name: choice for name, choice in choices.items() if name != PROBE}, len(choices)):
        if not left:
            return
        searched, tuned = (_stage(stage, benchmark, choices, name) for stage in ("refine", "tuned"))
        if not searched or not tuned:
            yield f"{name}: its runs are not here, only their results"
            continue
        try:
            curves = [
                curve(open_interpolation(job.folder, "val200", how, _same(probes, job)), alphas) for job in searched
            ]
        except NotInterpolableError as error:
            yield f"{name}: left out; {error}"
            continue
        left -= 1
        mean = {alpha: fmean(of[alpha] for of in curves) for alpha in alphas}
        alpha = best_of(mean)
        yield f"{name}: α {alpha:g} of {', '.join(f'{one:g}: {100 * value:.2f}' for one, value in mean.items())}"
        done = _done(_outputs(tuned))
        for job in tuned:
            if (job.plan.fingerprint, alpha) not in done:
                probe = _same(tuned_probes, job)
                interpolate(job.folder, alpha, _outputs(tuned), how, label=f"{alpha:g}", probe=probe, curve=mean)


def _stage(stage: str, benchmark: Benchmark, choices: Mapping[str, Choice], name: str) -> list[Job]:
    """A method's runs at its chosen setting: `refine`, scored on val200, or `tuned`; those whose adapter is here."""
    jobs = _finished(jobs_of_stage(stage, benchmark, {name: [choices[name].setting]}))
    return [job for job in jobs if (job.folder / ADAPTER_FILE).is_file()]


def _finished(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if is_finished(job.folder)]


def _by_place(jobs: Sequence[Job]) -> dict[tuple[str, int], Path]:
    return {(job.plan.task, job.plan.seed): job.folder for job in jobs}


def _same(probes: Mapping[tuple[str, int], Path], job: Job) -> Path | None:
    return probes.get((job.plan.task, job.plan.seed))


def _outputs(jobs: Sequence[Job]) -> Path:
    return user_path(jobs[0].plan.paths.outputs)


def _done(outputs: Path) -> set[tuple[str, float]]:
    done: set[tuple[str, float]] = set()
    for record in find_records([outputs]):
        made = record.config.get(DERIVED, {})
        if made.get("kind") == "interpolation" and isinstance(made.get("alpha"), (int, float)):
            done.update((member, made["alpha"]) for member in members_of(record))
    return done
