"""The part of a recorded config that others may follow.

A result may come from anybody. Its config says what was computed: backbone, data, recipe and methods. The person who
gives a command decides where files are written, where a run is reported to, and whether it is resumed or only
described. Code that uses a recorded config (for a run or an upload) passes it through `computed`.
"""

from collections.abc import Mapping
from typing import Any

#: Sections of a recorded config that others do not follow.
COMMAND_ONLY = ("paths", "logger", "resume", "dry_run")


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recorded config that says what was computed."""
    return {key: value for key, value in config.items() if key not in COMMAND_ONLY}
