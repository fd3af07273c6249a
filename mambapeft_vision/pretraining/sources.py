"""The images of pretraining: decoded once, at the backbone's input size, and kept in memory as uint8."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambapeft_vision.data.prepare.importer import LabelledImages, read_labelled
from mambapeft_vision.data.preprocessing import Preprocessing, decode_image, describe_failure
from mambapeft_vision.pretraining.config import SourceConfig
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.hashing import sha256_file
from mambapeft_vision.utils.processes import available_cpus
from mambapeft_vision.utils.progress import ConsoleProgress, ProgressMeter

_CHUNK = 256  # images handed to a worker process at once
_HELD_OUT_SPLITS = ("test", "val")


@dataclass(frozen=True)
class Source:
    """One decoded source.

    Args:
        images: uint8 [n, 3, H, W].
        labels: int64 [n].
        train, held_out: int64, indices of the images for training and for validation.
        sha256: see `fingerprint`.
    """

    name: str
    config: SourceConfig
    images: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor
    class_names: tuple[str, ...]
    sha256: str

    def to(self, device: torch.device) -> Source:
        moved = {key: getattr(self, key).to(device) for key in ("images", "labels", "train", "held_out")}
        return Source(**{**self.__dict__, **moved})


def load_source(
    name: str, config: SourceConfig, preprocessing: Preprocessing, seed: int, workers: int | None = None
) -> Source:
    """Reads, decodes and splits one source. Raises UserError."""
    labelled = read_labelled(config.path)
    train, held_out = split_source(labelled, config, seed)
    if not len(train) or not len(held_out):
        raise UserError(
            f"sources.{name}: {len(train)} images to train on and {len(held_out)} held out; expected some of both. "
            f"Correct sources.{name}.holdout={config.holdout}."
        )
    images = decode_all(
        labelled, preprocessing, workers or available_cpus(), ConsoleProgress(f"decode {name}", "images")
    )
    return Source(
        name,
        config,
        torch.from_numpy(images),
        torch.from_numpy(labelled.labels),
        torch.from_numpy(train),
        torch.from_numpy(held_out),
        labelled.class_names,
        fingerprint(labelled),
    )


def split_source(labelled: LabelledImages, config: SourceConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of held-out images: as the source marks them, else whole groups at random."""
    if labelled.splits is not None:
        marked = np.isin(labelled.splits, _HELD_OUT_SPLITS)
        if marked.any():
            return np.flatnonzero(~marked), np.flatnonzero(marked)
    groups = np.arange(len(labelled)) // config.group
    number = groups[-1] + 1
    chosen = np.random.RandomState(seed).permutation(number)[: round(config.holdout * number)]
    held_out = np.isin(groups, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def decode_all(
    labelled: LabelledImages, preprocessing: Preprocessing, workers: int, progress: ConsoleProgress | None = None
) -> np.ndarray:
    """All images, uint8 [n, 3, H, W], decoded by `workers` processes.

    Call it before CUDA is first used: a process that holds a CUDA context must not fork.
    """
    images = np.empty((len(labelled), 3, *preprocessing.size), dtype=np.uint8)
    meter = ProgressMeter(len(labelled), progress)
    starts = range(0, len(labelled), _CHUNK)
    chunks = ([labelled.read(i) for i in range(s, min(s + _CHUNK, len(labelled)))] for s in starts)
    work = (chunks, itertools.repeat(preprocessing), itertools.repeat(labelled.source), starts)
    if workers == 1:
        _collect(map(_decode_chunk, *work), images, meter)
    else:
        with ProcessPoolExecutor(workers) as pool:
            _collect(pool.map(_decode_chunk, *work), images, meter)
    return images


def fingerprint(labelled: LabelledImages) -> str:
    """sha256 of an npz file's bytes; of a tree, over each image's label and content hash."""
    if labelled.source.is_file():
        return sha256_file(labelled.source)
    lines = (f"{label} {hashlib.sha256(labelled.read(i)).hexdigest()}\n" for i, label in enumerate(labelled.labels))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _collect(decoded: Iterable[np.ndarray], images: np.ndarray, meter: ProgressMeter) -> None:
    done = 0
    for chunk in decoded:
        images[done : done + len(chunk)] = chunk
        done += len(chunk)
        meter.advance(len(chunk))


def _decode_chunk(contents: list[bytes], preprocessing: Preprocessing, source: Path, start: int) -> np.ndarray:
    decoded = []
    for number, content in enumerate(contents, start=start):
        try:
            decoded.append(decode_image(content, preprocessing))
        except Exception as error:  # Pillow's readers raise far more than OSError on damaged files
            raise UserError(
                f"{source}: image number {number} cannot be decoded ({describe_failure(error)}). "
                "Remove it, or get the data again."
            ) from error
    return np.stack(decoded)
