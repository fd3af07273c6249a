"""A run that nothing interrupted, for those that are."""

from pathlib import Path

import pytest
from helpers import runs


@pytest.fixture(scope="session")
def whole(task, tmp_path_factory) -> Path:
    """The folder of a run of three epochs of three steps."""
    # As deep as tests have theirs: where the task lies is told from there.
    outputs = tmp_path_factory.mktemp("whole") / "out"
    runs.run(runs.overrides(task, outputs, "trainer.max_epochs=3"))
    return runs.only_run_folder(outputs)
