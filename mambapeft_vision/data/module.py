"""One task for the trainer: its splits, its batches and its fingerprint."""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch import Tensor

from mambapeft_vision.data.augment import Augment, draws_of
from mambapeft_vision.data.cache import cached_list, is_cacheable
from mambapeft_vision.data.encoding import encoding_of
from mambapeft_vision.data.image_list import MOST_CLASSES, ImageList, missing_images, read_list
from mambapeft_vision.data.images import ImageSet
from mambapeft_vision.data.loaders import DecodingLoader, MemoryLoader, TrainLoader, epoch_order
from mambapeft_vision.data.manifest import UNVERIFIED, images_digest, manifest_hash
from mambapeft_vision.data.own.draw import draw_shots
from mambapeft_vision.data.own.layout import OwnImages, is_recorded, lay_out, read_classes, read_notes
from mambapeft_vision.data.own.table import Columns
from mambapeft_vision.data.prefetch import Prefetch
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.data.tasks import GROUPS, SPLITS, find_task, prepare_command
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.processes import available_cpus
from mambapeft_vision.utils.progress import ProgressCallback
from mambapeft_vision.utils.typed import check_arguments

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
        folder: the task's folder, with `images/` and the list files; None where `path` is given.
        num_classes: labels run from 0 to num_classes - 1; None, with `path`, counts them.
        path: own images: a tree of class folders, a table of paths and labels, or a task's folder (data/own/).
        root: folder that the paths of a table are relative to; None: the table's folder.
        columns: names of the table's columns, by `path`, `label` and `split`, where they are not the usual ones.
        test_share, val_share: shares of each class's images, if they are not split yet.
        split_seed: decides which images these are, and which `shots` are.
        shots: training images of each class, drawn from the training split; None takes all.
        multi_label: whether an image may have any number of labels.
        augment: random changes of training images by name (data/augment.py); None: none.
        records: folder in which the splits of own images are recorded.
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
        folder: str | Path | None = None,
        num_classes: int | None = None,
        group: str = "custom",
        num_test: int | None = None,
        train_split: str = "train800val200",
        test_split: str = "test",
        batch_size: int = 32,
        test_batch_size: int = 256,
        num_workers: int | None = None,
        seed: int = 0,
        cache: str | Path | None = None,
        path: str | Path | None = None,
        root: str | Path | None = None,
        columns: dict[str, str] | None = None,
        test_share: float = 0.2,
        val_share: float = 0.2,
        split_seed: int = 0,
        shots: int | None = None,
        multi_label: bool = False,
        augment: dict[str, float] | None = None,
        records: str | Path = "data/own",
    ) -> None:
        super().__init__()
        if group not in GROUPS:
            raise UserError(f"dataset.group={group!r}: expected one of {', '.join(GROUPS)}.")
        if (folder is None) == (path is None):
            raise UserError(
                f"dataset.folder={folder}, dataset.path={path}: expected dataset.path=DIR, with a folder of images for "
                f"each class (or a table of paths and labels), or else dataset.folder=DIR of a task with list files."
            )
        if num_classes is None and path is None:
            raise UserError("dataset.num_classes=null: expected the number of classes; labels run from 0 to it less 1.")
        if num_classes is not None:
            _require_at_least("num_classes", num_classes, 2)
        if shots is not None:
            _require_at_least("shots", shots, 1)
        _require_at_least("split_seed", split_seed, 0)
        if not (0 < test_share < 1 and 0 <= val_share < 1 and test_share + val_share < 1):
            raise UserError(
                f"dataset.test_share={test_share}, dataset.val_share={val_share}: expected shares of the images, the "
                f"first above 0, which leave some to train."
            )
        unknown = set(columns or {}) - {"path", "label", "split"}
        if unknown:
            raise UserError(f"dataset.columns: {', '.join(sorted(unknown))}; expected names for path, label and split.")
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
        self.multi_label = multi_label
        if augment is not None:
            check_arguments(Augment, augment, "dataset.augment")
        self.augment = None if augment is None else Augment(**augment)
        self.shots, self.split_seed = shots, split_seed
        self.own: OwnImages | None = None
        if path is not None and not (user_path(path) / f"{test_split}.txt").is_file():
            self.own = OwnImages(
                user_path(path),
                None if root is None else user_path(root),
                Columns(**(columns or {})),
                multi_label,
                test_share,
                val_share,
                split_seed,
            )
        self.folder = user_path(path if folder is None else folder)  # type: ignore[arg-type] # one of the two is given
        if self.own is not None:
            self.folder = self.own.folder_below(user_path(records))
        self._num_classes = num_classes
        self.class_names: tuple[str, ...] | None = None
        self.notes: list[str] = []
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
        self.listings: dict[str, ImageList] = {}
        self._progress: ProgressCallback | None = None

    # Loading

    @property
    def num_classes(self) -> int:
        """The number of classes. If it was not given, it is known once the lists are read (`check`)."""
        if self._num_classes is None:
            raise UserError(f"The classes of {self.name} are not counted: call check() first.")
        return self._num_classes

    def count_classes(self) -> int:
        """The number of classes, without writing anything. Raises UserError."""
        if self._num_classes is None and self.own is not None:
            return len(self.own.read().class_names)
        self._find_classes((self.train_split, self.test_split))
        return self.num_classes

    def lay_out(self) -> None:
        """Makes the task's folder, for tasks that bring their own images; nothing for the others."""
        if self.own is not None:
            lay_out(self.own, self.folder)

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
        self._find_classes((self.train_split, self.test_split))
        self.notes = read_notes(self.folder) if self.own is not None else []
        self.listings = {split: self._checked_list(split) for split in splits}
        if not test_only and self.own is None:  # own images have their notes from when they were split
            self.notes += self._notes_on_splits()
        if self.shots is not None and not test_only:
            self.listings[self.train_split] = self._few(self.listings[self.train_split], self.shots)

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
        if self.train_split not in self.listings:  # a caller that checked first need not wait for it twice
            self.check()
        self._train_set = cached_list(self.listings[self.train_split], preprocessing, self.cache, progress)
        self._test_set = None
        self._progress = progress
        self.preprocessing = preprocessing

    def remedy(self) -> str:
        """Advice on missing or damaged files, with which every error about them ends."""
        if self.name.startswith("vtab/"):
            command = f"`{prepare_command(self.folder.parent)}` (data/README.md has the download by hand)"
            return f"Delete {self.folder} and run {command}." if self.folder.exists() else f"Run {command}."
        if self.own is not None:
            return f"Correct the images in {self.own.path}, or start again: a record of them is made anew."
        return "Lay the task out as data/README.md shows, and point dataset.folder at it."

    def _find_classes(self, splits: Sequence[str]) -> None:
        """Counts the classes where their number was not given, and reads their names where there are some."""
        names = read_classes(self.folder)
        if self._num_classes is None and names is not None:
            self._num_classes = len(names)
        elif self._num_classes is None:
            self._num_classes = self._largest_label(splits) + 1
        if names is not None and len(names) != self._num_classes:
            raise UserError(
                f"{self.folder} names {len(names)} classes in classes.txt: expected {self._num_classes}, one a line."
            )
        self.class_names = names

    def _largest_label(self, splits: Sequence[str]) -> int:
        largest = 1
        for split in splits:
            listing = self._read_list(split, MOST_CLASSES)
            largest = max(largest, *(max(entry.labels, default=entry.label) for entry in listing.entries))
        return largest

    def _read_list(self, split: str, num_classes: int) -> ImageList:
        file = self.folder / f"{split}.txt"
        listing = read_list(file, num_classes, remedy=self.remedy(), several=self.multi_label)
        link = self.folder / "images"
        return replace(listing, images=link.readlink()) if self.own is not None and link.is_symlink() else listing

    def _notes_on_splits(self) -> Iterator[str]:
        """Yields notes on splits that give the accuracy another meaning than users expect."""
        train, test = self.listings[self.train_split].entries, self.listings[self.test_split].entries
        shared = {entry.path for entry in train} & {entry.path for entry in test}
        if shared:
            yield f"{len(shared):,} of the {len(test):,} test images are training images too, such as {min(shared)}."
        trained, tested = (
            {label for e in split for label in e.labels or (e.label,) if label >= 0} for split in (train, test)
        )
        unseen = sorted(tested - trained)
        if unseen:
            names = ", ".join(self.class_name(label) for label in unseen[:5])
            more = " …" if len(unseen) > 5 else ""
            yield f"{len(unseen):,} classes of the test images have no training image: {names}{more}."

    def _few(self, listing: ImageList, shots: int) -> ImageList:
        """Training images such that each class has `shots` of them; says where a class has fewer."""
        few = self._drawn(listing)
        counts = Counter(label for of_image in self._labels(listing) for label in of_image)
        short = [self.class_name(label) for label, count in sorted(counts.items()) if count < shots]
        what = f"; fewer of {', '.join(short[:5])}{' …' if len(short) > 5 else ''}" if short else ""
        self.notes.append(
            f"{len(few):,} of {len(listing):,} training images: {shots} of each class, drawn with seed "
            f"{self.split_seed}{what}."
        )
        return few

    def _drawn(self, listing: ImageList) -> ImageList:
        """Of a list of training images those to train on."""
        if self.shots is None:
            return listing
        return listing.chosen(draw_shots(self._labels(listing), self.shots, self.split_seed))

    def _labels(self, listing: ImageList) -> list[tuple[int, ...]]:
        return [entry.labels if self.multi_label else (entry.label,) for entry in listing.entries]

    def class_name(self, label: int) -> str:
        """The name of a class, or its number where the task has no names."""
        return str(label) if self.class_names is None else self.class_names[label]

    def _checked_list(self, split: str) -> ImageList:
        listing = self._read_list(split, self.num_classes)
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

    # Loaded data

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
    def test_names(self) -> list[str]:
        """Paths of the test images relative to the task's folder, in list order."""
        return [entry.path for entry in self.listings[self.test_split].entries]

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch, the last partial one included."""
        return -(-len(self.train_set) // self.batch_size)

    @functools.cached_property
    def manifest_hash(self) -> str:
        """Fingerprint of the task's files: the manifest's sha256, or `unverified:…` (see manifest.py)."""
        if not self.listings:
            raise UserError(f"The images of {self.name} are not loaded: call load(preprocessing) first.")
        return self.fingerprint()

    def fingerprint(self, *, check_images: bool = False) -> str:
        """As `manifest_hash`, computed anew; `check_images` reads the images instead of trusting the manifest."""
        return manifest_hash(self.folder, self.listings.values(), check_images=check_images)

    def current_fingerprint(self, *, read_images: bool = True) -> str | None:
        """The fingerprint of the present files; None if they are missing.

        read_images: whether to read images whose state is another one than when they were verified.
        """
        try:
            if self.own is not None and not is_recorded(self.own, self.folder):
                return "changed: not recorded" if self.folder.is_dir() else None
        except UserError:  # the images have moved: there is nothing to compare with
            return None
        splits = (self.train_split, self.test_split)
        if not all((self.folder / f"{split}.txt").is_file() for split in splits):
            return None
        train, test = (self._read_list(split, MOST_CLASSES) for split in splits)
        return manifest_hash(self.folder, [self._drawn(train), test], read_images=read_images)

    @functools.cached_property
    def content_hash(self) -> str | None:
        """sha256 over the content of all images of a task that is not verified; reads them, once a process.

        None for a verified task, whose fingerprint says it, and where images are not there.
        """
        splits = (self.train_split, self.test_split)
        if not all((self.folder / f"{split}.txt").is_file() for split in splits):
            return None
        listings = [self._read_list(split, MOST_CLASSES) for split in splits]
        if any(missing_images(listing) for listing in listings):
            return None
        if not manifest_hash(self.folder, listings).startswith(UNVERIFIED):
            return None
        return hashlib.sha256(b"".join(map(images_digest, listings))).hexdigest()

    @functools.cached_property
    def image_format(self) -> str:
        """How the task's images are encoded (see encoding.py): releases of a benchmark differ in it."""
        return encoding_of([listing.path(entry) for listing in self.listings.values() for entry in listing.entries])

    # Batches

    def epoch_order(self, epoch: int) -> Tensor:
        """Order of the training images in `epoch`, int64 [n]; depends on (seed, epoch) alone."""
        return epoch_order(len(self.train_set), self.seed, epoch)

    def train_batch(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """The batch with that number (from 0) in `epoch`: images uint8 [b, 3, H, W], labels int64 [b]."""
        first = number * self.batch_size
        images, labels = self.train_set.batch(self.epoch_order(epoch)[first : first + self.batch_size])
        if self.augment is not None:
            images = self.augment(images, draws_of(len(labels), self.seed, epoch, number))
        return images, labels

    def images_in_batch(self, number: int) -> int:
        """How many images the training batch of that number has; an epoch's last batch may be smaller."""
        return min(self.batch_size, len(self.train_set) - number * self.batch_size)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches; each pass is the epoch that the trainer is in."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return TrainLoader(self.train_set, self.batch_size, self.seed, self._current_epoch, rank, ranks, self.augment)

    def prefetch_test(self) -> None:
        """Starts a process that decodes the test split into the cache, if there is a cache."""
        if self.preprocessing is None or self.cache is None or self._test_set is not None:
            return
        listing = self.listings[self.test_split]
        if is_cacheable(listing, self.preprocessing):
            self._prefetch = Prefetch(listing, self.num_classes, self.preprocessing, self.cache)

    def test_dataloader(self) -> MemoryLoader | DecodingLoader:
        """Batches of the test split in list order."""
        if self.preprocessing is None:
            raise UserError(f"The images of {self.name} are not loaded: call load(preprocessing) first.")
        if self._prefetch is not None:
            self._prefetch.wait(self._progress)
            self._prefetch = None
        listing = self.listings[self.test_split]
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
