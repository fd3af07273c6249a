"""Moved to `mambapeft_vision.run.environment`; this name stays until every caller uses the new one."""

from mambapeft_vision.run.environment import (
    device_name,
    git_state,
    library_versions,
    peak_memory_bytes,
    reset_peak_memory,
)

__all__ = ["device_name", "git_state", "library_versions", "peak_memory_bytes", "reset_peak_memory"]
