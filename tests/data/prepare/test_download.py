"""Fetching the archive: from the hub, or one message with the ways to get it by hand."""

import pytest
from helpers.hub import hub_with

from mambapeft_vision.data.prepare.download import ARCHIVE_NAME, DRIVE_PAGE, HUB_DATASET, HUB_PAGE, fetch_archive
from mambapeft_vision.utils.errors import UserError


def test_the_hub_delivers_once(tmp_path, monkeypatch):
    asked = []

    def deliver(**arguments):
        asked.append(arguments)
        (arguments["local_dir"] / arguments["filename"]).write_bytes(b"zip")

    hub_with(monkeypatch, {HUB_DATASET: {ARCHIVE_NAME: 4_660_000_000}}, deliver)
    folder = tmp_path / "new" / "folder"
    assert fetch_archive(folder) == fetch_archive(folder) == folder / ARCHIVE_NAME
    found = [(a["repo_id"], a["repo_type"], a["revision"], a["local_dir"]) for a in asked]
    assert found == [(HUB_DATASET, "dataset", "commit of None", folder)]


def test_an_archive_that_is_too_large_is_not_downloaded(tmp_path, monkeypatch):
    hub_with(monkeypatch, {HUB_DATASET: {ARCHIVE_NAME: 10**11}})
    with pytest.raises(UserError, match="has 100,000,000,000 bytes; expected at most 20,000,000,000"):
        fetch_archive(tmp_path)


def test_a_hub_that_does_not_answer_is_named(tmp_path, monkeypatch):
    hub_with(monkeypatch, {})
    with pytest.raises(UserError, match=r"could not be downloaded \(OSError: offline\)"):
        fetch_archive(tmp_path)


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("\x1b[31mred"), RuntimeError("429")])
def test_a_failure_names_the_reason_and_both_places(tmp_path, monkeypatch, error):
    def fail(**arguments):
        raise error

    hub_with(monkeypatch, {HUB_DATASET: {}}, fail)
    with pytest.raises(UserError, match="continues where it stopped") as caught:
        fetch_archive(tmp_path)
    message = str(caught.value)
    assert type(error).__name__ in message and HUB_PAGE in message and DRIVE_PAGE in message and "--zip" in message
    assert "\x1b" not in message
