"""Drawing the splits of labelled images, class by class, so that few images are enough."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

TRAIN, VAL, TEST = "train", "val", "test"


def draw_splits(
    strata: Sequence[int], contents: Sequence[str], *, test_share: float, val_share: float, seed: int
) -> list[str]:
    """Draws train, val or test for each image.

    Of a class's different images, the share `test_share` (rounded, at least one) is for testing and `val_share` for
    validation, as long as one is left for training. Images of the same content are in the same split. The only image of
    a class is for training.

    Args:
        strata: the class of each image.
        contents: a hash of each image.
        seed: decides the draw, together with the order of the images.
    """
    first: dict[str, int] = {}
    for index, content in enumerate(contents):
        first.setdefault(content, index)
    members: dict[int, list[int]] = {}
    for index in first.values():
        members.setdefault(strata[index], []).append(index)
    chosen: dict[str, str] = {}
    random = np.random.RandomState(seed)  # its stream is frozen for good
    for stratum in sorted(members):
        order = [members[stratum][i] for i in random.permutation(len(members[stratum]))]
        sizes = split_sizes(len(order), test_share, val_share)
        words = [TEST] * sizes[TEST] + [VAL] * sizes[VAL] + [TRAIN] * sizes[TRAIN]
        chosen |= {contents[index]: word for index, word in zip(order, words, strict=True)}
    return [chosen[content] for content in contents]


def split_sizes(images: int, test_share: float, val_share: float) -> dict[str, int]:
    """How many of a class's images each split gets; one is always left to train."""
    test = min(max(1, round(images * test_share)), images - 1) if test_share else 0
    val = min(max(1, round(images * val_share)), images - test - 1) if val_share else 0
    return {TRAIN: images - test - val, VAL: val, TEST: test}


def draw_shots(labels: Sequence[Sequence[int]], shots: int, seed: int) -> list[int]:
    """Draws images such that every class has `shots` of them, or all it has. Returns their indices in rising order.

    Args:
        labels: the classes of each image. With several, an image counts for each of them that still lacks some.
    """
    have: Counter[int] = Counter()
    chosen = []
    for index in np.random.RandomState(seed).permutation(len(labels)).tolist():
        lacking = [label for label in labels[index] if have[label] < shots]
        if lacking:
            chosen.append(index)
            have.update(labels[index])
    return sorted(chosen)


def strata_of(labels: Sequence[Sequence[int]]) -> list[int]:
    """The class by which each image is drawn: its rarest one; -1 for an image without any."""
    counts = Counter(label for of_image in labels for label in of_image)
    return [min(of_image, key=lambda label: (counts[label], label), default=-1) for of_image in labels]
