"""Plots of a search."""

import itertools

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import TrialState

from mambapeft_vision.results.plots import COLOURS, figure_text

FEWEST_TRIALS = 5  # from which importances are estimated
MOST_SETTINGS = 20


def history(study: optuna.Study, label: str) -> Figure:
    """Value of every trial and the best until then; failed trials as crosses at the bottom."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    numbers, values = [t.number for t in complete], [t.value or 0.0 for t in complete]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(numbers, values, "o", color=COLOURS[0], markersize=5, label="trial")
    best = list(itertools.accumulate(values, lambda a, b: max(a, b)))
    axes.step(numbers, best, where="post", color=COLOURS[1], label="best so far")
    if failed:
        bottom = [min(values)] * len(failed)
        axes.plot([t.number for t in failed], bottom, "x", color=COLOURS[6], label="failed")
    axes.set_xlabel("trial")
    axes.set_ylabel("mean accuracy (%)")
    axes.set_title(figure_text(label))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    return figure


def importances(study: optuna.Study, label: str) -> Figure | None:
    """How much of the values' variance each setting explains (fANOVA); None for too few trials to tell."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST_TRIALS or len({trial.value for trial in complete}) == 1:
        return None
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = list(optuna.importance.get_param_importances(study, evaluator=evaluator).items())[:MOST_SETTINGS]
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(found)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([figure_text(name) for name, _ in found], [share for _, share in found], color=COLOURS[0])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("importance")
    axes.set_title(figure_text(label))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    return figure
