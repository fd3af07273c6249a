"""One task for the trainer: splits, batches, and what is known about the data."""

import functools
import re
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch import Tensor

from mambapeft_vision.data.cache import cached_list, is_cacheable
from mambapeft_vision.data.image_list import ImageList, missing_images, read_list
from mambapeft_vision.data.images import ImageSet
from mambapeft_vision.data.loaders import DecodingLoader, MemoryLoader, TrainLoader, epoch_order
from mambapeft_vision.data.manifest import manifest_hash
from mambapeft_vision.data.prefetch import Prefetch
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.data.tasks import GROUPS, SPLITS, find_task, prepare_command
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.processes import available_cpus
from mambapeft_vision.utils.progress import ProgressCallback

# Without a cache, test sets up to this size are decoded once and kept (4,096 images of 224x224 are 617 MB).
KEEP_IN_MEMORY = 4096
# Each worker holds the batches it decodes ahead: two of 256 images of 224x224 are 77 MB.
MAX_DEFAULT_WORKERS = 8


class TaskDataModule(LightningDataModule):
    """A task in the folder layout of VTAB-1K (data/README.md).

    Call `load` before training: it checks both splits and decodes the training images. Batches are
    (uint8 [b, 3, H, W], int64 [b]); normalisation is left to the LightningModule, on the device.

    Args:
        name: such as `vtab/cifar`; for a name of the tables in `tasks.py`, `load` checks the image counts too.
        folder: the task's folder, with `images/` and the list files.
        group: natural, specialized, structured, demo or custom.
        num_test: images expected in `test.txt`; None for any number.
        num_workers: processes that decode a test split of over 4,096 images, at most one a CPU; None takes at most 8.
        seed: decides, with the epoch, the order of the training images.
        cache: folder for decoded images, shared by all runs; None: decode in every run.
    """

    name: str  # LightningDataModule allows None

    def __init__(
        self,
        *,
        name: str,
        folder: str | Path,
        num_classes: int,
        group: str,
        num_test: int | None = None,
        train_split: str = "train800val200",
        test_split: str = "test",
        batch_size: int = 32,
        test_batch_size: int = 256,
        num_workers: int | None = None,
        seed: int = 0,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        if group not in GROUPS:
            raise UserError(f"dataset.group={group!r}: expected one of {', '.join(GROUPS)}.")
        _require_at_least("num_classes", num_classes, 2)
        task = find_task(name)
        if task is not None and num_classes != task.num_classes:
            raise UserError(f"dataset.num_classes={num_classes}: expected {task.num_classes}, which {name} has.")
        for key, split in (("train_split", train_split), ("test_split", test_split)):
            if not re.fullmatch(r"\w[\w.-]*", split):
                raise UserError(f"dataset.{key}={split!r}: expected the name of a list file, such as train800val200.")
        _require_at_least("batch_size", batch_size, 1)
        _require_at_least("test_batch_size", test_batch_size, 1)
        if num_workers is not None:
            _require_at_least("num_workers", num_workers, 0)
        self.name = name
        self.folder = user_path(folder)
        self.num_classes = num_classes
        self.group = group
        self.num_test = num_test
        self.train_split = train_split
        self.test_split = test_split
        self.batch_size = batch_size
        self.test_batch_size = test_batch_size
        # A config that somebody sent must not start more processes than there are CPUs.
        self.num_workers = min(available_cpus(), MAX_DEFAULT_WORKERS if num_workers is None else num_workers)
        self.seed = seed
        self.cache = None if cache is None else user_path(cache)
        self.preprocessing: Preprocessing | None = None
        self._train_set: ImageSet | None = None
        self._test_set: ImageSet | None = None
        self._prefetch: Prefetch | None = None
        self._listings: dict[str, ImageList] = {}
        self._progress: ProgressCallback | None = None

    # Loading

    def lay_out(self) -> None:
        """Makes the task's folder, for tasks that bring their own images; nothing for the others."""

    def check(self, *, test_only: bool = False) -> None:
        """Reads both splits' lists and looks for their images; quick, so that it can come before all else.

        Args:
            test_only: for an evaluation: the training split is not looked at, and nothing is laid out, so that a config
                that somebody sent names no folder to write to.

        Raises:
            UserError: for what is missing or does not fit the task.
        """
        if not test_only:
            self.lay_out()
        splits = (self.test_split,) if test_only else (self.train_split, self.test_split)
        self._listings = {split: self._checked_list(split) for split in splits}

    def load_test(self, preprocessing: Preprocessing, progress: ProgressCallback | None = None) -> None:
        """Checks the test split alone and prepares `test_dataloader`. Raises UserError."""
        self.check(test_only=True)
        self._test_set = None
        self._progress = progress
        self.preprocessing = preprocessing

    def load(self, preprocessing: Preprocessing, progress: ProgressCallback | None = None) -> None:
        """Checks both splits and decodes the training images into memory.

        A test list or test image that is missing fails here, before any training. `progress` reports images/s
        and time left of this decode, and of the test split's where that is kept in memory. Loading again does
        nothing unless `preprocessing` differs. Raises UserError.
        """
        if self.preprocessing == preprocessing and self._train_set is not None:
            return
        if self.train_split not in self._listings:  # a caller that checked first need not wait for it twice
            self.check()
        self._train_set = cached_list(self._listings[self.train_split], preprocessing, self.cache, progress)
        self._test_set = None
        self._progress = progress
        self.preprocessing = preprocessing

    def remedy(self) -> str:
        """What to do about missing or damaged files; ends every error about them."""
        if self.name.startswith("vtab/"):
            command = f"`{prepare_command(self.folder.parent)}` (data/README.md has the download by hand)"
            return f"Delete {self.folder} and run {command}." if self.folder.exists() else f"Run {command}."
        return "Lay the task out as data/README.md shows, and point dataset.folder at it."

    def _checked_list(self, split: str) -> ImageList:
        listing = read_list(self.folder / f"{split}.txt", self.num_classes, remedy=self.remedy())
        valid = self._valid_counts(split)
        if valid and len(listing) not in valid:
            expected = " or ".join(f"{count:,}" for count in valid)
            raise UserError(
                f"{listing.file} lists {len(listing):,} images: expected {expected} for {self.name}. {self.remedy()}"
            )
        missing = missing_images(listing)
        if missing:
            raise listing.error(missing[0], f"the image does not exist ({len(missing):,} of {len(listing):,} do not).")
        return listing

    def _valid_counts(self, split: str) -> tuple[int, ...]:
        """Image counts that `split` may have; empty for any."""
        task = find_task(self.name)
        if task is not None and split in SPLITS:
            return task.valid_counts(split)
        return (self.num_test,) if split == "test" and self.num_test is not None else ()

    # What is loaded

    @property
    def train_set(self) -> ImageSet:
        """The decoded training images, in list order; `train_set.to(device)` may replace them."""
        if self._train_set is None:
            raise UserError(f"The images of {self.name} are not loaded: call load(preprocessing) first.")
        return self._train_set

    @train_set.setter
    def train_set(self, images: ImageSet) -> None:
        self._train_set = images

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch, the last partial one included."""
        return -(-len(self.train_set) // self.batch_size)

    @functools.cached_property
    def manifest_hash(self) -> str:
        """Fingerprint of the task's files: the manifest's sha256, or `unverified:…` (see manifest.py)."""
        if not self._listings:
            raise UserError(f"The images of {self.name} are not loaded: call load(preprocessing) first.")
        return self.fingerprint()

    def fingerprint(self, *, check_images: bool = False) -> str:
        """As `manifest_hash`, asked anew; `check_images` reads the images instead of trusting the manifest."""
        return manifest_hash(self.folder, self._listings.values(), check_images=check_images)

    # Batches

    def epoch_order(self, epoch: int) -> Tensor:
        """Order of the training images in `epoch`, int64 [n]; depends on (seed, epoch) alone."""
        return epoch_order(len(self.train_set), self.seed, epoch)

    def train_batch(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """The batch with that number (from 0) in `epoch`: images uint8 [b, 3, H, W], labels int64 [b]."""
        first = number * self.batch_size
        return self.train_set.batch(self.epoch_order(epoch)[first : first + self.batch_size])

    def images_in_batch(self, number: int) -> int:
        """How many images the training batch with that number has; the last one of an epoch has what is left."""
        return min(self.batch_size, len(self.train_set) - number * self.batch_size)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches; each pass is the epoch that the trainer is in."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return TrainLoader(self.train_set, self.batch_size, self.seed, self._current_epoch, rank, ranks)

    def prefetch_test(self) -> None:
        """Has the test split decoded into the cache by another process meanwhile, where there is a cache."""
        if self.preprocessing is None or self.cache is None or self._test_set is not None:
            return
        listing = self._listings[self.test_split]
        if is_cacheable(listing, self.preprocessing):
            self._prefetch = Prefetch(listing, self.num_classes, self.preprocessing, self.cache)

    def test_dataloader(self) -> MemoryLoader | DecodingLoader:
        """Batches of the test split in list order."""
        if self.preprocessing is None:
            raise UserError(f"The images of {self.name} are not loaded: call load(preprocessing) first.")
        if self._prefetch is not None:
            self._prefetch.wait(self._progress)
            self._prefetch = None
        listing = self._listings[self.test_split]
        if self.cache is None and len(listing) > KEEP_IN_MEMORY:
            return DecodingLoader(listing, self.preprocessing, self.test_batch_size, self.num_workers)
        if self._test_set is None:
            self._test_set = cached_list(listing, self.preprocessing, self.cache, self._progress)
        return MemoryLoader(self._test_set, self.test_batch_size)

    def _current_epoch(self) -> int:
        if self.trainer is None:
            raise RuntimeError(
                "The order of training images depends on the epoch, and this data module has no trainer to ask: "
                "pass it as `trainer.fit(model, datamodule=...)`. A loop without a trainer takes the images "
                "from `train_set` in the order `epoch_order(epoch)`."
            )
        return self.trainer.current_epoch


def _require_at_least(key: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise UserError(f"dataset.{key}={value}: expected a whole number of at least {smallest}.")
