"""Image tasks in the layout of VTAB-1K: the table of tasks, loading, checking, and the demo task."""

from mambapeft_vision.data.demo import DemoDataModule
from mambapeft_vision.data.images import ImageSet
from mambapeft_vision.data.module import TaskDataModule
from mambapeft_vision.data.preprocessing import Preprocessing, decode_image
from mambapeft_vision.data.progress import ConsoleProgress, Progress
from mambapeft_vision.data.vtab import SPLITS, TASKS, Task

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
