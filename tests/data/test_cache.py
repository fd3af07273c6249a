"""The cache of decoded images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from mambapeft_vision.data import Preprocessing, cache
from mambapeft_vision.data.cache import cached_list, clean, entries
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.images import decode_list
from mambapeft_vision.utils.errors import UserError

PREPROCESSING = Preprocessing((6, 5), "bicubic", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def listing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST", 0)
    random = np.random.RandomState(0)
    for number in range(4):
        Image.fromarray(random.randint(0, 255, (9, 7, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "test.txt").write_text("".join(f"{number}.png {number % 2}\n" for number in range(4)))
    return read_list(tmp_path / "test.txt", 2, remedy="")


def no_decoding(monkeypatch):
    monkeypatch.setattr(cache, "decode_into", None)
    monkeypatch.setattr(cache, "decode_list", None)


def test_cached_images_are_the_decoded_ones_and_are_decoded_once(listing, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    expected = decode_list(listing, PREPROCESSING)
    first = cached_list(listing, PREPROCESSING, folder)
    no_decoding(monkeypatch)
    second = cached_list(listing, PREPROCESSING, folder)
    for found in (first, second):
        assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
        assert found.names == expected.names
    assert len(entries(folder)) == 1 and not list(folder.glob(".*"))


def test_the_key_is_the_content_and_the_preprocessing(listing, tmp_path):
    folder = tmp_path / "cache"
    cached_list(listing, PREPROCESSING, folder)
    os.utime(tmp_path / "0.png")  # touched, but the same
    cached_list(listing, PREPROCESSING, folder)
    assert len(entries(folder)) == 1
    cached_list(listing, Preprocessing((6, 5), "bilinear", (0.5,) * 3, (0.5,) * 3), folder)
    assert len(entries(folder)) == 2
    stat = (tmp_path / "0.png").stat()
    Image.fromarray(np.zeros((9, 7, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    os.utime(tmp_path / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # changed, and looks untouched
    assert not cached_list(listing, PREPROCESSING, folder).images[0].any()
    assert len(entries(folder)) == 3


def test_a_damaged_file_is_made_again(listing, tmp_path):
    folder = tmp_path / "cache"
    expected = cached_list(listing, PREPROCESSING, folder).images.clone()
    ((file, size, _),) = entries(folder)
    for damage in (b"", file.read_bytes()[: size // 2], b"not an array" * 100):
        file.write_bytes(damage)
        assert torch.equal(cached_list(listing, PREPROCESSING, folder).images, expected)


def test_an_error_leaves_nothing_behind(listing, tmp_path):
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"test\.txt:3: .*2\.png: cannot decode"):
        cached_list(listing, PREPROCESSING, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"test\.txt:3: .*2\.png: cannot be read"):
        cached_list(listing, PREPROCESSING, tmp_path / "cache")


@pytest.mark.parametrize("obstacle", ["a file in the way", "no space"])
def test_where_nothing_can_be_kept_images_are_decoded_with_a_warning(listing, tmp_path, monkeypatch, obstacle):
    folder = tmp_path / "cache"
    if obstacle == "no space":
        monkeypatch.setattr(cache, "_SPARE", 1 << 60)
    else:
        folder.write_text("")
    with pytest.warns(UserWarning, match="decoded images are not kept: .*set paths.cache to"):
        found = cached_list(listing, PREPROCESSING, folder)
    assert torch.equal(found.images, decode_list(listing, PREPROCESSING).images)


def test_small_splits_and_no_folder_go_without(listing, tmp_path, monkeypatch):
    assert len(cached_list(listing, PREPROCESSING, None)) == 4
    monkeypatch.setattr(cache, "SMALLEST", 1 << 20)
    cached_list(listing, PREPROCESSING, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_cleaning_deletes_what_was_not_used_for_longest(listing, tmp_path):
    folder = tmp_path / "cache"
    for age, interpolation in enumerate(("bicubic", "bilinear", "nearest")):
        cached_list(listing, Preprocessing((6, 5), interpolation, (0.5,) * 3, (0.5,) * 3), folder)
        newest = max(folder.iterdir(), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (0, 1_000_000 + age))
    order = [file for file, _, _ in entries(folder)]
    cached_list(listing, PREPROCESSING, folder)  # used again: no longer the oldest
    size = order[0].stat().st_size
    assert [file for file, _ in clean(folder, 2 * size)] == [order[1]]
    assert {file for file, _, _ in entries(folder)} == {order[0], order[2]}
    clean(folder, 0)
    assert entries(folder) == [] and clean(tmp_path / "nowhere", 0) == []


def test_changes_in_memory_never_reach_the_file(listing, tmp_path):
    folder = tmp_path / "cache"
    found = cached_list(listing, PREPROCESSING, folder)
    before = found.images.clone()
    found.images.zero_()
    assert torch.equal(cached_list(listing, PREPROCESSING, folder).images, before)
