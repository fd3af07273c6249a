"""Why Memba is where it is in the mini benchmark: its parts, one changed at a time, each at every rate of the search.

Memba (arXiv 2506.18184) is a membrane on the gate beside LoRA on in_proj and out_proj. A variant that comes near to the
LoRA alone says what the membrane costs; the identity (no leak, no threshold) has to equal it, up to roundings.
"""

import json
from collections.abc import Mapping, Sequence
from statistics import fmean

from mambapeft_vision.benchmarks.mini import SEARCH_SPLITS, Benchmark, Wanted, plan_runs
from mambapeft_vision.benchmarks.mini_settings import Setting
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.results.tables import MISSING, Standard, Table
from mambapeft_vision.sweep.jobs import Job

#: The changed arguments of each; None: no membrane. As published: τ = 0.5, V_th = 1, four chunks, reset after the
#: input, u_1 from the block before.
VARIANTS: Mapping[str, Mapping[str, float | None] | None] = {
    "as published": {},
    "leak 0": {"tau": 0.0},
    "leak 0.25": {"tau": 0.25},
    "leak 0.75": {"tau": 0.75},
    "leak 1": {"tau": 1.0},
    "threshold 0.5": {"threshold": 0.5},
    "threshold 2": {"threshold": 2.0},
    "threshold 4": {"threshold": 4.0},
    "no threshold": {"threshold": None},
    "1 chunk": {"chunks": 1},
    "2 chunks": {"chunks": 2},
    "8 chunks": {"chunks": 8},
    "16 chunks": {"chunks": 16},
    "reset before the input": {"reset_first": True},
    "nothing from the block before": {"transfer": False},
    "identity: leak 0, no threshold": {"tau": 0.0, "threshold": None},
    "LoRA of in_proj and out_proj alone": None,
}
_KEYS = ("tau", "threshold", "chunks", "reset_first", "transfer")


def memba_jobs(benchmark: Benchmark) -> list[Job]:
    """Every variant at every rate, on the search tasks with the first seed. Raises UserError."""
    wanted = [
        Wanted("memba", Setting(rate), benchmark.search_tasks, _overrides(changed))
        for changed in VARIANTS.values()
        for rate in benchmark.rates
    ]
    return plan_runs(benchmark, wanted, benchmark.seeds[:1], SEARCH_SPLITS)


def _overrides(changed: Mapping[str, float | None] | None) -> tuple[str, ...]:
    if changed is None:
        return ("~method.memba",)
    return tuple(f"++method.memba.{key}={json.dumps(value)}" for key, value in changed.items())


def memba_table(records: Sequence[RunRecord], standard: Standard, tasks: Sequence[str]) -> Table:
    """Each variant's mean accuracy on val200 by rate, and its best; missing runs are left out."""
    found: dict[str, dict[float, dict[str, float]]] = {}
    for record in records:
        if record.task not in tasks or record.config["dataset"]["test_split"] != "val200":
            continue
        variant = _variant(record, standard)
        if variant is not None:
            by_rate = found.setdefault(variant, {})
            by_rate.setdefault(record.config["trainer"]["learning_rate"], {})[record.task] = 100 * record.accuracy
    means = {
        variant: {rate: fmean(scores.values()) for rate, scores in by_rate.items() if len(scores) == len(tasks)}
        for variant, by_rate in found.items()
    }
    rates = sorted({rate for of in means.values() for rate in of})
    rows = [
        [
            variant,
            f"{max(means[variant].values()):.2f}",
            *(f"{means[variant][rate]:.2f}" if rate in means[variant] else MISSING for rate in rates),
        ]
        for variant in VARIANTS
        if means.get(variant)
    ]
    notes = ["Mean accuracy in percent on val200 of five tasks after training on train800, one seed, by learning rate."]
    return Table("Memba, one part changed at a time", ["Variant", "best", *(f"{r:g}" for r in rates)], rows, notes)


def _variant(record: RunRecord, standard: Standard) -> str | None:
    """Which variant a run is; None for another one, and for the trials of decay and scale."""
    preset, methods = standard.presets["memba"], record.config["method"]
    specs = preset.methods_on(None)
    alone = set(methods) == set(specs) - {"memba"}
    if not alone and set(methods) != set(specs):
        return None
    trainer = {**standard.trainer, **preset.overrides.get("trainer", {})}
    if record.config["trainer"].get("weight_decay") != trainer["weight_decay"]:
        return None
    if any(spec.get("scale") != specs[name].get("scale") for name, spec in methods.items()):
        return None
    if alone:
        return next(name for name, changed in VARIANTS.items() if changed is None)
    published, given = ({key: of["memba"].get(key, False) for key in _KEYS} for of in (specs, methods))
    membranes = {name: changed for name, changed in VARIANTS.items() if changed is not None}
    return next((name for name, changed in membranes.items() if {**published, **changed} == given), None)
