"""Data sets of other libraries as tasks: Hugging Face `datasets` and torchvision.

The images are exported once, below `records`: as the files that the library holds, or else as PNG. The table of their
labels is then a task like any own images: splits that the data set has stay, others are drawn.
"""

import csv
import hashlib
import inspect
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mambapeft_vision.data.module import TaskDataModule
from mambapeft_vision.data.own.files import known_suffix
from mambapeft_vision.data.own.source import split_word
from mambapeft_vision.data.preprocessing import MAX_IMAGE_BYTES
from mambapeft_vision.utils.atomic import atomic_folder
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.lock import one_at_a_time
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.progress import ConsoleProgress, ProgressMeter
from mambapeft_vision.utils.text import plain, shown
from mambapeft_vision.utils.typed import check_arguments, nearest
from mambapeft_vision.utils.untrusted import MAX_LINES, MAX_TEXT_BYTES, files_below, open_plain, read_bytes

HF, TORCHVISION = LIBRARIES = ("hf", "torchvision")
TABLE = "labels.csv"
_UNPICKLES = ("LSUN", "LSUNClass")  # what lies in the current folder
_MAX_TABLE_BYTES = 100_000_000_000  # mapped, not read; far beyond any data set that is copied as a task
_SPLITS = ("train", "val", "valid", "validation", "test")


class Item(NamedTuple):
    """An image as encoded bytes, the name of its class, and its split ("" where the data set has none)."""

    content: bytes
    label: str
    split: str


class LibraryDataModule(TaskDataModule):
    """A data set of another library.

    Args:
        library: hf or torchvision.
        source: the data set's name there; of hf also a folder that `save_to_disk` wrote.
        config: for hf, the name of a configuration of the data set.
        image_column, label_column: for hf, needed if several columns could be meant.
        download: for torchvision, whether it may download the data set (hf always may).
        records: the images are exported below it.
    """

    def __init__(
        self,
        *,
        library: str,
        source: str,
        config: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        download: bool = False,
        records: str | Path = "data/own",
        **arguments: Any,
    ) -> None:
        if library not in LIBRARIES:
            raise UserError(f"dataset.library={library!r}; expected one of {', '.join(LIBRARIES)}")
        if arguments.get("path") is not None or arguments.get("folder") is not None:
            raise UserError("dataset.path and dataset.folder: a data set of a library has none; leave them out")
        check_arguments(TaskDataModule, arguments, "dataset")
        words = [library, source, config, image_column, label_column]
        digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]
        name = "".join(c if c.isalnum() else "-" for c in Path(source).name)[:40]
        self.exported = user_path(records) / f"{name}-{digest}-files"
        super().__init__(**{**arguments, "folder": None, "path": self.exported / TABLE, "records": records})
        self._library, self._source, self._download = library, source, download
        self._config, self._columns = config, (image_column, label_column)
        self._downloads = user_path(records).parent / "downloads"

    def lay_out(self) -> None:
        """Exports the images where they are not yet, then draws and records the splits. Raises UserError."""
        self.exported.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(self.exported):
            if not self.exported.exists():
                with atomic_folder(self.exported) as temporary:
                    export(self._items(), temporary, self.name)
        super().lay_out()

    def count_classes(self) -> int:
        if self._num_classes is None and not self.exported.exists():
            raise UserError(
                f"the classes of {plain(self._source)} are not known before its images are there; expected "
                f"dataset.num_classes=N, or a run without dry_run"
            )
        return super().count_classes()

    def _items(self) -> Iterator[Item]:
        if self._library == HF:
            return hub_items(self._source, self._config, *self._columns)
        return torchvision_items(self._source, self._downloads, self._download)


def export(items: Iterator[Item], folder: Path, name: str) -> None:
    """Writes images and the table of their labels."""
    meter = ProgressMeter(None, ConsoleProgress(f"export {name}", "images"))
    splits = set()
    with open(folder / TABLE, "w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        rows = []
        for number, item in enumerate(items):
            path = f"images/{number // 10_000:04}/{number:08}{known_suffix(item.content) or '.img'}"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(item.content)
            rows.append((path, item.label, item.split))
            splits.add(item.split)
            meter.advance()
        has_splits = len(splits) > 1 and "" not in splits
        table.writerow(("path", "label", "split")[: 3 if has_splits else 2])
        table.writerows(row[: 3 if has_splits else 2] for row in rows)


def hub_items(source: str, config: str | None, image_column: str | None, label_column: str | None) -> Iterator[Item]:
    """The images of a data set of Hugging Face: a folder that `save_to_disk` wrote, or a name on the hub."""
    try:
        import datasets
    except ImportError:
        raise UserError("dataset=hf needs the package datasets. Install it: pip install datasets") from None
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(source) if Path(source).is_dir() else None
    if folder is not None:
        _check_files(folder)
    try:
        found = datasets.load_dataset(source, config) if folder is None else datasets.load_from_disk(source)
    except Exception as error:  # network, hub and file formats each raise their own classes
        raise UserError(
            f"dataset.source={shown(source)}: {type(error).__name__}: {plain(error, 500)}. Expected the name of a data "
            f"set on the hub, or a folder that save_to_disk wrote"
        ) from error
    parts = dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}
    first = next(iter(parts.values()))
    image = _column(first.features, image_column, datasets.Image, "image", ("image", "img", "picture"))
    label = _column(
        first.features, label_column, datasets.ClassLabel, "label", ("label", "labels", "class", "fine_label")
    )
    names = None
    if isinstance(first.features[label], datasets.ClassLabel):
        names = told_apart(first.features[label].names)
    elif not isinstance(first.features[label], datasets.Value):  # sounds, say, which would be decoded
        raise UserError(f"dataset.label_column={shown(label)} holds no labels; expected classes, texts or numbers")
    used = {name: part for name, part in parts.items() if name.lower() in _SPLITS} or parts
    images = sum(map(len, used.values()))
    if images > MAX_LINES:
        raise UserError(
            f"{shown(source)} has {images:,} images; expected at most {MAX_LINES:,}. Choose another data set"
        )
    places = [folder] if folder is not None else [datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    for name, part in used.items():
        split = split_word(name, source) if name.lower() in _SPLITS else ""
        rows = iter(part.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)))
        for number in range(len(part)):
            try:
                row = next(rows)
            except Exception as error:  # of Arrow's, on files that are damaged
                raise UserError(
                    f"{shown(source)}: image {number} cannot be read ({plain(error)}). Get it again"
                ) from error
            if row[label] is None or row[label] == -1:  # test images with secret labels
                continue
            where = f"{shown(source)}: image {number}"
            yield Item(_content(row[image], places, where), _named(row[label], names, where), split)


def _check_files(folder: Path) -> None:
    """Raises UserError for a folder of `save_to_disk` with a file that the library would wait for, or be filled by."""
    for file in files_below(folder):
        open_plain(
            file, max_bytes=MAX_TEXT_BYTES if file.suffix == ".json" else _MAX_TABLE_BYTES, follow_links=True
        ).close()


def _content(image: Any, places: Sequence[str | Path], where: str) -> bytes:
    """The file of an image: in the table itself, or below one of `places`. Raises UserError."""
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if content:
        if len(content) > MAX_IMAGE_BYTES:
            raise UserError(f"{where} has {len(content):,} bytes; expected at most {MAX_IMAGE_BYTES:,}")
        return bytes(content)
    full = os.path.abspath(os.path.join(places[0], path or ""))
    if not path or not any(Path(full).is_relative_to(os.path.abspath(place)) for place in places):
        raise UserError(f"{where} is {shown(path)}; expected a file of the data set. Choose another data set")
    try:
        return read_bytes(full, max_bytes=MAX_IMAGE_BYTES, follow_links=True)
    except OSError as error:
        raise UserError(f"{where}: {plain(full, 1_000)} cannot be read ({error.strerror}). Get it again") from error


def _named(label: Any, names: Sequence[str] | None, where: str) -> str:
    if names is None:
        return str(label)
    if not isinstance(label, int) or not 0 <= label < len(names):
        raise UserError(
            f"{where} has the label {shown(label)}; expected 0 to {len(names) - 1}. Choose another data set"
        )
    return names[label]


def torchvision_items(source: str, root: Path, download: bool) -> Iterator[Item]:
    """The images of a data set of torchvision, whose parts are its splits."""
    import torchvision.datasets

    known = {
        name: kind
        for name, kind in vars(torchvision.datasets).items()
        if inspect.isclass(kind) and issubclass(kind, torchvision.datasets.VisionDataset) and name not in _UNPICKLES
    }
    if source not in known:
        raise UserError(f"dataset.source={shown(source)} is no data set of torchvision; {nearest(source, known)}")
    kind: Callable[..., Any] = known[source]
    parameters = inspect.signature(kind).parameters
    choices: list[tuple[str, dict[str, Any]]] = [("", {})]
    if "train" in parameters:
        choices = [("train", {"train": True}), ("test", {"train": False})]
    elif "split" in parameters:
        choices = [(split, {"split": split}) for split in ("train", "val", "test")]
    common: dict[str, Any] = {"root": str(root)} if "root" in parameters else {}
    if download and "download" in parameters:
        common["download"] = True
    missing = []
    for split, arguments in choices:
        try:
            part = kind(**common, **arguments)
        except ValueError as error:  # a split that it does not have
            missing.append(error)
            continue
        except (RuntimeError, OSError, ImportError) as error:
            raise UserError(
                f"torchvision's {source} is not available: {plain(error, 500)}. Set dataset.download=true, or put its "
                f"files in {root}"
            ) from error
        names = getattr(part, "classes", None)
        names = told_apart(names) if isinstance(names, (list, tuple)) else None
        for index in range(len(part)):
            where = f"torchvision's {source}: image {index}"
            try:
                image, label = part[index]
            except MemoryError:
                raise
            except Exception as error:  # Pillow's readers raise far more than OSError on damaged files
                raise UserError(f"{where} cannot be read ({plain(error)}). Get it again") from error
            if not isinstance(image, Image.Image) or not isinstance(label, int):
                raise UserError(f"torchvision's {source} has other labels than one class an image; choose another")
            yield Item(_png(image), _named(label, names, where), split)
    if len(missing) == len(choices):
        raise UserError(f"torchvision's {source} has none of the splits train, val and test: {plain(missing[0], 500)}")


def _column(features: Any, given: str | None, kind: type, what: str, usual: tuple[str, ...]) -> str:
    """The column of images or labels: as given, by its usual name, or the only one of its kind."""
    if given is not None:
        if given not in features:
            raise UserError(f"dataset.{what}_column={shown(given)}: {nearest(given, features)}")
        return given
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    by_name = [name for name in usual if name in (of_kind or features)]
    if by_name or len(of_kind) == 1:
        return (by_name or of_kind)[0]
    raise UserError(
        f"the data set has the columns {shown(list(features))}; expected one {what} column. Give "
        f"dataset.{what}_column=NAME"
    )


def told_apart(names: Any) -> list[str]:
    """Class names, told apart by their number where two are the same."""
    texts = [" ".join(str(name).split()) for name in names]
    counts = Counter(texts)
    return [text if counts[text] == 1 and text else f"{text} ({number})".strip() for number, text in enumerate(texts)]


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
