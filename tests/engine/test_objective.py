"""Losses and measures of images with one label and with several."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from mambapeft_vision.engine.objective import mean_average_precision, right_answers, summed_loss
from mambapeft_vision.engine.predict import most_probable

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2])
SEVERAL = (torch.rand(7, 4, generator=torch.Generator().manual_seed(1)) < 0.4).float()


def test_one_label_is_cross_entropy():
    assert torch.equal(summed_loss(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS, reduction="sum"))
    assert right_answers(LOGITS, LABELS) == (LOGITS.argmax(dim=1) == LABELS).sum()


def test_several_labels_are_binary_cross_entropy_averaged_over_classes():
    loss = summed_loss(LOGITS, SEVERAL) / len(LOGITS)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(LOGITS, SEVERAL).item())
    assert right_answers(LOGITS, SEVERAL) == sum(SEVERAL[row, best] for row, best in enumerate(LOGITS.argmax(dim=1)))


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_scikit_learns_with_equal_scores_too(seed):
    random = np.random.RandomState(seed)
    scores, labels = random.randint(0, 6, (30, 3)) / 6, random.randint(0, 2, (30, 3))
    expected = average_precision_score(labels, scores, average="macro")
    found = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(labels))
    assert found == pytest.approx(expected, abs=1e-12)


def test_classes_without_positives_are_left_out():
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert mean_average_precision(torch.tensor([[0.9, 0.1], [0.1, 0.8]]), labels) == 1.0
    assert mean_average_precision(torch.zeros(2, 2), torch.zeros(2, 2)) == 0.0


def test_of_equal_logits_the_first_class_is_the_most_probable():
    classes, probabilities = most_probable(torch.zeros(2, 9), several=False, top=5)
    assert classes.tolist() == [[0, 1, 2, 3, 4]] * 2 and torch.allclose(probabilities, torch.full((2, 5), 1 / 9))
    classes, probabilities = most_probable(torch.zeros(1, 9), several=True)
    assert classes.shape == (1, 9) and torch.allclose(probabilities, torch.full((1, 9), 0.5))
