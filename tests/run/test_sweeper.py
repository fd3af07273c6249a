"""A sweeper in a config folder of one's own searches with the accuracy that `mambapeft train` returns."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import runs
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from mambapeft_vision import cli
from mambapeft_vision.results.record import read_record


class Climb(Sweeper):
    """Goes on with ten times the learning rate as long as that is better."""

    found: dict[float, float]

    def __init__(self, start: float) -> None:
        self.start = start

    def setup(self, *, hydra_context: Any, task_function: Callable[..., Any], config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        type(self).found, rate = {}, self.start
        while len(self.found) < 2 or rate / 10 == max(self.found, key=lambda rate: self.found[rate]):
            self.found[rate] = self._accuracy([*arguments, f"trainer.learning_rate={rate}"])
            rate *= 10

    def _accuracy(self, job: Sequence[str]) -> float:
        (done,) = self.launcher.launch([job], initial_job_idx=len(self.found))
        assert isinstance(done.return_value, float)
        return done.return_value


@pytest.fixture
def config_folder(tmp_path, monkeypatch) -> Path:
    """Holds the option hydra/sweeper=climb, whose class is where Hydra looks for plugins."""
    module = ModuleType("hydra_plugins.climb")
    module.Climb = Climb  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hydra_plugins.climb", module)
    monkeypatch.setattr(Climb, "__module__", "hydra_plugins.climb")
    Plugins.instance().register(Climb)
    option = tmp_path / "configs" / "hydra" / "sweeper" / "climb.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("_target_: hydra_plugins.climb.Climb\nstart: 1e-6\n")
    return tmp_path / "configs"


def test_a_sweeper_climbs_on_the_accuracies(config_folder, tmp_path):
    words = runs.overrides(runs.lay_out_task(tmp_path / "task"), tmp_path / "out", "trainer.max_epochs=2")
    words = [word for word in words if not word.startswith(("method.", "trainer.learning_rate", "trainer.check"))]
    search = f"hydra.searchpath=[file://{config_folder}]"
    cli.main(["train", "-m", search, "hydra/sweeper=climb", "method=linear_probe", *words])
    recorded = {}
    for file in (tmp_path / "out").rglob("result.json"):
        record = read_record(file)
        recorded[record.config["trainer"]["learning_rate"]] = record.accuracy
    assert len(Climb.found) >= 2 and Climb.found == recorded
