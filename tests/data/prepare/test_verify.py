"""Verification finds everything that is wrong; the manifest tells data apart and survives being rewritten."""

import dataclasses
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor

import pytest

from mambapeft_vision.data.manifest import (
    MANIFEST_FILE,
    drop_entry,
    read_entry,
    write_entry,
    write_source,
)
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.data.tasks import TASKS, find_task, select_tasks
from mambapeft_vision.utils.errors import UserError

# The table


def test_the_table_is_vtab_1k():
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert sum(task.num_classes for task in TASKS.values()) == 940
    assert sum(task.num_test for task in TASKS.values()) == 387_905
    assert TASKS["caltech101"].valid_counts("test") == (6_085, 6_084)
    assert TASKS["dtd"].valid_counts("train800val200") == (1000,)
    assert find_task("vtab/svhn") is TASKS["svhn"] and find_task("custom/svhn") is None


def test_tasks_are_selected_in_the_tables_order_and_typos_named():
    assert [task.folder for task in select_tasks(["dtd", "cifar"])] == ["cifar", "dtd"]
    assert len(select_tasks(None)) == 19
    with pytest.raises(UserError, match=r"Unknown tasks \['cifar10'\].*cifar, caltech101"):
        select_tasks(["cifar10", "dtd"])


# Verification


def test_a_good_task_is_recorded(toy_folder, toy):
    report = verify_task(toy, toy_folder)
    assert report.problems == [] and report.notes == []
    assert report.entry.images == 5 + 2 + 7 + 4
    assert report.entry.bytes == sum(file.stat().st_size for file in toy_folder.rglob("*.jpg"))
    assert report.entry.classes_seen == {"train800": 3, "val200": 2, "train800val200": 3, "test": 3}
    assert report.entry.decoded


def test_the_fingerprint_is_what_the_documentation_says(toy_folder, toy):
    """The same as `find … | sort | xargs sha256sum | sha256sum` in the task's folder."""
    files = sorted(str(path.relative_to(toy_folder)) for path in toy_folder.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256((toy_folder / file).read_bytes()).hexdigest()}  {file}\n" for file in files]
    assert verify_task(toy, toy_folder).entry.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_fingerprint_does_not_depend_on_place_or_processes(tmp_path, toy_folder, toy, lay_out, monkeypatch):
    monkeypatch.setattr("mambapeft_vision.data.prepare.verify.CHUNK", 4)
    with ProcessPoolExecutor(2) as executor:
        elsewhere = verify_task(toy, lay_out(tmp_path / "elsewhere"), executor=executor)
    assert elsewhere.entry == verify_task(toy, toy_folder).entry


@pytest.mark.parametrize("file", ["images/test/000002.jpg", "images/val200/000000.jpg", "train800.txt"])
def test_the_fingerprint_changes_with_any_byte(toy_folder, toy, file):
    before = verify_task(toy, toy_folder, decode=False).entry
    content = bytearray((toy_folder / file).read_bytes())
    content[-3 if file.endswith("jpg") else -1] ^= 1 if file.endswith("jpg") else 0x2A  # newline → space
    (toy_folder / file).write_bytes(content)
    after = verify_task(toy, toy_folder, decode=False).entry
    assert after.sha256 != before.sha256 and after.images == before.images


def truncate(file):
    file.write_bytes(file.read_bytes()[:-60])


def test_every_problem_is_listed_with_file_and_line(toy_folder, toy):
    truncate(toy_folder / "images/test/000001.jpg")
    (toy_folder / "images/train800/000004.jpg").unlink()
    (toy_folder / "val200.txt").unlink()
    with open(toy_folder / "train800val200.txt", "a") as stream:
        stream.write("what is this\nimages/train800val200/000001.jpg 0\n")
    report = verify_task(toy, toy_folder)
    assert report.entry is None
    test, train, both = (toy_folder / f"{split}.txt" for split in ("test", "train800", "train800val200"))
    starts = [
        f"{toy_folder / 'val200.txt'}: the list file is missing",
        f"{both}:8: cannot read 'what is this'",
        f"{both}:9: images/train800val200/000001.jpg is listed before, in line 2",
        f"{train}:5: {toy_folder / 'images/train800/000004.jpg'}: cannot read the image (No such file",
        f"{test}:2: {toy_folder / 'images/test/000001.jpg'}: cannot decode the image (OSError: image file is truncated",
    ]
    assert len(report.problems) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in report.problems), start


def test_fast_reads_headers_only(toy_folder, toy):
    truncate(toy_folder / "images/test/000001.jpg")
    entry = verify_task(toy, toy_folder, decode=False).entry
    assert entry is not None and not entry.decoded
    (toy_folder / "images/test/000001.jpg").write_bytes(b"no header")
    assert "it is none of BMP" in verify_task(toy, toy_folder, decode=False).problems[0]


@pytest.mark.parametrize(("count", "good"), [(2, False), (3, True), (4, True)])
def test_counts_are_compared_with_the_table_and_its_alternatives(toy_folder, toy, count, good):
    lines = (toy_folder / "test.txt").read_text().splitlines(keepends=True)
    (toy_folder / "test.txt").write_text("".join(lines[:count]))
    report = verify_task(dataclasses.replace(toy, also_valid_test=(3,)), toy_folder)
    expected = [] if good else [f"{toy_folder / 'test.txt'}: 2 images listed; expected 4 or 3."]
    assert report.problems == expected


def test_a_label_beyond_the_table_is_a_problem(toy_folder, toy):
    report = verify_task(dataclasses.replace(toy, num_classes=2), toy_folder)
    assert f"{toy_folder / 'test.txt'}:3: label 2 is out of range: expected 0 to 1 (2 classes)." in report.problems


def test_odd_labels_are_noted_but_pass(toy_folder, toy):
    report = verify_task(dataclasses.replace(toy, num_classes=5), toy_folder)
    assert report.problems == [] and report.notes == ["3 of 5 classes appear in test.txt."]
    file = toy_folder / "val200.txt"
    file.write_text(file.read_text().replace("000001.jpg 1", "000001.jpg 2"))
    report = verify_task(toy, toy_folder)
    assert report.problems == [] and "train800.txt and val200.txt together" in report.notes[0]


# The manifest


def test_records_come_back_and_do_not_disturb_each_other(tmp_path, toy_folder, toy):
    entry = verify_task(toy, toy_folder).entry
    other = dataclasses.replace(entry, sha256="0" * 64)
    write_entry(tmp_path, "toy", entry)
    write_entry(tmp_path, "another", other)
    write_source(tmp_path, {"archive": "a.zip"})
    assert read_entry(tmp_path, "toy") == entry and read_entry(tmp_path, "another") == other
    assert read_entry(tmp_path, "unknown") is None
    drop_entry(tmp_path, "toy")
    assert read_entry(tmp_path, "toy") is None and read_entry(tmp_path, "another") == other


def test_the_manifest_is_the_same_bytes_for_the_same_data(tmp_path, toy_folder, toy):
    entry = verify_task(toy, toy_folder).entry
    for root, order in [(tmp_path / "a", ["x", "y"]), (tmp_path / "b", ["y", "x"])]:
        root.mkdir()
        for folder in order:
            write_entry(root, folder, entry)
    assert (tmp_path / "a" / MANIFEST_FILE).read_bytes() == (tmp_path / "b" / MANIFEST_FILE).read_bytes()


def test_a_kill_while_writing_leaves_the_old_manifest(tmp_path, toy_folder, toy, monkeypatch):
    entry = verify_task(toy, toy_folder).entry
    write_entry(tmp_path, "toy", entry)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_entry(tmp_path, "other", entry)
    assert read_entry(tmp_path, "toy") == entry and read_entry(tmp_path, "other") is None


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 2, "tasks": {}}', '{"format": 1}', '{"format": 1, "tasks": {"toy": {"sha": 1}}}']
)
def test_a_file_that_is_no_manifest_says_what_to_do(tmp_path, content):
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(UserError, match="Delete it and verify the data again"):
        read_entry(tmp_path, "toy")


def test_the_manifest_is_plain_json(tmp_path, toy_folder, toy):
    write_entry(tmp_path, "toy", verify_task(toy, toy_folder).entry)
    content = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert content["format"] == 1 and len(content["tasks"]["toy"]["sha256"]) == 64
