"""files.csv of own images' record: a line for each image, by which a change of the images is noticed."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.untrusted import read_bytes

INDEX_FILE = "files.csv"
MAX_INDEX_BYTES = 8_000_000_000


@dataclass(frozen=True)
class IndexedFile:
    """One line of files.csv.

    Args:
        labels: the class, or several divided by commas, or `-`.
        split: train, val or test.
        given: the split that its owner gave it, or nothing.
        changed_ns: time of the last change, in nanoseconds since 1970.
    """

    path: str
    labels: str
    split: str
    given: str
    bytes: int
    changed_ns: int
    sha256: str


def read_index(folder: Path) -> list[IndexedFile] | None:
    """The lines of files.csv; None where there is no whole record."""
    try:
        text = read_bytes(folder / INDEX_FILE, max_bytes=MAX_INDEX_BYTES).decode()
        rows = list(csv.reader(io.StringIO(text, newline="")))
        return [_indexed_file(row) for row in rows[1:]]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{folder / INDEX_FILE} is damaged ({error}). Delete {folder}; it is made again.") from None


def _indexed_file(row: Sequence[str]) -> IndexedFile:
    """Raises ValueError for a row that is no line of files.csv."""
    path, labels, split, given, size, changed_ns, sha256 = row
    return IndexedFile(path, labels, split, given, int(size), int(changed_ns), sha256)


def index_text(files: Sequence[IndexedFile]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(field.name for field in fields(IndexedFile))
    writer.writerows(tuple(asdict(file).values()) for file in files)
    return stream.getvalue()


def per_class(files: Sequence[IndexedFile], splits: Sequence[str]) -> Counter[int]:
    return Counter(int(label) for f in files if f.split in splits and f.labels != "-" for label in f.labels.split(","))
