"""Bringing tasks into place: nothing outside the target, nothing half done."""

import dataclasses
import shutil
import stat
import zipfile

import pytest

from mambapeft_vision.data.prepare import archive
from mambapeft_vision.data.prepare.archive import copy_tasks, extract_tasks
from mambapeft_vision.utils.errors import UserError


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path, lay_out):
    """A laid-out toy task, apart from the target."""
    return lay_out(tmp_path / "source")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "target" / "vtab-1k"


@pytest.mark.parametrize("prefix", ["", "vtab-1k/", "a/b/"])
def test_a_task_is_extracted_whatever_folders_are_around_it(tmp_path, source, root, toy, prefix, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip", prefix)
    extract_tasks(file, root, [toy])
    assert contents(root) == {f"toy/{path}": content for path, content in contents(source).items()}


def test_only_the_wanted_tasks_are_extracted_and_junk_is_left_out(tmp_path, source, root, toy, lay_out, zip_folder):
    other = dataclasses.replace(toy, folder="other")
    file = zip_folder(source, tmp_path / "data.zip", "vtab-1k/")
    zip_folder(lay_out(tmp_path / "more", other), file, "vtab-1k/")
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("__MACOSX/vtab-1k/toy/._train800.txt", b"junk")
        opened.writestr("vtab-1k/README", b"junk")
    extract_tasks(file, root, [toy])
    assert [path.name for path in root.iterdir()] == ["toy"]
    extract_tasks(file, root, [other])
    assert sorted(path.name for path in root.iterdir()) == ["other", "toy"]
    assert contents(root / "toy") == contents(source)


@pytest.mark.parametrize(
    "name", ["../evil.txt", "toy/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:/evil.txt", "toy/images/../../../x"]
)
def test_a_member_that_leaves_the_target_is_refused(tmp_path, source, root, toy, name, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip")
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr(name, b"evil")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="its path leaves the target folder"):
        extract_tasks(file, root, [toy])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_special_files_are_refused(tmp_path, source, root, toy, kind, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip")
    member = zipfile.ZipInfo("toy/images/test/link.jpg")
    member.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr(member, "/etc/passwd")
    with pytest.raises(UserError, match="a link or a special file"):
        extract_tasks(file, root, [toy])
    assert not root.exists()


def test_an_encrypted_member_is_refused():
    member = zipfile.ZipInfo("toy/train800.txt")
    member.flag_bits |= 1
    with pytest.raises(UserError, match="encrypted"):
        archive.safe_path(member)


def test_a_bomb_is_refused_before_anything_is_written(tmp_path, source, root, toy, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip")
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("toy/images/test/zeros.jpg", bytes(10_000_000))
    assert file.stat().st_size < 100_000
    with pytest.raises(UserError, match="expected at most 1,000,000"):
        extract_tasks(file, root, [toy], max_bytes=1_000_000)
    assert not root.exists()


def test_a_full_disk_is_seen_before_extracting(tmp_path, source, root, toy, monkeypatch, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip")
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match="only 100 are free"):
        extract_tasks(file, root, [toy])


def test_a_member_twice_is_refused(tmp_path, source, root, toy, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as opened:
        opened.writestr("toy/test.txt", b"other")
    with pytest.raises(UserError, match=r"'toy/test.txt' twice"):
        extract_tasks(file, root, [toy])


def test_an_archive_without_the_task_or_with_two_of_it_says_so(tmp_path, source, root, toy, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip", "one/")
    with pytest.raises(UserError, match="exactly one folder absent/ with list files, found none"):
        extract_tasks(file, root, [dataclasses.replace(toy, folder="absent")])
    zip_folder(source, file, "two/")
    with pytest.raises(UserError, match="found one/toy, two/toy"):
        extract_tasks(file, root, [toy])


@pytest.mark.parametrize("damage", [lambda data: b"not a zip", lambda data: data[: len(data) // 2]])
def test_something_that_is_no_zip_says_so(tmp_path, source, root, toy, damage, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="damaged or not a zip file"):
        extract_tasks(file, root, [toy])


def test_a_flipped_byte_in_the_archive_never_becomes_a_task(tmp_path, source, root, toy, zip_folder):
    file = zip_folder(source, tmp_path / "data.zip")
    with zipfile.ZipFile(file) as opened:
        info = opened.getinfo("toy/images/test/000003.jpg")
    data = bytearray(file.read_bytes())
    data[info.header_offset + 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged or not a zip file"):
        extract_tasks(file, root, [toy])
    assert not (root / "toy").exists()


def test_an_interrupted_extraction_leaves_no_task_and_the_next_one_is_whole(
    tmp_path, source, root, toy, monkeypatch, zip_folder
):
    file = zip_folder(source, tmp_path / "data.zip")
    calls = []

    def copy(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return shutil.copyfileobj(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(archive.shutil, "copyfileobj", copy)
        with pytest.raises(KeyboardInterrupt):
            extract_tasks(file, root, [toy])
    assert not any(root.iterdir())
    extract_tasks(file, root, [toy])
    assert contents(root) == {f"toy/{path}": content for path, content in contents(source).items()}


@pytest.mark.parametrize("depth", ["", "vtab-1k"])
def test_copying_takes_lists_and_the_images_they_name(tmp_path, lay_out, root, toy, depth):
    source = lay_out(tmp_path / "source" / depth)
    expected = contents(source)
    (source / "images/test/stray.jpg").write_bytes(b"stray")
    copy_tasks(tmp_path / "source", root, [toy])
    assert contents(root) == {f"toy/{path}": content for path, content in expected.items()}
    assert (source / "images/test/stray.jpg").exists()


def test_members_whose_names_differ_by_an_ending_are_all_extracted(tmp_path, source, root, toy, zip_folder):
    (source / "images/test/a").write_bytes(b"a")
    (source / "images/test/a.part").write_bytes(b"b")
    extract_tasks(zip_folder(source, tmp_path / "data.zip"), root, [toy])
    assert contents(root / "toy") == contents(source)


def test_a_task_that_is_there_is_not_touched(tmp_path, source, root, toy, zip_folder):
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "mine").write_text("x")
    for bring in (lambda: extract_tasks(zip_folder(source, tmp_path / "d.zip"), root, [toy]), None):
        with pytest.raises(UserError, match="toy exists"):
            bring() if bring else copy_tasks(source.parent, root, [toy])
    assert contents(root) == {"toy/mine": b"x"}


def test_copying_ignores_list_lines_that_leave_the_folder(tmp_path, source, root, toy):
    (tmp_path / "source" / "secret.jpg").write_bytes(b"secret")
    with open(source / "test.txt", "a") as stream:
        stream.write("../secret.jpg 0\n")
    copy_tasks(source.parent, root, [toy])
    assert not list(root.parent.rglob("secret.jpg"))


def test_copying_from_a_folder_without_the_task_says_so(tmp_path, root, toy):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no task folder toy"):
        copy_tasks(tmp_path / "empty", root, [toy])
