"""What a worker keeps loaded between runs: the images of the last task, the weights of the last backbone."""

import copy
import json
from typing import Any

from torch import nn

from mambapeft_vision.data import TaskDataModule
from mambapeft_vision.training.build import build_backbone, build_dataset
from mambapeft_vision.training.plan import RunPlan
from mambapeft_vision.training.setup import Sources


class Kept:
    """Makes `sources` for `train`. One task and one backbone at a time, so memory does not grow with the sweep."""

    def __init__(self) -> None:
        self.sources = Sources(task=self._task_of, backbone=self._backbone_of)
        self._task: tuple[str, TaskDataModule] | None = None
        self._backbone: tuple[str, nn.Module] | None = None

    def _task_of(self, plan: RunPlan) -> TaskDataModule:
        key = task_key(plan)
        if self._task is None or self._task[0] != key:
            self._task = None  # gives the old images' memory back before the new ones need it
            self._task = key, build_dataset(plan)
        task = self._task[1]
        task.seed = plan.config["dataset"]["seed"]
        return task

    def _backbone_of(self, plan: RunPlan) -> nn.Module:
        """A copy: methods change what they are attached to."""
        key = _text(plan.config["backbone"])
        if self._backbone is None or self._backbone[0] != key:
            self._backbone = None
            self._backbone = key, build_backbone(plan)
        return copy.deepcopy(self._backbone[1])


def task_key(plan: RunPlan) -> str:
    """Equal for runs that can share loaded images."""
    return _text({key: value for key, value in plan.config["dataset"].items() if key != "seed"})


def _text(section: dict[str, Any]) -> str:
    return json.dumps(section, sort_keys=True)
