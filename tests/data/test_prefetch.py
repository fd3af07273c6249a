"""Decoding the test split in another process while the first one trains."""

import multiprocessing

import numpy as np
import pytest
import torch
from helpers.stand_ins import no_decoding
from PIL import Image

from mambapeft_vision.data import Preprocessing, TaskDataModule, manifest
from mambapeft_vision.data.cache import cached_list
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.images import decode_list
from mambapeft_vision.data.prefetch import Prefetch
from mambapeft_vision.utils.errors import UserError

LARGE = Preprocessing((2400, 2400), "bicubic", (0.5,) * 3, (0.5,) * 3)  # two such images are worth caching


@pytest.fixture
def folder(tmp_path):
    random = np.random.RandomState(0)
    for number in range(4):
        Image.fromarray(random.randint(0, 255, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "train800val200.txt").write_text("0.png 0\n")
    (tmp_path / "test.txt").write_text("1.png 1\n2.png 0\n3.png 1\n")
    return tmp_path


def load(folder, cache_folder):
    task = TaskDataModule(name="custom/x", folder=folder, num_classes=2, group="custom", cache=cache_folder)
    task.load(LARGE)
    return task


def prefetching() -> bool:
    return any(process.name == "prefetch" for process in multiprocessing.active_children())


@pytest.mark.slow
def test_the_other_process_decodes_and_this_one_only_opens(folder, tmp_path, monkeypatch):
    task = load(folder, tmp_path / "cache")
    task.prefetch_test()
    assert prefetching()
    expected = decode_list(read_list(folder / "test.txt", 2, remedy=""), LARGE)
    no_decoding(monkeypatch)
    monkeypatch.setattr(manifest, "image_hash", None)  # the other process has read the images, too
    (batch,) = task.test_dataloader()
    assert not prefetching()
    assert torch.equal(batch[0], expected.images) and batch[1].tolist() == [1, 0, 1]


@pytest.mark.slow
def test_each_of_several_processes_decodes_a_part(folder, tmp_path, monkeypatch):
    listing, seen = read_list(folder / "test.txt", 2, remedy=""), []
    prefetch = Prefetch(listing, 2, LARGE, tmp_path / "cache", processes=2)
    prefetch.wait(seen.append)
    no_decoding(monkeypatch)
    expected = decode_list(listing, LARGE)
    assert torch.equal(cached_list(listing, LARGE, tmp_path / "cache").images, expected.images)
    assert all(0 < progress.done < len(listing) for progress in seen)


@pytest.mark.slow
def test_a_damaged_image_is_reported_where_the_images_are_asked_for(folder, tmp_path):
    task = load(folder, tmp_path / "cache")
    (folder / "2.png").write_bytes(b"no image")
    task.prefetch_test()
    with pytest.raises(UserError, match=r"test\.txt:2: .*2\.png: cannot decode the image"):
        task.test_dataloader()


def test_nothing_is_started_without_a_cache(folder):
    task = load(folder, None)
    task.prefetch_test()
    assert not prefetching()
