"""Random splits of labelled images."""

import numpy as np


def stratified_splits(labels: np.ndarray, sizes: list[int], seed: int) -> list[np.ndarray]:
    """Splits indices at random into parts of the given sizes, each class in proportion (within one image).

    Args:
        labels: int [n].
        sizes: sizes of the parts, n in total.

    Returns:
        One int64 array of indices for each size.
    """
    # RandomState's stream is frozen for good, Generator's is not.
    order = np.random.RandomState(seed).permutation(len(labels))
    # Each image's place among the shuffled images of its own class, as a share of it: (i + 1/2) / class size.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    # Sorted by place the classes are evenly interleaved, so any stretch of the sequence is stratified.
    interleaved = order[np.argsort(place[order], kind="stable")]
    return np.split(interleaved, np.cumsum(sizes)[:-1])
