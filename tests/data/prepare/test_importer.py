"""The importer: npz files and class-per-folder trees become checked tasks, or an error that says why not."""

import io

import numpy as np
import pytest
from PIL import Image

from mambapeft_vision.data import Preprocessing, TaskDataModule
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.manifest import read_entry
from mambapeft_vision.data.prepare.importer import import_task, read_labelled
from mambapeft_vision.utils.errors import UserError


def encode(grey, form="PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), grey % 256).save(stream, form)
    return stream.getvalue()


def write_npz(file, labels, splits=None, /, forms=("PNG",), **changed):
    contents = [encode(i, forms[i % len(forms)]) for i in range(len(labels))]
    arrays = {
        "blob": np.frombuffer(b"".join(contents), np.uint8),
        "offsets": np.cumsum([0, *map(len, contents)]),
        "labels": np.array(labels),
        "class_names": np.array([f"class {i}" for i in range(max(labels) + 1)]),
    }
    if splits is not None:
        arrays["split"] = np.array(splits)
    arrays |= changed
    np.savez(file, **{key: value for key, value in arrays.items() if value is not None})
    return file


def test_marked_splits_are_kept_and_so_is_every_byte(tmp_path):
    splits = ["val200", "train800", "test", "train800", "test", "test"]
    file = write_npz(tmp_path / "toy.npz", [0, 1, 2, 0, 1, 2], splits, forms=("PNG", "JPEG", "WEBP"))
    report = import_task(file, "toy", tmp_path / "out", group="natural")
    folder = tmp_path / "out" / "toy"
    lists = {
        split: read_list(folder / f"{split}.txt", 3, remedy="").entries for split in ("train800", "val200", "test")
    }
    assert {split: [e.label for e in found] for split, found in lists.items()} == {
        "train800": [1, 0],
        "val200": [0],
        "test": [2, 1, 2],
    }
    labelled = read_labelled(file)
    test = [(folder / entry.path).read_bytes() for entry in lists["test"]]
    assert test == [labelled.read(i) for i in (2, 4, 5)]
    assert [entry.path.rpartition(".")[2] for entry in lists["test"]] == ["webp", "jpg", "webp"]
    assert read_entry(tmp_path / "out", "toy") == report.entry

    data = TaskDataModule(name="mini/toy", folder=folder, num_classes=3, group="natural")
    data.load(Preprocessing((4, 4), "bicubic", (0, 0, 0), (1, 1, 1)))
    assert data.train_set.labels.tolist() == [1, 0, 0] and data.manifest_hash == report.entry.sha256


def test_splits_are_drawn_in_proportion_and_the_same_again(tmp_path):
    labels = np.arange(1300) % 4
    file = write_npz(tmp_path / "toy.npz", labels)
    first = import_task(file, "a", tmp_path / "out", max_test=100)
    again = import_task(file, "b", tmp_path / "out", max_test=100)
    other = import_task(file, "c", tmp_path / "out", max_test=100, seed=1)
    assert first.entry.sha256 == again.entry.sha256 != other.entry.sha256
    assert (first.task.num_train, first.task.num_val, first.task.num_test) == (800, 200, 100)
    train = read_list(tmp_path / "out" / "a" / "train800.txt", 4, remedy="").labels()
    assert np.bincount(train).tolist() == [200] * 4


def test_images_marked_test_are_never_trained_on(tmp_path):
    labels = [0, 1] * 550
    file = write_npz(tmp_path / "toy.npz", labels, ["train"] * 1010 + ["test"] * 90)
    report = import_task(file, "toy", tmp_path / "out")
    assert report.task.num_test == 90


def test_a_tree_is_read_class_by_class(tmp_path):
    for name, greys in {"b": [3], "a": [2, 1], ".hidden": [9]}.items():
        (tmp_path / "tree" / name / "deeper").mkdir(parents=True)
        for grey in greys:
            (tmp_path / "tree" / name / "deeper" / f"{grey}.png").write_bytes(encode(grey))
    (tmp_path / "tree" / "a" / "notes.txt").write_text("no image")
    labelled = read_labelled(tmp_path / "tree")
    assert labelled.class_names == ("a", "b") and labelled.labels.tolist() == [0, 0, 1]
    assert [labelled.read(i) for i in range(3)] == [encode(1), encode(2), encode(3)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": None}, "lacks offsets"),
        ({"blob": np.zeros(3)}, "blob is float64"),
        ({"labels": np.array([0.5, 1.0])}, "labels are float64"),
        ({"labels": np.array([0, 7])}, "labels run from 0 to 7, expected 0 to 1"),
        ({"offsets": np.array([0, 9, 5])}, "offsets do not rise"),
        ({"offsets": np.array([0, 5])}, "expected 3 whole numbers"),
        ({"split": np.array(["test"])}, "one word for each of 2 images"),
        ({"class_names": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_a_wrong_npz_says_what_is_wrong(tmp_path, changed, message):
    file = write_npz(tmp_path / "toy.npz", [0, 1], **changed)
    with pytest.raises(UserError, match=message):
        read_labelled(file)


def test_a_wrong_path_or_tree_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="is missing: expected an npz file"):
        read_labelled(tmp_path / "nothing.npz")
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="1 sub-folders"):
        read_labelled(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"no image in \['a', 'b'\]"):
        read_labelled(tmp_path)


def test_too_few_images_and_a_folder_that_exists_are_refused(tmp_path):
    file = write_npz(tmp_path / "toy.npz", [0, 1])
    with pytest.raises(UserError, match="has 2 images to train on"):
        import_task(file, "toy", tmp_path / "out")
    (tmp_path / "out" / "toy").mkdir(parents=True)
    splits = ["train800", "test", "val200"]
    file = write_npz(tmp_path / "other.npz", [0, 1, 0], splits)
    with pytest.raises(UserError, match="toy exists"):
        import_task(file, "toy", tmp_path / "out")


def test_a_damaged_image_leaves_nothing_behind(tmp_path):
    file = write_npz(tmp_path / "toy.npz", [0, 1, 0], ["train800", "test", "val200"])
    with np.load(file) as archive:
        content = dict(archive)
    content["blob"][content["offsets"][1] + 1] = 0
    np.savez(file, **content)
    with pytest.raises(UserError, match=r"mini/toy cannot be laid out: .*cannot decode"):
        import_task(file, "toy", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
