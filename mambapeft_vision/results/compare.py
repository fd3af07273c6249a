"""Comparisons of methods: which differences exceed the noise of seeds, and whether means come in an expected order.

Paired comparison, on the same tasks and seeds: for two methods, d[t, s] is the difference of their accuracies on task t
with seed s (both draw the same order of images). The difference is the mean over tasks of the mean over seeds of d. The
tasks are taken as given, so only the seeds add uncertainty: the squared standard error is Σ_t s_t² / n_t / T², where
s_t² is the sample variance of d[t, ·] over the n_t seeds, with Welch and Satterthwaite's degrees of freedom (26 for 13
tasks of equal variance with 3 seeds each), and the interval is Student's t. A bootstrap over three seeds within a task
would be too narrow (its variance is 2/3 of s_t²), and the deviation of three per-seed averages, given beside it, has
only two degrees of freedom.

How a difference would carry over to other tasks is another question; the number of tasks won gives an indication.
"""

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import Row
from mambapeft_vision.utils.errors import UserError

LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """A minus B, in percent points.

    Args:
        mean: the mean difference.
        half: half of the interval at `LEVEL`; None if no task has two common seeds.
        p: two-sided, for no difference.
        seed_std: sample deviation of the seeds' averages; None if seeds are unequal or alone.
        won: number of tasks, among `tasks`, with a positive mean difference (ties count half).
        cells: number of compared pairs.
    """

    mean: float
    half: float | None
    p: float | None
    seed_std: float | None
    won: float
    tasks: int
    cells: int

    @property
    def exceeds_noise(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def paired(a: Row, b: Row, tasks: Sequence[str]) -> Paired | None:
    """Compares two rows on the pairs (task, seed) that both have; None if some task has no common seed.

    Args:
        a, b: the rows; the result is a minus b.
        tasks: names of the tasks that count.
    """
    differences = {
        task: {s: 100 * (a.records[task, s].accuracy - b.records[task, s].accuracy) for s in _common(a, b, task)}
        for task in tasks
    }
    if not all(differences.values()):
        return None
    means = [statistics.fmean(of.values()) for of in differences.values()]
    mean = statistics.fmean(means)
    half, p = _uncertainty(mean, [list(of.values()) for of in differences.values()])
    return Paired(
        mean=mean,
        half=half,
        p=p,
        seed_std=_seed_deviation(list(differences.values())),
        won=sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in means),
        tasks=len(means),
        cells=sum(map(len, differences.values())),
    )


def holm(p_values: Sequence[float | None], level: float = LEVEL) -> list[bool]:
    """Which of several comparisons hold together at confidence `level` (Holm's step-down procedure).

    Args:
        p_values: one for each comparison; None (unknown) never holds.
        level: probability that all that hold are true, such as 0.95.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    holds = [False] * len(p_values)
    for rank, (p, place) in enumerate(known):
        if p > (1 - level) / (len(known) - rank):
            break
        holds[place] = True
    return holds


def _common(a: Row, b: Row, task: str) -> list[int]:
    return sorted(set(a.seeds(task)) & set(b.seeds(task)))


def _uncertainty(mean: float, by_task: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Half of the interval, and p. Tasks with one seed take the mean variance of the others."""
    from scipy.stats import t as student  # slow to import, and not needed for an order of means

    several = [values for values in by_task if len(values) > 1]
    if not several:
        return None, None
    pooled = statistics.fmean(map(statistics.variance, several))
    shares = [(statistics.variance(v) if len(v) > 1 else pooled) / len(v) for v in by_task]
    error = math.sqrt(sum(shares)) / len(by_task)
    if error == 0:
        return 0.0, 1.0 if mean == 0 else 0.0
    known = [(statistics.variance(v) / len(v), len(v) - 1) for v in several]
    freedom = sum(share for share, _ in known) ** 2 / sum(share**2 / n for share, n in known)
    half = float(student.ppf((1 + LEVEL) / 2, freedom)) * error
    return half, float(2 * student.sf(abs(mean) / error, freedom))


def _seed_deviation(by_task: Sequence[dict[int, float]]) -> float | None:
    seeds = set(by_task[0])
    if len(seeds) < 2 or any(set(of) != seeds for of in by_task):
        return None
    return statistics.stdev(statistics.fmean(of[seed] for of in by_task) for seed in sorted(seeds))


# The order of means


@dataclass(frozen=True)
class Ordering:
    """means: percent by method, worst expected first; broken: neighbours that are not in this order."""

    means: dict[str, float]
    broken: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        found = ", ".join(f"{name} {mean:.2f} %" for name, mean in self.means.items())
        expected = " < ".join(self.means)
        if not self.broken:
            return f"The order {expected} holds: {found}."
        lost = "; ".join(f"{low} is not below {high}" for low, high in self.broken)
        return f"The order {expected} is LOST: {lost} ({found})."


def ordering(records: Iterable[RunRecord], expected: Sequence[str]) -> Ordering:
    """The mean of each method, and where they are not strictly in the expected order.

    Natural, specialized and structured tasks count alike, however many there are of each: the mean is over groups, of
    which each is a mean over tasks and seeds.

    Args:
        records: records of other methods too; those are left out.
        expected: methods, worst first.
    Raises: UserError where methods were not all run on the same tasks and seeds, once each.
    """
    runs: dict[str, Counter[tuple[str, int]]] = {name: Counter() for name in expected}
    accuracies: dict[str, defaultdict[str, list[float]]] = {name: defaultdict(list) for name in expected}
    for record in records:
        name = "+".join(record.methods)
        if name in runs:
            runs[name][record.task, record.seed] += 1
            accuracies[name][record.group].append(100 * record.accuracy)
    every = Counter(set().union(*runs.values()))
    unequal = [f"{name} has {sum(found.values())} runs" for name, found in runs.items() if found != every]
    if unequal or not every:
        raise UserError(
            f"{'; '.join(unequal) or 'there are no runs'}: expected one of each method ({', '.join(expected)}) on each "
            f"of {len(every)} pairs of task and seed. Run the whole comparison again"
        )
    means = {name: statistics.fmean(map(statistics.fmean, groups.values())) for name, groups in accuracies.items()}
    neighbours = itertools.pairwise(expected)
    return Ordering(means, tuple((low, high) for low, high in neighbours if not means[low] < means[high]))
