"""Batches of (images uint8 [b, C, H, W], labels int64 [b] or float32 [b, classes]), ordered by seed and epoch alone."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mambapeft_vision.data.augment import Augment, draws_of
from mambapeft_vision.data.image_list import ImageList
from mambapeft_vision.data.images import ImageSet, decode_entry
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.utils.errors import UserError

Batch = tuple[Tensor, Tensor]


def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order in which `epoch` visits the images: a permutation, int64 [num_images].

    It depends on (seed, epoch) alone, so a resumed run sees what an uninterrupted one would have seen.
    """
    digest = hashlib.sha256(f"epoch order, seed {seed}, epoch {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_images, generator=generator)


class TrainLoader:
    """Shuffled batches of a set in memory, the last partial one included.

    Every `iter()` is one epoch; its number is asked of `current_epoch` when the first batch is drawn.
    With several ranks each hands out its part of every batch (of a very small last one perhaps nothing).
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        current_epoch: Callable[[], int],
        rank: int = 0,
        ranks: int = 1,
        augment: Augment | None = None,
    ) -> None:
        self._set = images
        self._batch_size = batch_size
        self._seed = seed
        self._current_epoch = current_epoch
        self._rank, self._ranks = rank, ranks
        self._augment = augment

    def __len__(self) -> int:
        return -(-len(self._set) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._current_epoch()
        order = epoch_order(len(self._set), self._seed, epoch).to(self._set.labels.device)
        for number, chunk in enumerate(order.split(self._batch_size)):
            images, labels = self._set.batch(chunk.tensor_split(self._ranks)[self._rank])
            if self._augment is not None:
                draws = draws_of(len(chunk), self._seed, epoch, number)
                images = self._augment(images, draws.tensor_split(self._ranks)[self._rank])
            yield images, labels


class MemoryLoader:
    """Batches of a set in memory, in list order."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        self._set = images
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._set) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        yield from zip(self._set.images.split(self._batch_size), self._set.labels.split(self._batch_size), strict=True)


class DecodingLoader:
    """Batches of a list in list order, decoded in worker processes.

    Workers hand over whole batches as numpy arrays through a pipe. Tensors would go through shared memory,
    where two batches of 256 images already overflow the 64 MB that a container gets by default.
    """

    def __init__(self, listing: ImageList, preprocessing: Preprocessing, batch_size: int, num_workers: int) -> None:
        self._batches: DataLoader[Any] = DataLoader(
            _DecodedBatches(listing, preprocessing, batch_size),
            batch_size=None,
            shuffle=False,
            num_workers=num_workers,
            collate_fn=_unchanged,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for item in self._batches:
            if isinstance(item, UserError):
                raise item
            images, labels = item
            yield torch.from_numpy(images), torch.from_numpy(labels)


class _DecodedBatches(Dataset[Any]):
    """Item k is batch k: numpy (uint8 [b, C, H, W], int64 [b]).

    An image that cannot be decoded gives its UserError as the item: an exception raised in a worker would
    reach the user wrapped in the worker's traceback.
    """

    def __init__(self, listing: ImageList, preprocessing: Preprocessing, batch_size: int) -> None:
        self._listing = listing
        self._preprocessing = preprocessing
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._listing) // self._batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray] | UserError:
        first = index * self._batch_size
        entries = self._listing.entries[first : first + self._batch_size]
        try:
            images = [decode_entry(self._listing, entry, self._preprocessing) for entry in entries]
        except UserError as error:
            return error
        labels = self._listing.chosen(range(first, first + len(entries))).labels()
        return np.stack(images), labels.numpy()


def _unchanged(item: Any) -> Any:
    return item
