"""`mambapeft train --from-result PATH`: a recorded run again, from what its result.json says.

The result becomes a root config of Hydra's, so further overrides work as usual: they change keys, and a group chosen
anew (logger=wandb, method=[a,d]) replaces the recorded section. Light to import, as config.py is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from mambapeft_vision.results.claims import computed
from mambapeft_vision.results.record import RunRecord, is_derived, read_record
from mambapeft_vision.run.config import TrainConfig
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.identity import undeciding
from mambapeft_vision.utils.text import command, override, plain, shown

FLAG = "--from-result"
ROOT_CONFIG = "from_result"  # its name in Hydra's store
_GROUPS = ("backbone", "dataset", "trainer", "logger", "method", "experiment")
EXPORTS = "mambapeft_vision.data.own.library.LibraryDataModule"
READS_ONLY = "mambapeft_vision.data.TaskDataModule"  # any other data module makes its task's folder
_NOT_BESIDE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
# Keys that may differ between a run and the record that it is compared with.
_WHERE = {"folder", "seed", "batch_size", *undeciding("dataset")}


def split_flag(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--from-result` in a command line, None without it, and the other words.

    Raises: UserError where it is given twice, names nothing, or stands beside a choice of Hydra's root config.
    """
    path, rest, words = None, [], iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag != FLAG:
            rest.append(word)
            continue
        if path is not None:
            raise UserError(f"{FLAG} is given twice; expected one result.json or run folder")
        path = value or next(words, "")
    if path == "":
        raise UserError(f"{FLAG} names no file; expected a result.json or the folder of a finished run")
    if path is not None:
        beside = [word for word in rest if word.partition("=")[0] in _NOT_BESIDE]
        if beside:
            raise UserError(f"{FLAG} brings a config of its own; leave {beside[0]} out")
    return path, rest


def store_root_config(path: str | Path, arguments: Sequence[str], configs: Path) -> RunRecord:
    """Puts a recorded run's config into Hydra's store as `ROOT_CONFIG`, from where it is composed as train.yaml is.

    Args:
        path: a result.json, or the folder of a finished run.
        arguments: the overrides that it will be composed with; a group chosen there is not taken from the result.
        configs: folder with train.yaml.
    Returns: the result, which the new run is compared with.
    Raises: UserError for a result that cannot be read or used.
    """
    record = read_record(path)
    if is_derived(record):
        raise UserError(f"{path} was made from finished runs, not trained; rerun one of those")
    ConfigStore.instance().store(name=ROOT_CONFIG, node=_root_config(record, arguments, configs))
    return record


def differences(record: RunRecord, versions: Mapping[str, str], commit: str | None, device: str) -> list[str]:
    """Lists what has changed since the record, such as `torch 2.6.0 → 2.9.1`.

    Args:
        record: the result that is repeated.
        versions, commit, device: those of this run.
    """
    then = {**record.versions, "git commit": record.git_commit, "device": record.device_name}
    now = {**versions, "git commit": commit, "device": device}
    return [
        f"{name} {then.get(name) or 'none'} → {now.get(name) or 'none'}"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]


def check_inputs(record: RunRecord, config: Mapping[str, Any], data_manifest: str, backbone_sha256: str) -> None:
    """Raises UserError if a run on the record's task or backbone finds other images or weights than the record's."""
    dataset, backbone = ({**record.config[group]} for group in ("dataset", "backbone"))
    if _same(dataset, config["dataset"]) and data_manifest != record.data_manifest:
        raise UserError(
            f"the images of {record.task} in {config['dataset']['folder']} are not those of the record: manifest "
            f"{data_manifest}, recorded {record.data_manifest}. Give dataset.folder or paths.data of those"
        )
    backbone.pop("weights", None)
    if _same(backbone, config["backbone"]) and backbone_sha256 != record.backbone_sha256:
        raise UserError(
            f"the weights {config['backbone'].get('weights')} are not those of the record: sha256 {backbone_sha256}, "
            f"recorded {record.backbone_sha256}. Give backbone.weights=PATH of the recorded ones"
        )


def compare(then: RunRecord, now: RunRecord) -> str:
    """The outcome beside the recorded one, in a line."""
    if not _same_settings(then.config, now.config):
        return f"the record had accuracy {then.accuracy:.2%}, with other settings"
    if (then.accuracy, then.loss) == (now.accuracy, now.loss):
        return "accuracy and test loss are the recorded ones, to the last bit"
    return f"recorded: accuracy {then.accuracy:.2%}, test loss {then.loss:.6g}; now {now.accuracy:.2%}, {now.loss:.6g}"


def _root_config(record: RunRecord, arguments: Sequence[str], configs: Path) -> Any:
    """train.yaml with the record's values, without the sections whose group is chosen on the command line."""
    overrides = {word.partition("=")[0] for word in arguments if "=" in word}
    chosen = [group for group in _GROUPS if group in overrides]
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    unknown = [key for key in record.config if key not in known]
    if unknown:
        raise UserError(f"the record's config has {plain(', '.join(unknown))}, which this release does not know")
    root = yaml.safe_load((configs / "train.yaml").read_text(encoding="utf-8"))
    groups: list[dict[str, str | None]] = [{group: None} for group in _GROUPS if group != "logger"]
    groups.append({"logger": "none"})  # whom a run tells is the command's decision, and never the record's
    values = {key: value for key, value in computed(record.config).items() if key not in chosen}
    if "dataset" in values and "dataset.source" not in overrides:
        _check_nothing_is_downloaded(record)
    defaults = ["train_schema", "_self_", *groups]
    overriding = [entry for entry in root["defaults"] if isinstance(entry, dict) and next(iter(entry)).startswith("ov")]
    kept = {key: root[key] for key in root if key not in ("defaults", "paths")}
    paths = _paths(record, overrides, root["paths"])
    return {"defaults": [*defaults, *overriding], **kept, **_movable(values, record), **_fresh(), "paths": paths}


def _check_nothing_is_downloaded(record: RunRecord) -> None:
    """Raises UserError for a record of images that a library would download, however many those are."""
    dataset = record.config["dataset"]
    source = str(dataset.get("source"))
    on_the_hub = dataset.get("library") == "hf" and not Path(source).is_dir()
    if dataset.get("_target_") == EXPORTS and (on_the_hub or dataset.get("download")):
        raise UserError(
            f"the record's images are the data set {shown(source)}, which would be downloaded; a record does not "
            f"decide that: add {command(override('dataset.source', source))} if you want it"
        )


def _fresh() -> dict[str, Any]:
    return {"resume": True, "dry_run": False, "sweep": None}


def _paths(record: RunRecord, overrides: set[str], current: Mapping[str, Any]) -> dict[str, Any]:
    """The section `paths`. A record only says where data are read; nothing is written to a place that it names."""
    then = record.config.get("paths")
    then = then if isinstance(then, Mapping) else {}
    for key in ("methods", "backbones"):
        if then.get(key) is not None and f"paths.{key}" not in overrides:
            raise UserError(
                f"the recorded run had {key.removesuffix('s')} files of its own in {shown(then[key])}; a record is "
                f"data and runs no code: give paths.{key}=DIR if you trust them"
            )
    data = current["data"] if _lays_out(record) else _plain(then.get("data", current["data"]))
    outputs, cache = f"{current['outputs']}-again", f"{current['data']}/cache"
    return {**current, "data": data, "outputs": outputs, "cache": cache, "methods": None, "backbones": None}


def _lays_out(record: RunRecord) -> bool:
    """Whether the task's folder is written to; it is then below the command's own paths.data."""
    dataset, data = record.config["dataset"], _data_of(record)
    # Splits of own images, and what is exported from a library, are written below the command's own paths.data.
    if dataset.get("path") is not None or dataset.get("_target_") == EXPORTS:
        return True
    if dataset.get("_target_") == READS_ONLY:
        return False
    folder = os.path.normpath(str(dataset.get("folder")))
    if not folder.startswith(f"{os.path.normpath(data)}/"):
        raise UserError(
            f"the record's task makes its images in {shown(folder)}, which is not below its paths.data; a record "
            f"does not say where files are written: give dataset=NAME of a task of yours"
        )
    return True


def _data_of(record: RunRecord) -> str:
    paths = record.config.get("paths")
    return str(paths.get("data")) if isinstance(paths, Mapping) else ""


def _movable(value: Any, record: RunRecord, key: str = "") -> Any:
    """A resolved section that refers to `paths.data` and `seed` again, so that both can be overridden."""
    if isinstance(value, Mapping):
        return {_plain(name): _movable(item, record, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_movable(item, record) for item in value]
    if key == ".dataset.seed" and value == record.seed:
        return "${seed}"
    if isinstance(value, str):
        data = _data_of(record).rstrip("/") + "/"
        return f"${{paths.data}}/{_plain(value[len(data) :])}" if value.startswith(data) else _plain(value)
    return value


def _plain(text: Any) -> str:
    if "${" in str(text):
        raise UserError(f"the record's config holds {shown(str(text))}; expected resolved values")
    return str(text)


def _same_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether every recorded key that can change a result has its old value, and newer keys have their defaults."""
    for group in ("backbone", "dataset", "trainer", "method"):
        ignored = {*undeciding(group), "folder", "weights"}  # the content of those two has been compared
        if any(now[group].get(key) != value for key, value in then[group].items() if key not in ignored):
            return False
    return then["method"].keys() == now["method"].keys() and then["seed"] == now["seed"]


def _same(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(now.get(key) == value for key, value in then.items() if key not in _WHERE)
