"""The digits: laid out like a VTAB task, once, completely, and always the same."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mambapeft_vision.data import DemoDataModule, Preprocessing
from mambapeft_vision.data.generated import digits as demo
from mambapeft_vision.data.generated.digits import lay_out_digits, stratified_splits
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.manifest import read_entry
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.data.tasks import DIGITS, SPLITS
from mambapeft_vision.utils.errors import UserError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demo" / "digits"
    lay_out_digits(folder)
    return folder


def make(folder) -> DemoDataModule:
    return DemoDataModule(name="demo/digits", folder=folder, num_classes=10, group="demo", num_test=797)


def test_the_layout_passes_the_verification_of_vtab_tasks(digits):
    report = verify_task(DIGITS, digits)
    assert report.problems == [] and report.notes == []
    assert report.entry == read_entry(digits.parent, "digits")
    counts = {split: len(read_list(digits / f"{split}.txt", 10, remedy="")) for split in SPLITS}
    assert counts == {"train800": 800, "val200": 200, "train800val200": 1000, "test": 797}


def test_every_image_is_used_once_and_has_its_label(digits):
    images, labels = load_digits(return_X_y=True)
    expected = sorted((tuple(image.astype(int)), int(label)) for image, label in zip(images, labels, strict=True))
    laid_out = []
    for split in ("train800", "val200", "test"):
        for entry in read_list(digits / f"{split}.txt", 10, remedy="").entries:
            pixels = np.asarray(Image.open(digits / entry.path))
            laid_out.append((tuple(np.rint(pixels.ravel() / 255 * 16).astype(int)), entry.label))
    assert sorted(laid_out) == expected


def test_train800val200_is_train800_and_val200(digits):
    def content(split):
        entries = read_list(digits / f"{split}.txt", 10, remedy="").entries
        return [((digits / entry.path).read_bytes(), entry.label) for entry in entries]

    assert content("train800val200") == content("train800") + content("val200")


def test_the_digits_never_change(digits):
    """Results on the demo task can only be compared between machines with the same images in the same splits."""
    assert read_entry(digits.parent, "digits").sha256 == (
        "f7fad9c6a556447fb713f09d9305c8684d988e27d79b83f40a8c03cb551a612f"
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_stratified(seed):
    labels = np.repeat([0, 1, 2], [50, 30, 21])
    parts = stratified_splits(labels, [40, 40, 21], seed)
    assert sorted(np.concatenate(parts)) == list(range(101))
    for part, share in zip(parts, [40 / 101, 40 / 101, 21 / 101], strict=True):
        assert np.all(np.abs(np.bincount(labels[part]) - np.array([50, 30, 21]) * share) <= 1)


def test_splits_differ_by_seed():
    labels = np.zeros(100, dtype=int)
    assert set(stratified_splits(labels, [50, 50], 0)[0]) != set(stratified_splits(labels, [50, 50], 1)[0])


def test_loading_lays_out_what_is_absent_and_leaves_what_is_there(tmp_path, monkeypatch):
    folder = tmp_path / "demo" / "digits"
    preprocessing = Preprocessing((8, 8), "bicubic", (0, 0, 0), (1, 1, 1))
    first = make(folder)
    first.load(preprocessing)
    assert len(first.train_set) == 1000 and sum(len(labels) for _, labels in first.test_dataloader()) == 797
    assert not first.manifest_hash.startswith("unverified:")
    monkeypatch.setattr(demo, "write_digits", None)
    make(folder).load(preprocessing)


def test_a_kill_while_laying_out_leaves_nothing_half_done(tmp_path, monkeypatch):
    folder = tmp_path / "demo" / "digits"

    def killed(temporary):
        (temporary / "images").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_digits", killed)
        with pytest.raises(KeyboardInterrupt):
            lay_out_digits(folder)
    assert list(folder.parent.iterdir()) == []


def test_a_kill_before_the_manifest_is_made_good_the_next_time(digits, tmp_path, monkeypatch):
    folder = tmp_path / "digits"
    digits.rename(folder)
    try:
        lay_out_digits(folder)
        assert read_entry(tmp_path, "digits") == read_entry(digits.parent, "digits")
    finally:
        folder.rename(digits)


def test_of_two_processes_the_second_takes_the_folder_of_the_first(tmp_path, monkeypatch):
    folder = tmp_path / "demo" / "digits"
    write = demo.write_digits

    def overtaken(temporary):
        write(temporary)
        write(folder)

    monkeypatch.setattr(demo, "write_digits", overtaken)
    lay_out_digits(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".digits.verified.json", "digits", "manifest.json"]


def test_damage_says_to_delete_the_folder(tmp_path):
    folder = tmp_path / "digits"
    (folder / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=f"Delete {folder} and start again"):
        make(folder).load(Preprocessing((8, 8), "bicubic", (0, 0, 0), (1, 1, 1)))
