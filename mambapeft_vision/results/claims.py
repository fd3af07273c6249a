"""What a result may say, and what only a command may say.

A result may come from anybody. It tells what was computed: backbone, data, recipe and methods. Where files are written,
who is told about a run, and whether it goes on or is only described are decisions of the person who gives a command.
Whoever makes something of a recorded config (a run, an upload) takes it through here.
"""

from collections.abc import Mapping
from typing import Any

#: Sections of a recorded config that others do not follow.
COMMAND_ONLY = ("paths", "logger", "resume", "dry_run")


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recorded config that says what was computed."""
    return {key: value for key, value in config.items() if key not in COMMAND_ONLY}
