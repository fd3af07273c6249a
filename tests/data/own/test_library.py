"""Data sets of other libraries, all of them on this disk."""

import io
import os

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


def hostile(tmp_path, images, labels, kind, names=("rose", "lily")):
    """A folder of save_to_disk. images: as Arrow holds them, so that a file need not be there."""
    import datasets
    import pyarrow as pa

    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(images, struct), "label": pa.array(labels, type=kind)})
    label = datasets.ClassLabel(names=list(names)) if kind == pa.int64() else datasets.Value(str(kind))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    one = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "label": [None]}, features)
    one.save_to_disk(tmp_path / "theirs")
    (file,) = (tmp_path / "theirs").glob("*.arrow")
    with pa.ipc.new_stream(str(file), table.schema) as stream:  # the library itself would put the files into the table
        stream.write_table(table)
    return task(tmp_path, "hf", tmp_path / "theirs")


def test_a_data_set_that_was_sent_names_no_file_elsewhere_and_no_class_that_it_does_not_have(tmp_path):
    import pyarrow as pa

    image = draw(tmp_path / "a.png", 0, 0).read_bytes()
    (tmp_path / "key").write_text("precious")
    cases = {
        "expected a file of the data set": ([{"path": str(tmp_path / "key")}], [0], pa.int64()),
        "is '../../key'; expected a file of the data set": ([{"path": "../../key"}], [0], pa.int64()),
        "is None; expected a file": ([None], [0], pa.int64()),
        "has the label 7; expected 0 to 1": ([{"bytes": image}], [7], pa.int64()),
        "has the label -2; expected 0 to 1": ([{"bytes": image}], [-2], pa.int64()),
        "has 2,000,001 images; expected at most": ([None] * 2_000_001, [None] * 2_000_001, pa.string()),
    }
    for number, (words, (images, labels, kind)) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        data = hostile(tmp_path / str(number), images, labels, kind)
        with pytest.raises(UserError, match=words):
            data.check()
        assert not data.exported.exists()


@pytest.mark.parametrize("kind", ["a pipe", "too large"])
def test_a_folder_of_a_data_set_holds_plain_files_within_limits(tmp_path, kind):
    folder = tmp_path / "theirs"
    folder.mkdir()
    if kind == "a pipe":
        os.mkfifo(folder / "dataset_info.json")
    else:
        with open(folder / "state.json", "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(UserError, match="pipe" if kind == "a pipe" else "bytes; expected at most"):
        task(tmp_path, "hf", folder).check()


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
    with pytest.raises(UserError, match="LSUN' is no data set of torchvision"):  # it unpickles files of the folder
        task(tmp_path, "torchvision", "LSUN").check()
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
