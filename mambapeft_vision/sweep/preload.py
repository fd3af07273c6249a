"""What the fork server of a sweep imports before any worker is forked from it."""

from contextlib import suppress

from mambapeft_vision.utils.startup import imports_kept

with suppress(Exception), imports_kept():  # a worker meets the same error, and reports it
    import mambapeft_vision.results.pictures
    import mambapeft_vision.sweep.worker  # noqa: F401
