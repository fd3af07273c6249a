"""Results of earlier releases in today's form. Only this file knows what those releases wrote.

Files on the disk stay as they are; code that reads one passes its content through here. A result keeps its fingerprint,
because that names the run's folder.

Schema 2 of results has a field that schema 1 lacks: `LATER_FIELDS`. The config section has grown and its classes have
moved:

* `MOVED_TARGETS` in utils/identity.py: classes that have another name now;
* `LATER_KEYS` here: keys that came after the first published results, with what those runs did.
"""

from collections.abc import Mapping
from typing import Any

from mambapeft_vision.utils.identity import MOVED_TARGETS

LATER_KEYS: Mapping[str, Mapping[str, Any]] = {
    "": {"method_sizes": "given", "sweep": None},
    "paths": {"cache": None},
    "trainer": {"micro_batch": None, "cuda_graph": True, "devices": 1, "on_nonfinite": "stop"},
}

# Fields of a result by the schema that brought them, with what is known of results of the schema before.
LATER_FIELDS: Mapping[int, Mapping[str, Any]] = {2: {"image_format": None}}


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
            migrated = {**fields, **migrated, "schema_version": version}
    return migrated


def _renamed(section: Mapping[str, Any]) -> dict[str, Any]:
    target = section.get("_target_")
    if not isinstance(target, str) or target not in MOVED_TARGETS:
        return dict(section)
    return {**section, "_target_": MOVED_TARGETS[target]}
