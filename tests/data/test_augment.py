"""Augmentation of training images: what it does, and that nothing but seed, epoch and place decides it."""

import pytest
import torch

from mambapeft_vision.data import TaskDataModule
from mambapeft_vision.data.augment import Augment, draws_of
from mambapeft_vision.utils.errors import UserError

IMAGES = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
DRAWS = draws_of(6, seed=0, epoch=0, batch=0)


class Trainer:
    """All the data module asks of a trainer."""

    def __init__(self, current_epoch, rank=0, ranks=1):
        self.current_epoch, self.global_rank, self.world_size = current_epoch, rank, ranks


def test_mirroring_is_exact():
    assert torch.equal(Augment(flip=1.0)(IMAGES, DRAWS), IMAGES.flip(3))
    some = Augment(flip=0.5)(IMAGES, DRAWS)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(some, IMAGES, strict=True)]
    assert mirrored == (DRAWS[:, 4] < 0.5).tolist()


def test_a_crop_shows_a_part_and_keeps_a_plain_image():
    plain = torch.full((6, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(Augment(crop=0.2)(plain, DRAWS), plain)
    ramp = torch.arange(0, 256, 32, dtype=torch.uint8).expand(6, 1, 8, 8)
    cropped = Augment(crop=0.2)(ramp, DRAWS).float()
    spread = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    assert (spread < 224).all() and (spread > 0).all()


def test_colour_changes_brightness_and_not_place():
    changed = Augment(colour=0.3)(IMAGES, DRAWS)
    assert not torch.equal(changed, IMAGES) and changed.dtype == torch.uint8
    grey = torch.full((6, 1, 8, 8), 100, dtype=torch.uint8)  # without saturation, and contrast finds nothing
    factors = 1 + 0.3 * (2 * DRAWS[:, 7] - 1)
    assert torch.equal(Augment(colour=0.3)(grey, DRAWS)[:, 0, 0, 0], (100 * factors).round().byte())


def test_the_draws_never_change_and_depend_on_seed_epoch_and_batch():
    assert draws_of(2, 0, 0, 0)[0, :3].tolist() == pytest.approx([0.078962, 0.793152, 0.508701], abs=1e-6)
    assert torch.equal(draws_of(4, 1, 2, 3), draws_of(4, 1, 2, 3))
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not torch.equal(draws_of(4, 1, 2, 3), draws_of(4, *other))


def test_batches_are_the_same_with_ranks_and_when_asked_for_one_by_one(toy_folder, preprocessing):
    data = TaskDataModule(name="custom/toy", path=toy_folder, batch_size=3, augment={"flip": 0.5, "colour": 0.2})
    data.load(preprocessing)
    data.trainer = Trainer(4)
    whole = list(data.train_dataloader())
    assert all(torch.equal(images, data.train_batch(4, n)[0]) for n, (images, _) in enumerate(whole))
    parts = []
    for rank in range(2):
        data.trainer = Trainer(4, rank, 2)
        parts.append([images for images, _ in data.train_dataloader()])
    for n, (images, _) in enumerate(whole):
        assert torch.equal(torch.cat([parts[0][n], parts[1][n]]), images)
    plain = TaskDataModule(name="custom/toy", path=toy_folder, batch_size=3)
    plain.load(preprocessing)
    plain.trainer = Trainer(4)
    assert not torch.equal(next(iter(plain.train_dataloader()))[0], whole[0][0])


@pytest.mark.parametrize("wrong", [{"flip": 2.0}, {"crop": 0.0}, {"colour": 1.0}, {"rotate": 1.0}, {"flip": "yes"}])
def test_changes_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UserError, match=r"dataset\.augment"):
        TaskDataModule(name="custom/toy", path="nowhere", augment=wrong)
