"""Data sets of other libraries, all of them on this disk."""

import io

import pytest
from helpers.own_images import draw, tree
from PIL import Image

from mambapeft_vision.data.own.library import LibraryDataModule, told_apart
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.utils.errors import UserError

PREPROCESSING = Preprocessing((8, 8), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def task(tmp_path, library, source, **more) -> LibraryDataModule:
    return LibraryDataModule(
        name="custom/lib", library=library, source=str(source), records=tmp_path / "data" / "own", **more
    )


def counts(data: LibraryDataModule) -> dict[str, int]:
    return {split: len((data.folder / f"{split}.txt").read_text().splitlines()) for split in ("train800val200", "test")}


def test_a_data_set_of_hugging_face_on_this_disk_is_a_task(tmp_path):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["rose", "lily"])})
    parts = {}
    for split, each in {"train": 5, "test": 2}.items():
        rows = [(draw(tmp_path / split / f"{k}{n}.png", k, n), k) for k in range(2) for n in range(each)]
        columns = {"img": [str(path) for path, _ in rows], "fine_label": [label for _, label in rows]}
        parts[split] = datasets.Dataset.from_dict(columns, features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "flowers")
    data = task(tmp_path, "hf", tmp_path / "flowers")
    with pytest.raises(UserError, match=r"dataset\.num_classes=N"):
        data.count_classes()  # writes nothing
    data.load(PREPROCESSING)
    assert data.count_classes() == 2
    assert data.class_names == ("lily", "rose") and counts(data) == {"train800val200": 10, "test": 4}
    exported = (data.exported / "images" / "0000" / "00000000.png").read_bytes()
    assert exported == (tmp_path / "train" / "00.png").read_bytes()  # the bytes that were given
    again = task(tmp_path, "hf", tmp_path / "flowers")
    again.check()
    assert again.manifest_hash == data.manifest_hash
    with pytest.raises(UserError, match=r"label_column='x'.*fine_label"):
        task(tmp_path, "hf", tmp_path / "flowers", label_column="x").check()


def test_what_the_hub_library_cannot_load_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"dataset\.source=.*save_to_disk"):
        task(tmp_path, "hf", tmp_path / "empty").check()
    assert not list((tmp_path / "data" / "own").glob("*-files"))


def test_a_data_set_of_torchvision_is_a_task(tmp_path, monkeypatch):
    import torchvision.datasets

    class Pairs(torchvision.datasets.VisionDataset):
        classes = ("crane", "crane", "egret")

        def __init__(self, root, split="train", download=False):
            if split == "val":
                raise ValueError("no such split")
            super().__init__(root)
            self.each = 4 if split == "train" else 1

        def __len__(self):
            return 3 * self.each

        def __getitem__(self, index):
            file = draw(tmp_path / "drawn.png", index % 3, index + 100 * self.each)
            return Image.open(io.BytesIO(file.read_bytes())), index % 3

    monkeypatch.setattr(torchvision.datasets, "Pairs", Pairs, raising=False)
    data = task(tmp_path, "torchvision", "Pairs")
    data.load(PREPROCESSING)
    assert data.class_names == ("crane (0)", "crane (1)", "egret") and counts(data) == {"train800val200": 12, "test": 3}


def test_a_tree_of_torchvision_without_splits_is_drawn(tmp_path):
    tree(tmp_path / "data" / "downloads", {"a": 4, "b": 4})
    data = task(tmp_path, "torchvision", "ImageFolder")
    data.check()
    assert data.class_names == ("a", "b") and counts(data) == {"train800val200": 6, "test": 2}


@pytest.mark.parametrize(
    ("source", "said"), [("CIFAR11", "did you mean CIFAR10"), ("CIFAR10", r"dataset\.download=true")]
)
def test_what_torchvision_does_not_have_is_said(source, said, tmp_path):
    with pytest.raises(UserError, match=said):
        task(tmp_path, "torchvision", source).check()


def test_names_of_classes_are_told_apart():
    assert told_apart(["a", "b", "a", ""]) == ["a (0)", "b", "a (2)", "(3)"]
