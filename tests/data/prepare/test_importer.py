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


def tree(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_hidden_entries_are_skipped_at_any_depth(tmp_path):
    """Notebooks and file managers leave copies of images in hidden folders."""
    hidden = (".ipynb_checkpoints/1-checkpoint.png", "deeper/.thumbs/1.png", "._1.png", ".DS_Store")
    files = {f"{name}/{path}": encode(1) for name in ("cat", "dog") for path in ("1.png", *hidden)}
    labelled = read_labelled(tree(tmp_path, files))
    assert labelled.labels.tolist() == [0, 1] and labelled.notes == ()


def test_images_are_known_by_content_and_other_files_are_named(tmp_path):
    files = {
        "a/1.jfif": encode(1, "JPEG"),
        "a/2": encode(2, "WEBP"),
        "b/3.PNG": encode(3),
        "b/4.tif": encode(4, "TIFF"),
    }
    labelled = read_labelled(
        tree(tmp_path, files | {"a/notes.txt": b"BMW\nP5", "b/list.csv": b"", "b/5.bin": encode(5, "BMP")})
    )
    assert [labelled.name(i).rpartition("/")[2] for i in range(len(labelled))] == [
        "1.jfif",
        "2",
        "3.PNG",
        "4.tif",
        "5.bin",
    ]
    (note,) = labelled.notes
    assert "a/notes.txt" in note and "b/list.csv are no images and were left out" in note


@pytest.mark.parametrize("held_out", [("val",), ("test",), ("validation", "test")])
def test_a_tree_that_is_split_already_keeps_its_splits(tmp_path, held_out):
    files = {f"train/{name}/{i}.png": encode(i) for name in ("cat", "dog") for i in range(520)}
    for offset, part in enumerate(held_out, start=1):
        files |= {f"{part}/{name}/{i}.png": encode(100 * offset + i) for name in ("cat", "dog") for i in range(10)}
    labelled = read_labelled(tree(tmp_path / "tree", files))
    assert labelled.class_names == ("cat", "dog")
    report = import_task(tmp_path / "tree", "pets", tmp_path / "out")
    listing = read_list(tmp_path / "out" / "pets" / "test.txt", 2, remedy="")
    expected = {encode(100 * len(held_out) + i) for i in range(10)}  # the last one is for testing
    assert {listing.path(entry).read_bytes() for entry in listing.entries} == expected
    assert report.task.num_test == 20


def test_a_damaged_file_is_named_as_the_user_knows_it(tmp_path):
    files = {f"{name}/{i}.png": encode(i) for name in ("a", "b") for i in range(550)}
    with pytest.raises(UserError) as error:
        import_task(tree(tmp_path / "tree", files | {"a/0123.png": b"x"}), "toy", tmp_path / "out", max_test=200)
    message = str(error.value)
    assert f"{tmp_path / 'tree' / 'a' / '0123.png'}: cannot decode the image (it is none of" in message
    assert ".tmp" not in message and "BytesIO" not in message


def test_equal_images_in_both_splits_are_told_of(tmp_path):
    file = write_npz(tmp_path / "toy.npz", [0, 1, 0, 1], ["train800", "val200", "test", "test"])
    report = import_task(file, "one", tmp_path / "out")
    assert not [note for note in report.notes if "equal" in note]
    one = np.frombuffer(encode(7), np.uint8)
    content = {"blob": np.tile(one, 4), "offsets": np.arange(5) * len(one)}
    write_npz(tmp_path / "toy.npz", [0, 1, 0, 1], ["train800", "val200", "test", "test"], **content)
    report = import_task(file, "two", tmp_path / "out")
    assert any(
        note.startswith("2 of 2 test images equal a training image, such as images/test/") for note in report.notes
    )


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
