"""The one list of config keys that do not decide a result, for fingerprints, tables and reruns.

A run is found again by its fingerprint, a hash of all keys that decide the result. A change of these lists must never
change the fingerprint of an existing run: tests/run/test_identity.py pins it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mambapeft_vision.utils.hashing import sha256_json

# Dotted key of a section or a value → why it cannot change a result.
UNDECIDING: Mapping[str, str] = {
    "paths": "where files lie; the content of images and weights is compared by hashes",
    "logger": "where a run is reported to",
    "resume": "an interrupted run ends with the bits of an uninterrupted one",
    "dry_run": "a dry run has no result",
    "sweep": "the name under which loggers group runs",
    "trainer.checkpoint_every_s": "how often the state is saved",
    "trainer.picture": "what is drawn after the test",
    "trainer.cuda_graph": "a captured step computes what a launched one does",
    "trainer.on_nonfinite": "what a sweep does after a run without a result",
    "backbone.weights_license": "whether weights may be fetched changes none of them",
    "dataset.num_workers": "how many processes decode",
    "dataset.test_batch_size": "how many images are tested at a time",
}

# Keys that decide the last bits but not the experiment: runs that differ in them share a row of a table.
SAME_EXPERIMENT: Mapping[str, str] = {
    **UNDECIDING,
    "trainer.device": "another device computes the same with other roundings",
}

# Keys of a pretraining run's config that decide none of its weights; a source counts by its content, not by its path.
UNDECIDING_IN_PRETRAINING: Mapping[str, str] = {
    "out": "where the weights are written",
    "device": "the kind of device that was found is compared instead",
    "workers": "how many processes decode",
    "evaluations": "how often the weights are validated",
    "checkpoint_every_s": "how often the state is saved",
}

# A class that moved: its old name → its name today. Fingerprints hold the old one.
MOVED_TARGETS: Mapping[str, str] = {
    "mambapeft_vision.data.mini.MiniDataModule": "mambapeft_vision.data.generated.mini.MiniDataModule",
    "mambapeft_vision.training.loggers.NoLogger": "mambapeft_vision.integrations.wandb_logger.NoLogger",
    "mambapeft_vision.training.loggers.WandbLogger": "mambapeft_vision.integrations.wandb_logger.WandbLogger",
}
_FIRST_TARGETS = {now: then for then, now in MOVED_TARGETS.items()}

# Keys that came after the first runs; fingerprints hold them only where they are not at these values.
LATER_KEYS: Mapping[str, Any] = {
    "method_sizes": "given",
    "dataset.path": None,
    "dataset.root": None,
    "dataset.columns": None,
    "dataset.test_share": 0.2,
    "dataset.val_share": 0.2,
    "dataset.split_seed": 0,
    "dataset.shots": None,
    "dataset.multi_label": False,
    "dataset.augment": None,
}

_PATHS = ("dataset.folder", "dataset.path", "dataset.root", "backbone.weights")
NAMED_WEIGHTS = ("official", "random")
_DATA = "data"  # stands for paths.data, so that moved data are the same data


def undeciding(section: str, keys: Mapping[str, str] = UNDECIDING) -> set[str]:
    """Names of the keys inside a section that decide nothing.

    Example: `undeciding("dataset")` is `{"num_workers", "test_batch_size"}`.
    """
    return {key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides the result, in one spelling.

    Args:
        config: plain containers, as a run records them.
    Returns: the config without `UNDECIDING` keys. Paths below paths.data are relative to it, other paths relative to
        the project where they are below it: `task`, `./task` and its absolute path are one task. The project is the
        folder of paths.outputs, which is the working directory where that is a relative path: a command finds its
        runs again from every folder from which it finds their outputs. The devices `cuda` and `cuda:N` are `auto`.
        Classes have their first names.
    """
    data, outputs = str(config["paths"]["data"]), os.path.expanduser(str(config["paths"]["outputs"]))
    project = os.path.dirname(outputs.rstrip(os.sep)) if os.path.isabs(outputs) else os.curdir
    kept = _without(config, UNDECIDING)
    return {key: _canonical(value, key, data, project) for key, value in _without_later_keys(kept).items()}


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity."""
    return sha256_json(identity)


def _without(tree: Mapping[str, Any], keys: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in keys
    }


def _without_later_keys(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree without the `LATER_KEYS` that are at their first values."""
    return {
        key: _without_later_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in LATER_KEYS or value != LATER_KEYS[f"{prefix}{key}"]
    }


def _canonical(value: Any, key: str, data: str, project: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _canonical(item, f"{key}.{name}", data, project) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item, key, data, project) for item in value]
    if not isinstance(value, str):
        return value
    if key == "trainer.device":
        return "auto" if value.partition(":")[0] == "cuda" else value
    if key.endswith("._target_"):
        return _FIRST_TARGETS.get(value, value)
    if key in _PATHS and value not in NAMED_WEIGHTS:
        return _canonical_path(value, data, project)
    return _moved(value, data.rstrip("/"))


def _canonical_path(path: str, data: str, project: str) -> str:
    """Nothing is looked up on the disk: links are names like any other."""
    full = os.path.abspath(os.path.expanduser(path))
    for base, name in ((data, _DATA), (project, "")):
        relative = os.path.relpath(full, os.path.abspath(os.path.expanduser(base)))
        if relative.split(os.sep)[0] != os.pardir:
            return os.path.normpath(os.path.join(name, relative))
    return full


def _moved(text: str, data: str) -> str:
    return _DATA + text[len(data) :] if data and text.startswith(f"{data}/") else text
