"""Whether the mean accuracies of methods come in an expected order."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.utils.errors import UserError


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
    """The mean over tasks and seeds of each method, and where they are not strictly in the expected order.

    Args:
        records: of other methods too; those are left out.
        expected: methods, worst first.
    Raises: UserError where methods were not all run on the same tasks and seeds, once each.
    """
    runs: dict[str, Counter[tuple[str, int]]] = {name: Counter() for name in expected}
    accuracies: dict[str, list[float]] = {name: [] for name in expected}
    for record in records:
        name = "+".join(record.methods)
        if name in runs:
            runs[name][record.task, record.seed] += 1
            accuracies[name].append(100 * record.accuracy)
    every = Counter(set().union(*runs.values()))
    unequal = [f"{name} has {sum(found.values())} runs" for name, found in runs.items() if found != every]
    if unequal or not every:
        raise UserError(
            f"{'; '.join(unequal) or 'there are no runs'}: expected one of each method ({', '.join(expected)}) on each "
            f"of {len(every)} pairs of task and seed. Run the whole comparison again"
        )
    means = {name: statistics.fmean(values) for name, values in accuracies.items()}
    neighbours = itertools.pairwise(expected)
    return Ordering(means, tuple((low, high) for low, high in neighbours if not means[low] < means[high]))
