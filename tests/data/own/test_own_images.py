"""Own images as they lie become a task: what is read, how it is split, and what is noticed."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from helpers.own_images import draw, tree

from mambapeft_vision.data import Preprocessing, TaskDataModule
from mambapeft_vision.data.manifest import read_entry
from mambapeft_vision.data.own.draw import draw_shots, draw_splits, split_sizes
from mambapeft_vision.data.own.source import natural_order, read_tree
from mambapeft_vision.data.prepare.importer import read_labelled
from mambapeft_vision.utils.errors import UserError

PREPROCESSING = Preprocessing((8, 8), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def task(path: Path, records: Path, **more) -> TaskDataModule:
    return TaskDataModule(name="custom/own", path=path, records=records, **more)


def checked(path: Path, records: Path, **more) -> TaskDataModule:
    data = task(path, records, **more)
    data.check()
    return data


def split_of(data: TaskDataModule) -> dict[str, str]:
    """Path → train, val or test, as recorded."""
    with open(data.folder / "files.csv", newline="") as file:
        return {row["path"]: row["split"] for row in csv.DictReader(file)}


def problem(path: Path, records: Path, **more) -> str:
    with pytest.raises(UserError) as caught:
        checked(path, records, **more)
    return str(caught.value)


# Trees


def test_a_tree_of_class_folders_is_a_task(tmp_path):
    data = checked(tree(tmp_path / "photos", {"dog": 10, "cat": 5, "Übergröße 2": 2}), tmp_path / "own")
    assert data.class_names == ("cat", "dog", "Übergröße 2") and data.num_classes == 3
    splits = split_of(data)
    per_class = {name: sorted(s for p, s in splits.items() if p.startswith(f"{name}/")) for name in data.class_names}
    assert per_class["dog"] == ["test"] * 2 + ["train"] * 6 + ["val"] * 2
    assert per_class["cat"] == ["test", "train", "train", "train", "val"]
    assert per_class["Übergröße 2"] == ["test", "train"]
    data.load(PREPROCESSING)
    assert len(data.train_set) == 13 and sum(len(labels) for _, labels in data.test_dataloader()) == 4
    entry = read_entry(tmp_path / "own", data.folder.name)
    assert entry is not None and data.manifest_hash == entry.sha256 == data.fingerprint(check_images=True)


def test_classes_come_in_the_order_in_which_people_count():
    assert natural_order(["10", "9", "a10", "a9", "b", "A"]) == ["9", "10", "A", "a9", "a10", "b"]


def test_what_is_no_image_of_a_class_is_named(tmp_path):
    photos = tree(tmp_path / "photos", {"a": 3, "b": 3})
    (photos / "a" / "notes.txt").write_text("x")
    (photos / "b" / ".hidden.png").write_bytes(b"x")
    shutil.copy(photos / "a" / "00.png", photos / "beside.png")
    shutil.copy(draw(tmp_path / "new.png", 0, 77), photos / "a" / "without_ending")
    data = checked(photos, tmp_path / "own")
    assert "a/without_ending" in split_of(data) and len(split_of(data)) == 7
    assert any("notes.txt" in note and "beside.png" in note and "left out" in note for note in data.notes)


def test_names_that_differ_in_case_are_two_classes_and_noted(tmp_path):
    data = checked(tree(tmp_path / "photos", {"Cat": 2, "cat": 2}), tmp_path / "own")
    assert data.num_classes == 2 and any("'Cat' and 'cat'" in note for note in data.notes)


def test_splits_that_were_made_stay(tmp_path):
    photos = tmp_path / "photos"
    tree(photos / "train", {"a": 6, "b": 6})
    for name, label in (("a", 0), ("b", 1)):
        draw(photos / "test" / name / "x.png", label, 50)
    shutil.copy(photos / "train" / "a" / "00.png", photos / "test" / "a" / "twin.png")
    data = checked(photos, tmp_path / "own")
    splits = split_of(data)
    assert {path for path, split in splits.items() if split == "test"} == {
        *("test/a/x.png", "test/a/twin.png", "test/b/x.png")
    }
    assert sorted(splits.values()).count("val") == 2
    assert any("train/a/00.png" in note and "test/a/twin.png" in note for note in data.notes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda at: tree(at, {"a": 3}), ["1 sub-folders", "at least two"]),
        (lambda at: tree(at, {"a": 3, "b": 1}), ["'b'", "fewer than two", "Add images"]),
        (lambda at: [tree(at, {"a": 3, "b": 3}), (at / "c").mkdir()], ["no image in 'c'"]),
        (lambda at: tree(at, {"a": 3, "b\\c": 3}), ["backslashes", "Rename"]),
        (lambda at: tree(at, {"a": 3, "b\nc": 3}), ["line breaks", "Rename"]),
        (lambda at: [tree(at / x, {"a": 3, "b": 3}) for x in ("train", "test", "more")], ["'more'", "Move"]),
        (lambda at: [tree(at, {"a": 3, "b": 3}), (at / "b" / "00.png").write_bytes(b"x")], ["b/00.png", "decode"]),
        (lambda at: [tree(at, {"a": 3, "b": 3}), (at / "b" / "00.png").write_bytes(b"")], ["b/00.png", "empty"]),
        (lambda at: None, ["missing", "Correct the path"]),
    ],
    ids=["one class", "one image", "empty class", "backslash", "line break", "mixture", "damaged", "empty", "nothing"],
)
def test_what_cannot_be_a_task_is_refused_with_the_remedy(make, words, tmp_path):
    make(tmp_path / "photos")
    message = problem(tmp_path / "photos", tmp_path / "own")
    assert all(word in message for word in words), message
    assert not list((tmp_path / "own").glob("*/")) if (tmp_path / "own").exists() else True


SPLIT_TREES = {
    ("train", "val"): "train val",
    ("Training", "Testing"): "train test",
    ("training_set", "test_set"): "train test",
    ("seg_train/seg_train", "seg_test/seg_test"): "train test",
    ("train2017", "val2017"): "train val",
    ("Train Images", "Test Images"): "train test",
    ("birds-train", "birds-valid", "birds-test"): "train val test",
}


@pytest.mark.parametrize("folders", SPLIT_TREES)
def test_folders_of_splits_are_known_by_what_people_call_them(folders, tmp_path):
    for folder in folders:
        tree(tmp_path / folder, {"a": 2, "b": 2})
    for source in (read_tree(tmp_path), read_labelled(tmp_path)):
        assert source.class_names == ("a", "b")
        assert set(source.splits) == set(SPLIT_TREES[folders].split())


@pytest.mark.parametrize(
    "names", [("train", "bus"), ("train ride", "test drive"), ("valid", "invalid"), ("latest", "a")]
)
def test_classes_may_be_called_as_splits_are(names, tmp_path):
    source = read_tree(tree(tmp_path, dict.fromkeys(names, 2)))
    assert source.class_names == tuple(sorted(names)) and source.splits is None


@pytest.mark.parametrize("folders", [("val", "test"), ("seg_train", "seg_test", "seg_pred"), ("train", "test", "more")])
def test_splits_that_cannot_be_used_do_not_become_classes(folders, tmp_path):
    for folder in folders:
        tree(tmp_path / folder, {"a": 2, "b": 2})
    for read in (read_tree, read_labelled):
        with pytest.raises(UserError, match=r"folders of splits .*Move what does not belong"):
            read(tmp_path)


def test_a_tree_inside_of_another_folder_is_named(tmp_path):
    tree(tmp_path / "photos" / "photos", {"a": 2, "b": 2})
    for read in (read_tree, read_labelled):
        with pytest.raises(UserError, match=r"1 sub-folders.*Give .*photos/photos if the classes are there"):
            read(tmp_path / "photos")


def test_what_systems_and_archives_leave_is_no_class_and_no_image(tmp_path):
    tree(tmp_path, {"a": 2, "b": 2, "__MACOSX": 1, "a/@eaDir/00.png": 1, "$RECYCLE.BIN": 1})
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    for source in (read_tree(tmp_path), read_labelled(tmp_path)):
        assert source.class_names == ("a", "b") and len(source.labels) == 4 and source.notes == ()


# The draw


def test_splits_are_drawn_once(tmp_path):
    photos = tree(tmp_path / "photos", {"a": 9, "b": 9})
    first = checked(photos, tmp_path / "own")
    again = checked(photos, tmp_path / "own")
    assert split_of(again) == split_of(first) and again.current_fingerprint() == first.manifest_hash
    other = checked(photos, tmp_path / "own", split_seed=1)
    assert split_of(other) != split_of(first) and other.folder != first.folder
    elsewhere = checked(shutil.copytree(photos, tmp_path / "photos2"), tmp_path / "own2")
    assert split_of(elsewhere) == split_of(first)


def test_a_touched_image_is_the_same_and_a_changed_one_is_noticed(tmp_path):
    photos = tree(tmp_path / "photos", {"a": 4, "b": 4})
    first = checked(photos, tmp_path / "own")
    os.utime(photos / "a" / "00.png", (1, 1))
    assert task(photos, tmp_path / "own").current_fingerprint() == first.manifest_hash
    assert checked(photos, tmp_path / "own").manifest_hash == first.manifest_hash
    draw(photos / "a" / "04.png", 0, 4)
    assert task(photos, tmp_path / "own").current_fingerprint() not in (None, first.manifest_hash)
    changed = checked(photos, tmp_path / "own")
    assert changed.manifest_hash != first.manifest_hash and "a/04.png" in split_of(changed)
    assert any("drawn again" in note for note in changed.notes)
    assert first.folder.with_name(f"{first.folder.name}.replaced-1").is_dir()


def test_an_image_that_changed_is_noticed_although_its_time_and_size_are_as_before(tmp_path):
    """As `rsync -t` and `touch -d` leave it."""
    photos = tree(tmp_path / "photos", {"a": 4, "b": 4})
    one, other = photos / "a" / "00.png", draw(tmp_path / "other.png", 0, 9)
    for file in (one, other):
        file.write_bytes(file.read_bytes().ljust(2_000, b"\0"))
    first = checked(photos, tmp_path / "own").manifest_hash
    before = one.stat()
    one.write_bytes(other.read_bytes())
    os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert one.stat().st_size == before.st_size and one.stat().st_mtime_ns == before.st_mtime_ns
    assert checked(photos, tmp_path / "own").manifest_hash != first


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("train800val200.txt", " 0\n", " 1\n"),  # a label
        ("test.txt", "images/b", "images/a"),
        ("files.csv", ",train,", ",test,"),
        ("files.csv", "\n", "0\n"),  # a digit more of a checksum
        ("val200.txt", None, None),
        ("../manifest.json", '"sha256": "', '"sha256": "0'),  # of 64 digits the last goes
    ],
)
def test_a_record_that_is_damaged_is_made_again(tmp_path, name, right, wrong):
    photos = tree(tmp_path / "photos", {"a": 6, "b": 6})
    first = checked(photos, tmp_path / "own")
    files = {f.name: f.read_bytes() for f in first.folder.iterdir() if f.is_file()}
    file = first.folder / name
    if right is None:
        file.unlink()
    else:
        changed = wrong.join(file.read_text().rsplit(right, 1))
        file.write_text(re.sub(r"([0-9a-f]{64})[0-9a-f]\b", r"\1", changed) if file.suffix == ".json" else changed)
    with pytest.warns(UserWarning, match="its files are not as they were written; it is made again") as told:
        again = checked(photos, tmp_path / "own")
    assert len(told) == 1 and again.manifest_hash == first.manifest_hash
    assert {f.name: f.read_bytes() for f in again.folder.iterdir() if f.is_file()} == files


def test_images_of_the_same_content_are_in_the_same_split():
    contents = [str(i // 2) for i in range(40)]
    splits = draw_splits([0] * 40, contents, test_share=0.3, val_share=0.2, seed=0)
    assert splits[::2] == splits[1::2]
    assert {word: splits.count(word) for word in set(splits)} == {"test": 12, "val": 8, "train": 20}


@pytest.mark.parametrize("images", range(1, 12))
def test_one_image_is_always_left_to_train(images):
    sizes = split_sizes(images, 0.4, 0.5)
    assert sum(sizes.values()) == images and sizes["train"] >= 1 and min(sizes.values()) >= 0
    assert sizes["test"] >= 1 or images == 1


def test_shots_are_so_many_of_each_class(tmp_path):
    photos = tree(tmp_path / "photos", {"a": 12, "b": 12, "c": 3})
    data = checked(photos, tmp_path / "own", shots=4)
    data.load(PREPROCESSING)
    assert data.train_set.labels.bincount().tolist() == [4, 4, 2]
    assert any("fewer of c" in note for note in data.notes)
    every = checked(photos, tmp_path / "own")
    assert data.manifest_hash == every.manifest_hash  # the same images; the config says how many are used
    assert draw_shots([(0, 1), (0,), (1,)], 1, seed=0) in ([0], [0, 1], [0, 2], [1, 2])


def test_uneven_classes_are_noted(tmp_path):
    data = checked(tree(tmp_path / "photos", {"a": 20, "b": 3}), tmp_path / "own")
    assert any("uneven" in note and "'a' has 16" in note and "'b' has 2" in note for note in data.notes)


# Tables


def table(folder: Path, text: str, name: str = "labels.csv") -> Path:
    for label in range(2):
        for number in range(4):
            draw(folder / "pictures" / f"{'ab'[label]}{number}.png", label, number)
    (folder / name).write_text(text)
    return folder / name


ROWS = [f"pictures/{name}{number}.png,{name}" for name in "ab" for number in range(4)]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["path,label", *ROWS]),
        "\r\n".join(["Class;File;note", *(f"{row[-1]};{row[:-2]};x" for row in ROWS)]) + "\r\n",
        "\n".join(ROWS),
        "\ufeff" + "\n".join(["filename\tcategory", *(row.replace(",", "\t") for row in ROWS)]),
    ],
    ids=["plain", "semicolons", "no header", "tabs"],
)
def test_a_table_of_paths_and_labels_is_a_task(text, tmp_path):
    data = checked(table(tmp_path, text), tmp_path / "own")
    assert data.class_names == ("a", "b") and len(split_of(data)) == 8
    data.load(PREPROCESSING)
    assert data.train_set.names[0].startswith("images/pictures/a")


def test_a_table_may_have_splits_other_columns_and_another_root(tmp_path):
    rows = [f"{row.removeprefix('pictures/')},{'test' if row[10] == '0' else 'train'}" for row in ROWS]
    file = table(tmp_path, "\n".join(["where,what,part", *rows]))
    columns = {"path": "where", "label": "what", "split": "part"}
    data = checked(file, tmp_path / "own", root=tmp_path / "pictures", columns=columns)
    assert {path for path, split in split_of(data).items() if split == "test"} == {"a0.png", "b0.png"}


def test_parquet_is_read_where_pyarrow_is(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table(tmp_path, "")
    columns = {"path": [row.partition(",")[0] for row in ROWS], "label": [int(row[-1] == "b") for row in ROWS]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "labels.parquet")
    data = checked(tmp_path / "labels.parquet", tmp_path / "own")
    assert data.class_names == ("0", "1") and len(split_of(data)) == 8
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing more")
    assert "no Parquet file" in problem(tmp_path / "bad.parquet", tmp_path / "own")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty", "path,label"]),
        ("path,label\n", ["no rows"]),
        ("name,kind\npictures/a0.png,a\n", ["'name', 'kind'", "path and one for the label", "dataset.columns"]),
        ("path,label\npictures/a0.png,a\npictures/a1.png\n", ["line 3", "1 cells", "expected 2"]),
        ("path,label\npictures/a0.png,\n", ["row 1", "no label"]),
        ("path,label\n../x.png,a\n", ["row 1", "'../x.png'", "dataset.root"]),
        ("path,label\n/etc/x.png,a\n", ["not below", "dataset.root"]),
        ("path,label\npictures/a0.png,a\npictures/a0.png,b\n", ["row 2", "row 1", "Remove one"]),
        ("path,label\npictures/a0.png,a\npictures/zz.png,b\n", ["zz.png", "No such file"]),
        ("path,label,split\npictures/a0.png,a,train\npictures/b0.png,b,exam\n", ["row 2", "'exam'", "train"]),
        ("path,label,split\npictures/a0.png,a,train\npictures/b0.png,b,train\n", ["train alone", "Mark both"]),
        ("path,label\npictures/a0.png,a\npictures/a1.png,a\n", ["1 classes", "at least two"]),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(text, words, tmp_path):
    message = problem(table(tmp_path, text), tmp_path / "own")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text",
    [
        "path,labels\n" + "".join(f"{row[:-2]},{row[-1]}|all\n" for row in ROWS[:-1]) + f"{ROWS[-1][:-2]},\n",
        "path,a,all,b\n"
        + "".join(f"{row[:-2]},{int(row[-1] == 'a')},1,{int(row[-1] == 'b')}\n" for row in ROWS[:-1])
        + f"{ROWS[-1][:-2]},0,0,0\n",
    ],
    ids=["divided", "matrix"],
)
def test_images_may_have_several_labels(text, tmp_path):
    data = checked(table(tmp_path, text), tmp_path / "own", multi_label=True)
    assert data.class_names == ("a", "all", "b")
    assert data.fingerprint(check_images=True) == data.fingerprint()
    data.load(PREPROCESSING)
    labels = dict(zip(data.train_set.names, data.train_set.labels.tolist(), strict=True))
    for _, row in data.test_dataloader():
        assert row.shape[1] == 3
    for name, row in labels.items():
        expected = {"a": [1, 1, 0], "b": [0, 1, 1]}[name.removeprefix("images/pictures/")[0]]
        assert row == ([0, 0, 0] if name.endswith("b3.png") else expected)


# The layout of VTAB-1K


def test_a_task_with_list_files_needs_no_number_of_classes(toy_folder):
    data = TaskDataModule(name="custom/toy", path=toy_folder)
    data.check()
    assert data.num_classes == 3 and data.folder == toy_folder and data.class_names is None
    (toy_folder / "classes.txt").write_text("x\ny\nz z\n")
    named = TaskDataModule(name="custom/toy", folder=toy_folder, num_classes=3)
    named.check()
    assert named.class_names == ("x", "y", "z z")
    (toy_folder / "classes.txt").write_text("x\ny\n")
    with pytest.raises(UserError, match="2 classes in classes.txt: expected 3"):
        TaskDataModule(name="custom/toy", folder=toy_folder, num_classes=3).check()


def test_the_record_says_where_the_images_came_from(tmp_path):
    data = checked(tree(tmp_path / "photos", {"a": 4, "b": 4}), tmp_path / "own", split_seed=3)
    record = json.loads((data.folder / "task.json").read_text())
    assert record["path"] == str(tmp_path / "photos") and record["splits"] == {"seed": 3, "test": 0.2, "val": 0.2}
    assert record["images"] == {"test": 2, "val": 2, "train": 4}
