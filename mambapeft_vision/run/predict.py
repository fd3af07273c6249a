"""`mambapeft predict`: the classes of new images by the model of a finished run, as CSV or JSON lines."""

import csv
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from mambapeft_vision.adapter.predict import Prediction, batched, predictions
from mambapeft_vision.data.own.files import is_image, visible_files
from mambapeft_vision.data.preprocessing import decode_image, describe_failure
from mambapeft_vision.run.trained import TrainedModel
from mambapeft_vision.utils.atomic import atomic_path, open_log
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.processes import available_cpus
from mambapeft_vision.utils.progress import ConsoleProgress, ProgressMeter
from mambapeft_vision.utils.text import csv_cell, plain
from mambapeft_vision.utils.untrusted import MAX_TEXT_BYTES, read_lines

CSV, JSON_LINES = FORMATS = ("csv", "jsonl")
_BATCH = {"cuda": 256}  # images; of a batch that does not fit a GPU's memory the halves are taken
_BATCH_ELSEWHERE = 32
_MAX_OUTPUT_BYTES = 2_000_000_000


@dataclass
class Outcome:
    """What became of the images. skipped: unreadable files, each with the reason."""

    predicted: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def find_images(given: Sequence[str]) -> list[Path]:
    """Returns the images that files, folders (searched to any depth) and patterns such as `photos/*.jpg` name.

    Raises: UserError for an argument that names nothing.
    """
    found: dict[Path, None] = {}
    for text in given:
        path = user_path(text)
        if path.is_dir():
            files = [file for file in visible_files(path) if is_image(file)]
        elif path.exists():
            files = [path]
        else:
            files = _matching(path)
        if not files:
            raise UserError(f"images={plain(text)}: no image is there; expected a folder, files or a pattern (*.jpg)")
        found |= dict.fromkeys(files)
    return list(found)


def _matching(pattern: Path) -> list[Path]:
    """The files of a pattern, sorted. `**` stands for folders at any depth, but not for links, which may loop."""
    parts = pattern.parts
    depth = parts.index("**") if "**" in parts else len(parts)
    places = map(Path, glob.glob(str(Path(*parts[:depth])))) if depth else [Path()]
    if depth < len(parts):
        rest = str(Path(*parts[depth:], *(["*"] if parts[-1] == "**" else [])))
        found = [file for place in places for file in place.glob(rest) if not _is_hidden(file.relative_to(place))]
    else:
        found = list(places)
    return sorted({file for file in found if file.is_file()})


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def predict_files(
    trained: TrainedModel,
    files: Sequence[Path],
    write: Callable[[Prediction], None],
    *,
    top: int = 5,
    batch_size: int | None = None,
    quiet: bool = False,
) -> Outcome:
    """Predicts the classes of image files and hands each prediction to `write`, in the order of the files.

    Images that cannot be read are skipped and named on stderr. While a batch is computed, the next one is decoded.
    """
    outcome = Outcome()
    meter = ProgressMeter(len(files), None if quiet else ConsoleProgress("predict", "images"))
    size = batch_size or _BATCH.get(trained.device.type, _BATCH_ELSEWHERE)
    for batch in _decoded(trained, files, size):
        good = [(file, pixels) for file, pixels in batch if isinstance(pixels, np.ndarray)]
        for file, problem in batch:
            if isinstance(problem, str):
                outcome.skipped[str(file)] = problem
                print(f"skipped {plain(file, 1_000)}: {problem}", file=sys.stderr, flush=True)
        if good:
            shares = trained.probabilities([pixels for _, pixels in good])
            for prediction in predictions(trained.model, [str(file) for file, _ in good], shares, top):
                write(prediction)
        outcome.predicted += len(good)
        meter.advance(len(batch))
    return outcome


def watch(
    folder: Path,
    known: set[str],
    handle: Callable[[Sequence[Path]], object],
    *,
    every_s: float,
    sleep: Callable[[float], None] = time.sleep,
    rounds: Iterable[int] | None = None,
) -> None:
    """Hands images that appear in a folder to `handle`, until Ctrl-C. Files still being written are waited for.

    Args:
        known: files that have been handled; more are added.
        sleep, rounds: for tests.
    """
    sizes: dict[str, int] = {}
    for _ in iter(int, 1) if rounds is None else rounds:
        ready = []
        for file in visible_files(folder):
            if str(file) in known or _cell(str(file)) in known:  # as it stands in a table
                continue
            size = file.stat().st_size if file.exists() else -1
            if size > 0 and sizes.get(str(file)) == size and is_image(file):
                ready.append(file)
            sizes[str(file)] = size
        if ready:
            handle(ready)
            known |= {str(file) for file in ready}
        sleep(every_s)


@contextmanager
def output(out: Path | None, *, append: bool = False) -> Iterator[Callable[[Prediction], None]]:
    """A function that writes a prediction: to standard output as CSV, or to a .csv or .jsonl file.

    A file appears when it is whole, unless `append` is asked for.
    """
    if out is None:
        yield _writer(sys.stdout, CSV, header=True)
        return
    kind = format_of(out)
    if append:
        out.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_log(out), "a", encoding="utf-8", newline="") as stream:
            yield _writer(stream, kind, header=os.fstat(stream.fileno()).st_size == 0)
        return
    with atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        yield _writer(stream, kind, header=True)


def format_of(out: Path) -> str:
    """The format of an output by its ending. Raises UserError for any other ending."""
    kind = out.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UserError(f"--out {out}: expected a file that ends in {' or '.join(f'.{kind}' for kind in FORMATS)}")
    return kind


def files_in(out: Path) -> set[str]:
    """Names of the files that an output holds predictions for. Raises UserError for a damaged output."""
    if not out.is_file():
        return set()
    kind = format_of(out)
    try:
        lines = read_lines(out, max_bytes=_MAX_OUTPUT_BYTES, max_line_bytes=MAX_TEXT_BYTES)
        rows = csv.DictReader(lines) if kind == CSV else (json.loads(line) for line in lines if line.strip())
        names = {row["file"] for row in rows}
    except UserError as error:
        raise _damaged(out, plain(error, 1_000)) from None
    except (ValueError, TypeError, KeyError, RecursionError, csv.Error) as error:
        raise _damaged(out, f"{type(error).__name__}: {plain(error)}") from None
    if not all(isinstance(name, str) for name in names):
        raise _damaged(out, "a file's name is no text")
    return names


def _damaged(out: Path, problem: str) -> UserError:
    return UserError(
        f"{plain(out)} is no output of mambapeft predict ({problem}); expected one to append to. Move it away, or "
        "choose another file (--out)"
    )


def _decoded(trained: TrainedModel, files: Sequence[Path], size: int) -> Iterator[list[tuple[Path, np.ndarray | str]]]:
    """Yields batches of files, each file with its pixels or with the reason why it has none."""

    def decode(file: Path) -> tuple[Path, np.ndarray | str]:
        try:
            return file, decode_image(file, trained.preprocessing)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise far more than OSError on damaged files
            return file, describe_failure(error)

    with ThreadPoolExecutor(available_cpus()) as pool:
        waiting = None
        for batch in batched(files, size):
            following = [pool.submit(decode, file) for file in batch]
            if waiting is not None:
                yield [future.result() for future in waiting]
            waiting = following
        if waiting is not None:
            yield [future.result() for future in waiting]


def _writer(stream: TextIO, kind: str, header: bool) -> Callable[[Prediction], None]:
    table = csv.writer(stream, lineterminator="\n")

    def as_csv(prediction: Prediction) -> None:
        top = "|".join(f"{name}:{share:.4f}" for name, share in prediction.top)
        chosen = "|".join(prediction.labels)
        table.writerow([_cell(prediction.name), _cell(chosen), f"{prediction.probability:.6f}", _cell(top)])
        stream.flush()

    def as_json(prediction: Prediction) -> None:
        content = {
            "file": prediction.name,
            "class": prediction.class_name,
            "label": prediction.label,
            "probability": prediction.probability,
            "labels": list(prediction.labels),
            "top": [{"class": name, "probability": share} for name, share in prediction.top],
        }
        line = json.dumps(content, ensure_ascii=False)
        stream.write((line if line.isprintable() else json.dumps(content)) + "\n")  # ASCII has no hidden characters
        stream.flush()

    if kind == CSV and header:
        table.writerow(["file", "class", "probability", "top"])
    return as_csv if kind == CSV else as_json


def _cell(text: str) -> str:
    """A text of any length that no spreadsheet takes for a formula and no terminal for a command."""
    return str(csv_cell(text, longest=len(text)))
