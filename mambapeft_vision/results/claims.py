"""What a result may say, and what only a command may say.

A result may come from anybody. It tells what was computed: backbone, data, recipe and methods. Where files are read and
written, who is told about a run, and how many processes work for it are decisions of the person who gives a command.
Whoever makes something of a result (a run, an upload, a table) takes its config through here.
"""

from collections.abc import Mapping
from typing import Any

#: Keys of a recorded config that decide nothing for others, by section ("": the top level).
COMMAND_ONLY: Mapping[str, tuple[str, ...]] = {
    "": ("paths", "logger", "resume", "dry_run"),
    "dataset": ("folder", "num_workers", "cache"),
    "trainer": ("device", "devices", "checkpoint_every_s", "picture"),
}


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recorded config that says what was computed."""
    kept = {key: value for key, value in config.items() if key not in COMMAND_ONLY[""]}
    for section, keys in COMMAND_ONLY.items():
        if section and isinstance(kept.get(section), Mapping):
            kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    return kept
