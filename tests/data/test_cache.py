"""The cache of decoded images."""

import os

import numpy as np
import pytest
import torch
from helpers.stand_ins import no_decoding
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


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "no array": lambda content: b"not an array" * 100,
    "a bit of the header": lambda content: flipped(content, 60),
    "a bit of a pixel": lambda content: flipped(content, 200),
    "a bit of the checksum": lambda content: flipped(content, -1 % len(content)),
    "zeros at the end": lambda content: content[: -len(content) // 3] + bytes(len(content) // 3),
    "more behind it": lambda content: content + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_made_again(listing, tmp_path, damage):
    """In the next process; in this one the file has been compared."""
    folder = tmp_path / "cache"
    expected = cached_list(listing, PREPROCESSING, folder).images.clone()
    ((file, _, _),) = entries(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    cache.verified.clear()
    with pytest.warns(UserWarning, match=rf"{file.name} was damaged; its images are decoded again"):
        assert torch.equal(cached_list(listing, PREPROCESSING, folder).images, expected)
    assert file.read_bytes() == whole


def test_a_file_is_compared_once_a_process(listing, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    cached_list(listing, PREPROCESSING, folder)
    monkeypatch.setattr(cache, "checksum", lambda *_: pytest.fail("read again"))
    cached_list(listing, PREPROCESSING, folder)
    cache.verified.clear()
    with pytest.raises(pytest.fail.Exception):
        cached_list(listing, PREPROCESSING, folder)


def test_a_link_in_the_cache_is_not_followed(listing, tmp_path):
    folder = tmp_path / "cache"
    expected = cached_list(listing, PREPROCESSING, folder).images.clone()
    ((file, _, _),) = entries(folder)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(cached_list(listing, PREPROCESSING, folder).images, expected)
    assert (tmp_path / "elsewhere").exists() and not file.is_symlink()


def test_the_file_is_an_array_of_numpy(listing, tmp_path):
    images = cached_list(listing, PREPROCESSING, tmp_path / "cache").images
    ((file, _, _),) = entries(tmp_path / "cache")
    assert np.array_equal(np.load(file), images.numpy())


def test_cleaning_deletes_nothing_of_others(tmp_path):
    ours, others = ".0123abcd.images.npy.part", (".ubuntu.iso.part", ".x.npy.part", "0123.images.npy.part")
    for name in (ours, *others):
        (tmp_path / name).write_text("x")
    clean(tmp_path, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)


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
        monkeypatch.setattr(cache, "SPARE", 1 << 60)
    else:
        folder.write_text("")
    with pytest.warns(UserWarning, match="decoded images are not kept: .*set paths.cache to"):
        found = cached_list(listing, PREPROCESSING, folder)
    assert torch.equal(found.images, decode_list(listing, PREPROCESSING).images)
    with pytest.raises(UserError, match=r"set paths\.cache to"):
        cached_list(listing, PREPROCESSING, folder, must_keep=True)


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
