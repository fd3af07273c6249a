"""The loss and the measures of a classifier, for images with one label or with any number of them.

One label: labels int64 [b]. Several: float32 [b, classes] of 0 and 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over images of the cross entropy, or of the binary cross entropy's mean over classes."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=1).sum()


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of images whose largest logit belongs to their label, or to one of their labels."""
    best = logits.argmax(dim=1)
    if labels.ndim == 1:
        return (best == labels).sum()
    return labels.gather(1, best[:, None]).sum()


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """The mean over classes of the average precision, 0 to 1: precision at each positive, by falling score.

    Images of one score count together, so that their order does not matter. Classes without positives are left out.

    Args:
        scores, labels: [n, classes].
    """
    precisions = [
        _average_precision(scores[:, k], labels[:, k] > 0) for k in range(labels.shape[1]) if labels[:, k].any()
    ]
    return float(torch.stack(precisions).mean()) if precisions else 0.0


def _average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    found = positive[order].double().cumsum(0)
    last = torch.ones(len(order), dtype=torch.bool)  # the last image of each score
    last[:-1] = scores[order].diff() != 0
    found, ranks = found[last], torch.arange(1, len(order) + 1, dtype=torch.float64)[last]
    gained = torch.diff(found, prepend=found.new_zeros(1))
    return (gained * found / ranks).sum() / found[-1]
