"""The images and weights that there are now, to tell whether a finished run was made from them."""

import json
from typing import Any

from mambapeft_vision.adapter.model import backbone_sha256
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.manifest import manifest_hash
from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run.build import build_backbone_offline, build_dataset
from mambapeft_vision.run.run_config import RunPlan


class Inputs:
    """Hashes of images and weights; each is taken once."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def made(self, record: RunRecord, plan: RunPlan) -> bool:
        """Whether `record` was made from what there is now. What is not there to compare with counts as the same."""
        images, weights = self.of(plan)
        return images in (None, record.data_manifest) and weights in (None, record.backbone_sha256)

    def of(self, plan: RunPlan) -> tuple[str | None, str | None]:
        """Hashes of the images and of the backbone's weights; None for what is not there."""
        return self._images(plan), self._weights(plan)

    def _images(self, plan: RunPlan) -> str | None:
        key = _key(plan.config["dataset"], without="seed")
        if key not in self._known:
            self._known[key] = _images_hash(plan)
        return self._known[key]

    def _weights(self, plan: RunPlan) -> str | None:
        key = _key(plan.config["backbone"])
        if key not in self._known:
            self._known[key] = _weights_hash(plan)
        return self._known[key]


def _key(section: dict[str, Any], without: str = "") -> str:
    return json.dumps({k: v for k, v in section.items() if k != without}, sort_keys=True)


def _images_hash(plan: RunPlan) -> str | None:
    """As `TaskDataModule.manifest_hash`, without decoding anything; None where the task is not there."""
    task = build_dataset(plan)
    files = [task.folder / f"{split}.txt" for split in (task.train_split, task.test_split)]
    if not all(file.is_file() for file in files):
        return None
    lists = [read_list(file, task.num_classes, remedy=task.remedy()) for file in files]
    return manifest_hash(task.folder, lists)


def _weights_hash(plan: RunPlan) -> str | None:
    """None where official weights have not been downloaded."""
    backbone, what = build_backbone_offline(plan)
    official = plan.config["backbone"].get("weights") == "official"
    return None if official and what != "weights: official" else backbone_sha256(backbone)
