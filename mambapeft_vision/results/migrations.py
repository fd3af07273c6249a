"""Results of earlier releases in today's form. Only this file knows what those releases wrote.

Files on the disk stay as they are; code that reads one passes its content through here. A result keeps its fingerprint,
because that names the run's folder.

Later schemas of results have fields that earlier ones lack: `LATER_FIELDS`. The config section has grown and its
classes have moved:

* `MOVED_TARGETS` in utils/identity.py: classes that have another name now;
* `LATER_KEYS` here: keys that came after the first published results, with what those runs did.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mambapeft_vision.utils.identity import MOVED_TARGETS

LATER_KEYS: Mapping[str, Mapping[str, Any]] = {
    "": {"method_sizes": "given", "sweep": None},
    "paths": {"cache": None, "backbones": None},
    "trainer": {"micro_batch": None, "cuda_graph": True, "devices": 1, "on_nonfinite": "stop"},
}

# Fields of a result by the schema that brought them, with what is known of results of the schema before, whose config
# is given.
LATER_FIELDS: Mapping[int, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {
    2: lambda config: {"image_format": None},
    3: lambda config: {"class_names": None, "multi_label": _has_many_labels(config)},
}


def migrated_config(config: Any) -> Any:
    """A run's resolved config with today's names of classes, and with the keys that are newer than the config.

    Anything else is returned unchanged: the checks of the reader have the better message.
    """
    if not isinstance(config, Mapping):
        return config
    sections = {
        key: _renamed({**LATER_KEYS.get(key, {}), **value}) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    return {**LATER_KEYS[""], **sections}


def migrated_result(content: Any) -> Any:
    """The content of a result.json in today's schema, with its config migrated."""
    if not isinstance(content, Mapping) or "config" not in content:
        return content
    migrated = {**content, "config": migrated_config(content["config"])}
    for version, fields in LATER_FIELDS.items():
        if migrated.get("schema_version") == version - 1:
            migrated = {**fields(migrated["config"]), **migrated, "schema_version": version}
    return migrated


def _has_many_labels(config: Any) -> bool:
    dataset = config.get("dataset") if isinstance(config, Mapping) else None
    return isinstance(dataset, Mapping) and dataset.get("multi_label") is True


def _renamed(section: Mapping[str, Any]) -> dict[str, Any]:
    target = section.get("_target_")
    if not isinstance(target, str) or target not in MOVED_TARGETS:
        return dict(section)
    return {**section, "_target_": MOVED_TARGETS[target]}
