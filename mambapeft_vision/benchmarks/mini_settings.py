"""The settings that the mini benchmark tunes, with the same number of trials for every method, and its choice.

A method gets `BUDGET` trials, each the mean accuracy on val200 of five tasks after training on train800, one seed:

* the stage `search`: the `RATES`, as everything else is in the preset;
* the stage `refine`, around the best of these rates: the weight decays `DECAYS`, and the factors `SCALES` on the scale
  where the preset has one; a method without a scale gets two more rates instead, one on either side of the best.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mambapeft_vision.results.record import RunRecord, is_derived
from mambapeft_vision.results.tables import Standard

#: Like the paper's protocol, which tunes a method once, on five tasks, and not on every task.
SEARCH_TASKS = ("mini/usps", "mini/satellite_climate", "mini/scene_distance", "mini/norb_azimuth", "mini/dsprites_loc")
RECIPE_RATE = 1e-3
RATES = (3e-4, RECIPE_RATE, 3e-3, 1e-2, 3e-2)
#: The recipe's 1e-4 takes less than 0.1 % off a weight in 640 steps: only far larger ones can matter.
DECAYS = (1e-2, 1e-1)
SCALES = (0.1, 10.0)
BEYOND = 10 / 3  # how far a rate outside of the grid is from its last one
REFINEMENTS = len(DECAYS) + len(SCALES)
BUDGET = len(RATES) + REFINEMENTS


@dataclass(frozen=True, order=True)
class Setting:
    """One trial of a method.

    Args:
        rate: the learning rate.
        decay: the weight decay; None: the preset's.
        scale: factor on every scale of the preset.
    """

    rate: float = RECIPE_RATE
    decay: float | None = None
    scale: float = 1.0

    def changes(self, methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The setting as overrides of a run with these methods. The preset's own values are left out."""
        found = [f"trainer.learning_rate={self.rate}"]
        if self.decay is not None:
            found.append(f"trainer.weight_decay={self.decay}")
        if self.scale != 1:
            found += [f"method.{name}.scale={_times(spec['scale'], self.scale)}" for name, spec in _scaled(methods)]
        return found

    def __str__(self) -> str:
        parts = [f"lr {self.rate:g}"]
        parts += [] if self.decay is None else [f"decay {self.decay:g}"]
        parts += [] if self.scale == 1 else [f"scale × {self.scale:g}"]
        return ", ".join(parts)


def _scaled(methods: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, spec) for name, spec in methods.items() if isinstance(spec.get("scale"), (int, float))]


def _times(scale: float, factor: float) -> float:
    return float(f"{scale * factor:.6g}")  # 0.1 times 0.1 is 0.01


def refinements(rate: float, methods: Mapping[str, Mapping[str, Any]], rates: Sequence[float] = RATES) -> list[Setting]:
    """The trials of the stage `refine`, `REFINEMENTS` for every method.

    Args:
        rate: the best of `rates`.
        methods: the preset's specs.
    """
    decays = [Setting(rate, decay=decay) for decay in DECAYS]
    if _scaled(methods):
        return [*decays, *(Setting(rate, scale=factor) for factor in SCALES)]
    below = max((other for other in rates if other < rate), default=None)
    above = min((other for other in rates if other > rate), default=None)
    low = rate / BEYOND if below is None else math.sqrt(rate * below)
    high = rate * BEYOND if above is None else math.sqrt(rate * above)
    return [*decays, Setting(float(f"{low:.2g}")), Setting(float(f"{high:.2g}"))]


@dataclass(frozen=True)
class Choice:
    """Mean accuracy in percent on val200 by setting, of the settings with all search tasks done.

    rates: learning rates of the stage `search`.
    """

    means: Mapping[Setting, float]
    rates: Sequence[float]

    @property
    def setting(self) -> Setting:
        """The best one; of equally good ones the smallest rate, then the one nearest to the preset."""
        return max(self.means, key=lambda one: (self.means[one], -one.rate, one.decay is None, one.scale == 1))

    @property
    def mean(self) -> float:
        """That of the best setting."""
        return max(self.means.values())

    @property
    def rate(self) -> float:
        """The best of the rates with everything else as it is in the preset."""
        plain = {rate: self.means[Setting(rate)] for rate in self.rates}
        return max(plain, key=lambda rate: (plain[rate], -rate))

    @property
    def refined(self) -> bool:
        return len(self.means) > len(self.rates)

    @property
    def at_edge(self) -> bool:
        """Whether a rate outside the grid might be better still."""
        tried = [setting.rate for setting in self.means]
        return self.setting.rate in (min(tried), max(tried))


def setting_of(record: RunRecord, standard: Standard) -> tuple[str, Setting] | None:
    """A run's preset and setting; None for a run with other changes of its methods, which is no trial of the preset.

    None too for what was made from finished runs.
    """
    if is_derived(record):
        return None
    preset, differences = standard.describe(record.config)
    if preset not in standard.presets:
        return None
    scales = {f"{name}.scale": spec["scale"] for name, spec in _scaled(standard.presets[preset].methods_on(None))}
    others = [key for key in differences if "." in key and key not in scales and not key.endswith(".warmup_steps")]
    given = [(differences.get(key, scale), scale) for key, scale in scales.items()]
    if others or not all(isinstance(value, (int, float)) for value, _ in given):
        return None
    factors = {float(f"{value / scale:.6g}") for value, scale in given} or {1.0}
    if len(factors) > 1:
        return None
    return preset, Setting(record.config["trainer"]["learning_rate"], differences.get("weight_decay"), factors.pop())


def choices(
    records: Sequence[RunRecord],
    standard: Standard,
    tasks: Sequence[str] = SEARCH_TASKS,
    rates: Sequence[float] = RATES,
) -> dict[str, Choice]:
    """The trials of every preset whose search is done: each of `rates` on each of `tasks`.

    Trials of the stage `refine` count where all of them are done, so that every method is chosen from equally many.

    Args:
        records: records of runs; those not scored on val200 do not count.
    """
    found: dict[str, dict[Setting, dict[str, float]]] = {}
    for record in records:
        if record.config["dataset"]["test_split"] != "val200" or record.task not in tasks:
            continue
        trial = setting_of(record, standard)
        if trial is not None:
            found.setdefault(trial[0], {}).setdefault(trial[1], {})[record.task] = 100 * record.accuracy
    chosen = {}
    for preset, of in found.items():
        means = {one: statistics.fmean(scores.values()) for one, scores in of.items() if len(scores) == len(tasks)}
        if not all(Setting(rate) in means for rate in rates):
            continue
        choice = Choice({Setting(rate): means[Setting(rate)] for rate in rates}, rates)
        more = refinements(choice.rate, standard.presets[preset].methods_on(None), rates)
        if all(setting in means for setting in more):
            choice = Choice({**choice.means, **{setting: means[setting] for setting in more}}, rates)
        chosen[preset] = choice
    return chosen
