"""A verified task counts as verified while its files have their verified content; its entry is checked, too."""

import json
import os
import shutil
import time
import warnings

import pytest

from mambapeft_vision.data import TaskDataModule, manifest
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.manifest import MANIFEST_FILE, drop_entry, manifest_hash, read_entry, write_entry
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.data.prepare.vtab1k import verified_before
from mambapeft_vision.utils.errors import UserError

IMAGE = "images/test/000001.jpg"


@pytest.fixture
def verified(toy_folder, toy):
    """The toy task with its entry in the manifest → (folder, sha256)."""
    report = verify_task(toy, toy_folder)
    write_entry(toy_folder.parent, "toy", report.entry, report.states)
    return toy_folder, report.entry.sha256


@pytest.fixture
def reads(monkeypatch):
    """The images that were read, in order."""
    read, seen = manifest.image_hash, []

    def noted(listing, entry, algorithm):
        seen.append(entry.path)
        return read(listing, entry, algorithm)

    monkeypatch.setattr(manifest, "image_hash", noted)
    monkeypatch.setattr(manifest, "known_contents", {})  # as in a new process
    return seen


def of(folder, **options):
    data = TaskDataModule(name="custom/toy", folder=folder, num_classes=3, **options)
    data.check()
    return data


def other_pixels(folder):
    """One other byte in a file, whose size stays."""
    file = folder / IMAGE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def restore_time(folder, change):
    """A change after which the time of modification is as before, as `touch -d` and `rsync -t` leave it."""
    file = folder / IMAGE
    before = file.stat()
    change(folder)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_size == before.st_size


def rename_over(folder):
    other_pixels(folder)
    shutil.copy2(folder / IMAGE, folder / "x")
    (folder / "x").replace(folder / IMAGE)


@pytest.mark.parametrize(
    "change",
    [
        other_pixels,
        rename_over,
        lambda folder: restore_time(folder, other_pixels),
        lambda folder: shutil.copy(folder / "images/test/000002.jpg", folder / IMAGE),
    ],
    ids=["pixels", "another file", "time restored", "another image"],
)
def test_images_that_changed_since_are_no_verified_ones(verified, change):
    folder, sha256 = verified
    assert of(folder).manifest_hash == sha256 and of(folder).content_hash is None
    change(folder)
    data = of(folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        assert data.manifest_hash.startswith("unverified:") and len(data.content_hash) == 64
    assert [str(one.message).partition(" in ")[0] for one in told] == [f"{folder}: images: not as verified"]
    assert data.current_fingerprint() == data.manifest_hash
    assert data.current_fingerprint(read_images=False) == sha256


def test_files_that_are_only_touched_or_copied_stay_verified(verified, reads, tmp_path):
    folder, sha256 = verified
    assert of(folder).manifest_hash == sha256 and reads == []  # nothing is read
    os.utime(folder / IMAGE)
    assert of(folder).manifest_hash == sha256 and len(set(reads)) == 18
    reads.clear()
    assert of(folder).manifest_hash == sha256 and reads == []  # noted
    copy = shutil.copytree(tmp_path, tmp_path / "copy") / "toy"
    assert of(copy).manifest_hash == sha256 and of(copy).manifest_hash == sha256 and len(reads) == 18
    reads.clear()
    assert of(folder.parent / "copy" / "toy", shots=1).manifest_hash == sha256 and reads == []


def test_a_note_that_is_damaged_or_cannot_be_written_costs_a_reading(verified, reads, monkeypatch):
    folder, sha256 = verified
    file = folder.parent / ".toy.verified.json"
    for damage in ("", "{", "[]", '{"sha256": 1}', file.read_text().replace('"test": "', '"test": "0')):
        file.write_text(damage)
        reads.clear()
        manifest.known_contents.clear()
        assert of(folder).manifest_hash == sha256 and len(reads) == 18, damage
    file.unlink()
    file.mkdir()
    manifest.known_contents.clear()
    reads.clear()
    assert of(folder).manifest_hash == of(folder).manifest_hash == sha256 and len(reads) == 18  # once a process


def test_a_list_of_several_labels_is_verified_by_its_images_too(toy_folder):
    for split in ("train800val200", "test"):
        file = toy_folder / f"{split}.txt"
        file.write_text(file.read_text().replace(" 2", " 0,2").replace(" 1", " -"))
    lists = {split: read_list(toy_folder / f"{split}.txt", 3, remedy="", several=True) for split in ("test",)}
    hashes = {entry.path: manifest.image_hash(lists["test"], entry, "sha256").hex() for entry in lists["test"].entries}
    sha256 = manifest.task_sha256(hashes | {"test.txt": lists["test"].sha256})
    write_entry(toy_folder.parent, "toy", manifest.TaskEntry(sha256, {"test": lists["test"].sha256}, 4, 1, {}, True))
    assert manifest_hash(toy_folder, lists.values(), check_images=True) == sha256
    other_pixels(toy_folder)
    assert manifest_hash(toy_folder, lists.values()).startswith("unverified:")


def test_a_task_is_verified_again_where_its_images_changed(verified, toy):
    folder, _ = verified
    assert verified_before(folder.parent, toy, decode=True)
    restore_time(folder, other_pixels)
    assert not verified_before(folder.parent, toy, decode=True)


def test_the_question_takes_little_time(verified, monkeypatch):
    folder, _ = verified
    listing = of(folder).listings["test"]
    many = listing.chosen([number % 4 for number in range(1000)])
    started = time.process_time()
    manifest.state_of(many)
    assert time.process_time() - started < 0.2


# The manifest's own damage


@pytest.mark.parametrize("where", ["sha256", "lists", "images"])
def test_a_damaged_entry_is_named_with_its_remedy(verified, toy, where):
    folder, sha256 = verified
    file = folder.parent / MANIFEST_FILE
    good = file.read_text()
    write_entry(folder.parent, "other", read_entry(folder.parent, "toy"))
    content = json.loads(file.read_text())
    entry = content["tasks"]["toy"]
    flip = lambda digest: ("0" if digest[0] != "0" else "1") + digest[1:]  # noqa: E731
    entry[where] = {"sha256": flip(sha256), "lists": entry["lists"] | {"test": flip(entry["lists"]["test"])}}.get(
        where, 99
    )
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the entry of toy is not as it was written.*--verify-only"):
        _ = of(folder).manifest_hash
    assert read_entry(folder.parent, "other").sha256 == sha256  # the others stay
    assert not verified_before(folder.parent, toy, decode=True)
    report = verify_task(toy, folder)
    write_entry(folder.parent, "toy", report.entry, report.states)  # the remedy
    assert of(folder).manifest_hash == sha256
    drop_entry(folder.parent, "other")
    assert file.read_text() == good


def test_entries_of_earlier_releases_have_no_checksum(verified):
    folder, sha256 = verified
    file = folder.parent / MANIFEST_FILE
    content = json.loads(file.read_text())
    del content["checksums"]
    file.write_text(json.dumps(content))
    assert of(folder).manifest_hash == sha256
    content["tasks"]["toy"]["sha256"] = "0" * 64  # told by the images instead
    file.write_text(json.dumps(content))
    assert of(folder).manifest_hash.startswith("unverified:")
