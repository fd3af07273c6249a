"""From a composed config to a plan: the resolved settings, the run's identity and its folder."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mambapeft_vision.adapter.specs import for_backbone, in_old_words
from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.results.layout import SET_ASIDE
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run.config import GIVEN, METHOD_SIZES, PathsConfig, TrainConfig, to_dict
from mambapeft_vision.run.exit import nearest
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.identity import fingerprint, identity
from mambapeft_vision.utils.names import MOST_PARTS, check_method_names, check_name, user_path
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.untrusted import refuse_links

# Bytes in a folder's name that is made of methods' names; file systems allow 255.
LONGEST_NAME = 120


@dataclass(frozen=True)
class RunPlan:
    """One run: its resolved config in typed parts, its identity and its place.

    Args:
        config: the recorded config, in plain containers. Code reads the typed attributes instead.
        recipe: the section `trainer`.
        fingerprint: sha256 of what decides the result.
        folder: folder of the run's files.
    """

    config: dict[str, Any]
    recipe: TrainerConfig
    fingerprint: str
    folder: Path

    @property
    def paths(self) -> PathsConfig:
        return PathsConfig(**self.config["paths"])

    @property
    def dataset(self) -> dict[str, Any]:
        return self.config["dataset"]

    @property
    def backbone(self) -> dict[str, Any]:
        return self.config["backbone"]

    @property
    def logger(self) -> dict[str, Any]:
        return self.config["logger"]

    @property
    def method_specs(self) -> dict[str, dict[str, Any]]:
        """Method name → its `_target_` and arguments, as given (see `method_sizes`)."""
        return self.config["method"]

    @property
    def method_sizes(self) -> str:
        return self.config["method_sizes"]

    @property
    def kernel(self) -> str:
        """As asked for, e.g. `auto`."""
        return self.config["kernel"]

    @property
    def resume(self) -> bool:
        return self.config["resume"]

    @property
    def dry_run(self) -> bool:
        return self.config["dry_run"]

    @property
    def task(self) -> str:
        return self.config["dataset"]["name"]

    @property
    def methods(self) -> list[str]:
        return sorted(self.config["method"])

    @property
    def method_names(self) -> str:
        return "+".join(self.methods)

    @property
    def seed(self) -> int:
        return self.config["seed"]


def make_plan(cfg: DictConfig) -> RunPlan:
    """Checks and resolves a composed config. Raises UserError naming the key that is wrong."""
    config = _checked(cfg)
    return _plan(config, _identity_of(config))


class Resolved:
    """A composed config, resolved once for the plans of many runs: thousands are planned in seconds.

    Raises: UserError as `make_plan`, and where the seed is a part of a longer value (`${seed}` alone may be anywhere).
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._config = _checked(cfg)
        self._identity = _identity_of(self._config)
        leaves = list(_leaves(OmegaConf.to_container(cfg, resolve=False)))
        within = seed_is_within(cfg)
        if within:
            raise UserError(f"{within}; expected no seed in it, or nothing but ${{seed}}")
        self._seeds = [("seed",), *(path for path, value in leaves if value == "${seed}")]

    def plan(self, seed: int, dataset: "Resolved") -> RunPlan:
        """As `make_plan` of this config with the data set of another one and a seed."""
        config, deciding = (
            {**own, "dataset": other["dataset"]}
            for own, other in ((self._config, dataset._config), (self._identity, dataset._identity))
        )
        places = [p for p in self._seeds if p[0] != "dataset"] + [p for p in dataset._seeds if p[0] == "dataset"]
        for path in places:
            config = _with(config, path, seed)
            deciding = _with(deciding, path, seed) if path[0] in deciding else deciding
        return _plan(config, deciding)


def seed_is_within(cfg: DictConfig) -> str:
    """`key='value'` of a longer value that holds the seed, or ""."""
    for path, value in _leaves(OmegaConf.to_container(cfg, resolve=False)):
        if "${seed" in str(value) and value != "${seed}":
            return f"{'.'.join(path)}={value!r}"
    return ""


def _checked(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config."""
    _check_keys(cfg, TrainConfig, "")
    _check_keys(cfg.trainer, TrainerConfig, "trainer.")
    _check_keys(cfg.paths, PathsConfig, "paths.")
    if OmegaConf.is_missing(cfg, "method") or not cfg.method:
        raise UserError("method=[] names no method; for the head alone choose method=linear_probe")
    if cfg.get("pretrain") is not None:
        raise UserError("pretrain=... trains no methods; start it alone: mambapeft train pretrain=...")
    config = to_dict(cfg)
    config.pop("pretrain", None)
    if config["method_sizes"] not in METHOD_SIZES:
        raise UserError(f"method_sizes={config['method_sizes']!r}; expected one of {', '.join(METHOD_SIZES)}")
    config["method"] = _sized_methods(config)
    _check_values(config, "")
    TrainerConfig(**config["trainer"]).check()
    check_name(config["dataset"].get("name"), "dataset.name", parts=MOST_PARTS)
    check_method_names(config["method"])
    return config


def _sized_methods(config: dict[str, Any]) -> dict[str, Any]:
    """The methods with the published sizes for the backbone; with those of Vim-S where they are to be scaled."""
    backbone = config["backbone"].get("name") if config["method_sizes"] == GIVEN else None
    return for_backbone(config["method"], backbone if isinstance(backbone, str) else None)


def _identity_of(config: dict[str, Any]) -> Mapping[str, Any]:
    """The keys that decide the result. Roles are spelled as the patterns of earlier releases: identities stay equal."""
    return identity({**config, "method": in_old_words(config["method"])})


def fingerprint_of(config: dict[str, Any]) -> str:
    """The fingerprint of a run with this config, which is plain and resolved."""
    return fingerprint(_identity_of(config))


def _plan(config: dict[str, Any], deciding: Mapping[str, Any]) -> RunPlan:
    digest, outputs = fingerprint(deciding), user_path(config["paths"]["outputs"])
    folder = run_folder(outputs, config["dataset"]["name"], list(config["method"]), config["seed"], digest)
    return RunPlan(config, TrainerConfig(**config["trainer"]), digest, folder)


def run_folder(outputs: Path, task: str, methods: Sequence[str], seed: int, fingerprint: str) -> Path:
    """Where a run has its files."""
    return outputs / task / _folder_name(sorted(methods)) / f"seed{seed}-{fingerprint[:8]}"


def make_run_folder(outputs: Path, record: RunRecord) -> Path:
    """Makes the folder of a recorded run. The record may come from anybody.

    Raises: UserError where its names lead out of `outputs`, or a folder on the way is a link.
    """
    folder = run_folder(outputs, record.task, record.methods, record.seed, record.fingerprint)
    inside = os.path.relpath(os.path.abspath(folder), os.path.abspath(outputs)).split(os.sep)
    if inside[0] == os.pardir or len(inside) != len(folder.parts) - len(outputs.parts):
        raise UserError(
            f"the record of a run has the task {shown(record.task)} and the fingerprint {shown(record.fingerprint)}, "
            f"which are no names of folders below {plain(outputs)}. Get the record again"
        )
    refuse_links(folder, outputs)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _with(tree: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` with another value at `path`; unchanged branches are shared."""
    key, *rest = path
    return {**tree, key: _with(tree[key], rest, value) if rest else value}


def _folder_name(methods: list[str]) -> str:
    """The methods joined by +; a long hybrid's name is cut, for file systems, and told apart by a hash."""
    name = "+".join(methods)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    cut = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def set_aside(folder: Path) -> Path | None:
    """Renames a run's folder to `<name>.replaced-<n>`; None when there is none."""
    return folder.rename(free_name(folder)) if folder.exists() else None


def free_name(folder: Path) -> Path:
    """The first unused name `<name>.replaced-<n>`, for what is set aside of a run's folder."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}{SET_ASIDE}{number}")).exists():
        number += 1
    return aside


def _check_values(section: Any, name: str) -> None:
    """Raises UserError for values that result.json cannot store: NaN, infinity, and strings that are not valid UTF-8.

    A value must not contain `${` either, as the real name of a folder could: readers of records refuse references.
    """
    if isinstance(section, str) and "${" in section:
        raise UserError(f"{name}={shown(section)}; expected no '${{' in a value. Rename the file or folder")
    if isinstance(section, float) and not math.isfinite(section):
        raise UserError(f"{name}={section}; expected a finite number")
    if isinstance(section, str) and not _is_utf8(section):
        raise UserError(f"{name}={section!r} is not UTF-8; expected a name that is: rename the file or folder")
    items = section.items() if isinstance(section, dict) else enumerate(section) if isinstance(section, list) else ()
    for key, value in items:
        _check_values(value, f"{name}.{key}" if name else str(key))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a file's name that Python could not decode
        return False
    return True


def _check_keys(cfg: DictConfig, schema: type, prefix: str) -> None:
    """Raises UserError for unknown keys: `+key=value` gets past Hydra's own check."""
    known = [field.name for field in dataclasses.fields(schema)]
    for key in cfg:
        if key not in known:
            raise UserError(f"{prefix}{key!s} is no key of the config; {nearest(str(key), known)}")
