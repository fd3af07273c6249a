"""List files: what is read, and every way a line can be wrong."""

import hashlib

import pytest

from mambapeft_vision.data.image_list import missing_images, parse_list, read_list
from mambapeft_vision.utils.errors import UserError

GOOD = b"images/a/000000.jpg 0\nimages/a/000001.jpg 2\n"


def write(tmp_path, content: bytes):
    file = tmp_path / "train800.txt"
    file.write_bytes(content)
    return file


def test_reads_paths_labels_and_line_numbers(tmp_path):
    listing = read_list(write(tmp_path, GOOD), num_classes=3, remedy="")
    assert [(entry.path, entry.label, entry.line) for entry in listing.entries] == [
        ("images/a/000000.jpg", 0, 1),
        ("images/a/000001.jpg", 2, 2),
    ]
    assert listing.labels().tolist() == [0, 2]


@pytest.mark.parametrize(
    "content",
    [
        GOOD.replace(b"\n", b"\r\n"),
        GOOD.rstrip(),
        b"\xef\xbb\xbf" + GOOD,
        b"\n" + GOOD + b"\n\n",
        GOOD.replace(b"images/", b"./images//"),
        GOOD.replace(b" ", b" \t "),
    ],
    ids=["crlf", "no-final-newline", "bom", "blank-lines", "redundant-path-parts", "wide-separator"],
)
def test_harmless_variations_read_the_same(tmp_path, content):
    listing = read_list(write(tmp_path, content), num_classes=3, remedy="")
    assert [(entry.path, entry.label) for entry in listing.entries] == [
        ("images/a/000000.jpg", 0),
        ("images/a/000001.jpg", 2),
    ]


def test_a_path_may_hold_spaces(tmp_path):
    listing = read_list(write(tmp_path, b"images/a b/c d.jpg 1\n"), num_classes=3, remedy="")
    assert listing.entries[0].path == "images/a b/c d.jpg"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"images/a/000002.jpg", "cannot read"),
        (b"7", "cannot read"),
        (b"images/a/000002.jpg two", "cannot read"),
        (b"images/a/000002.jpg 1.0", "cannot read"),
        ("images/a/000002.jpg \u0661".encode(), "cannot read"),
        (b"images/a/000002.jpg -1", "label -1 is out of range: expected 0 to 2"),
        (b"images/a/000002.jpg 3", "label 3 is out of range: expected 0 to 2"),
        (b"images/a/000002.jpg " + b"9" * 5000, "out of range"),
        (b"/images/a/000002.jpg 1", "not inside the task's folder"),
        (b"images/../../000002.jpg 1", "not inside the task's folder"),
        (b"..\\000002.jpg 1", "not inside the task's folder"),
        (b"C:images/000002.jpg 1", "not inside the task's folder"),
        (b"images/\x00.jpg 1", "not inside the task's folder"),
        (b"images/a/000001.jpg 1", "listed before, in line 2"),
        (b"images//a/000001.jpg 1", "listed before, in line 2"),
        (b"images/a/\xff.jpg 1", "not UTF-8"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, reason):
    file = write(tmp_path, GOOD + line + b"\n")
    with pytest.raises(UserError) as error:
        read_list(file, num_classes=3, remedy="Do this.")
    text = str(error.value)
    assert text.startswith(f"{file}:3: ")
    assert reason in text
    assert text.endswith("Do this.")


def test_all_bad_lines_are_reported_and_the_good_ones_kept(tmp_path):
    listing, problems = parse_list(write(tmp_path, b"nonsense\n" + GOOD + b"x.jpg 9\n"), num_classes=3)
    assert len(listing) == 2
    assert [problem.split(": ")[0] for problem in problems] == [f"{listing.file}:1", f"{listing.file}:4"]


def test_an_error_counts_the_other_bad_lines(tmp_path):
    with pytest.raises(UserError, match="2 more bad lines follow"):
        read_list(write(tmp_path, b"one\ntwo\nthree\n"), num_classes=3, remedy="")


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_an_empty_list_is_an_error(tmp_path, content):
    with pytest.raises(UserError, match="the list is empty"):
        read_list(write(tmp_path, content), num_classes=3, remedy="")


def test_a_missing_list_names_the_first_path_that_is_missing(tmp_path):
    with pytest.raises(UserError) as error:
        read_list(tmp_path / "test.txt", 3, remedy="Do this.")
    assert str(error.value).startswith(f"{tmp_path / 'test.txt'} is missing") and "Do this." in str(error.value)
    with pytest.raises(UserError) as error:
        read_list(tmp_path / "no" / "test.txt", 3, remedy="Do this.")
    assert str(error.value).startswith(f"{tmp_path / 'no'} is missing")


def test_missing_images_are_found_in_list_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").touch()
    listing = read_list(write(tmp_path, b"c/2.jpg 0\nb/1.jpg 0\nb/3.jpg 0\n"), 3, remedy="")
    assert [entry.path for entry in missing_images(listing)] == ["c/2.jpg", "b/3.jpg"]


def test_line_ends_make_no_other_list(tmp_path):
    """Copied through Windows or checked out there, the list names the same images: a run of it is the same run."""
    hashes = [read_list(write(tmp_path, c), 3, remedy="").sha256 for c in (GOOD, GOOD.replace(b"\n", b"\r\n"))]
    assert hashes[0] == hashes[1] == hashlib.sha256(GOOD).hexdigest()
    assert read_list(write(tmp_path, GOOD.replace(b" 2", b" 1")), 3, remedy="").sha256 != hashes[0]
