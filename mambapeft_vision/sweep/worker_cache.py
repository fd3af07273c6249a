"""The objects that a worker keeps between runs: the images of the last tasks, the weights of the last backbone."""

import copy
import json
from typing import Any

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.data import TaskDataModule
from mambapeft_vision.run.assemble import Sources
from mambapeft_vision.run.build import build_backbone, build_dataset
from mambapeft_vision.run.run_config import RunPlan


class Kept:
    """Makes `sources` for `train`. It keeps a few tasks and one backbone, so memory does not grow with the sweep.

    Args:
        tasks: how many (the training images of one are 150 MB at 224x224).
    """

    def __init__(self, tasks: int = 1) -> None:
        self.sources = Sources(task=self._task_of, backbone=self._backbone_of)
        self._size = tasks
        self._tasks: dict[str, TaskDataModule] = {}
        self._backbone: tuple[str, Backbone] | None = None

    def _task_of(self, plan: RunPlan) -> TaskDataModule:
        key = task_key(plan)
        if key not in self._tasks:
            while len(self._tasks) >= self._size:  # before the new images need the memory
                del self._tasks[next(iter(self._tasks))]
            self._tasks[key] = build_dataset(plan)
        task = self._tasks[key]
        task.seed = plan.config["dataset"]["seed"]
        return task

    def _backbone_of(self, plan: RunPlan) -> Backbone:
        """A copy of the plan's backbone, because methods change the backbone that they are attached to."""
        key = _text(plan.config["backbone"])
        if self._backbone is None or self._backbone[0] != key:
            self._backbone = None
            self._backbone = key, build_backbone(plan)
        return copy.deepcopy(self._backbone[1])


def task_key(plan: RunPlan) -> str:
    """A key that is equal for runs that can share loaded images."""
    return _text({key: value for key, value in plan.config["dataset"].items() if key != "seed"})


def _text(section: dict[str, Any]) -> str:
    return json.dumps(section, sort_keys=True)
