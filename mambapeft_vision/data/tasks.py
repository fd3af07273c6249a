"""The 19 tasks of VTAB-1K as one table, and the splits every task folder has.

Class counts come from here, never from the labels seen: the 1,000 training images of SUN397 cover only
325 of its 397 classes. Source: VTAB (arXiv 1910.04867), counts of the common 1,000-image release.
"""

from dataclasses import dataclass
from pathlib import Path

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import command

GROUPS = ("natural", "specialized", "structured", "demo", "custom")
SPLITS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True)
class Task:
    """One task in the folder layout of VTAB-1K.

    Args:
        folder: name of the task's folder.
        num_classes: labels run from 0 to num_classes - 1.
        num_test: images of the test split.
        also_valid_test: other test counts in circulation.
    """

    folder: str
    group: str
    num_classes: int
    num_test: int
    also_valid_test: tuple[int, ...] = ()
    num_train: int = 800
    num_val: int = 200
    family: str = "vtab"

    @property
    def name(self) -> str:
        """Name in configs and results, such as `vtab/cifar`."""
        return f"{self.family}/{self.folder}"

    def valid_counts(self, split: str) -> tuple[int, ...]:
        """Numbers of images that `split` may have; the first is the usual one."""
        return {
            "train800": (self.num_train,),
            "val200": (self.num_val,),
            "train800val200": (self.num_train + self.num_val,),
            "test": (self.num_test, *self.also_valid_test),
        }[split]


TASKS: dict[str, Task] = {
    task.folder: task
    for task in (
        Task("cifar", "natural", 100, 10_000),
        # Papers give 6,084, the common release has 6,085.
        Task("caltech101", "natural", 102, 6_085, also_valid_test=(6_084,)),
        Task("dtd", "natural", 47, 1_880),
        Task("oxford_flowers102", "natural", 102, 6_149),
        Task("oxford_iiit_pet", "natural", 37, 3_669),
        Task("svhn", "natural", 10, 26_032),
        Task("sun397", "natural", 397, 21_750),
        Task("patch_camelyon", "specialized", 2, 32_768),
        Task("eurosat", "specialized", 10, 5_400),
        Task("resisc45", "specialized", 45, 6_300),
        Task("diabetic_retinopathy", "specialized", 5, 42_670),
        Task("clevr_count", "structured", 8, 15_000),
        Task("clevr_dist", "structured", 6, 15_000),
        Task("dmlab", "structured", 6, 22_735),
        Task("kitti", "structured", 4, 711),
        Task("dsprites_loc", "structured", 16, 73_728),
        Task("dsprites_ori", "structured", 16, 73_728),
        Task("smallnorb_azi", "structured", 18, 12_150),
        Task("smallnorb_ele", "structured", 9, 12_150),
    )
}

# scikit-learn's digits in the same layout; laid out by data/generated/digits.py.
DIGITS = Task("digits", "demo", 10, 797, family="demo")


def find_task(name: str) -> Task | None:
    """The table's row for a name such as `vtab/cifar` or `demo/digits`; None for people's own folders."""
    return next((task for task in (*TASKS.values(), DIGITS) if task.name == name), None)


def select_tasks(folders: list[str] | None, table: dict[str, Task] = TASKS) -> list[Task]:
    """Rows of `table` by folder name, in the order of the table; all of them for None.

    Raises UserError for a name that is not in the table.
    """
    if folders is None:
        return list(table.values())
    unknown = [folder for folder in folders if folder not in table]
    if unknown or not folders:
        raise UserError(
            f"Unknown tasks {unknown}: expected a comma-separated choice of {', '.join(table)}. "
            "Correct the names, or leave them out to take all."
        )
    return [task for task in table.values() if task.folder in folders]


def prepare_command(root: Path | str) -> str:
    """The command that fetches and checks the data below `root`."""
    return command("mambapeft", "prepare", "vtab1k", "--root", root)
