"""Image tasks in the layout of VTAB-1K: the table of tasks, loading, checking, and the demo task."""

import importlib
from typing import TYPE_CHECKING, Any

from mambapeft_vision.data.images import ImageSet
from mambapeft_vision.data.preprocessing import Preprocessing, decode_image
from mambapeft_vision.data.tasks import SPLITS, TASKS, Task
from mambapeft_vision.utils.progress import ConsoleProgress, Progress

if TYPE_CHECKING:
    from mambapeft_vision.data.generated.digits import DemoDataModule
    from mambapeft_vision.data.module import TaskDataModule

__all__ = [
    "SPLITS",
    "TASKS",
    "ConsoleProgress",
    "DemoDataModule",
    "ImageSet",
    "Preprocessing",
    "Progress",
    "Task",
    "TaskDataModule",
    "decode_image",
]

# Lightning takes seconds to import, and Triton with it; preparing and checking data needs neither, and importing any
# module of this package runs this file.
_LIGHTNING = {"TaskDataModule": "module", "DemoDataModule": "generated.digits"}


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING:
        return getattr(importlib.import_module(f"{__name__}.{_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
