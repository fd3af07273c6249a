"""Fetching the archive: from the hub, or one message with the ways to get it by hand."""

import huggingface_hub
import pytest

from mambapeft_vision.data.prepare.download import ARCHIVE_NAME, DRIVE_PAGE, HUB_PAGE, fetch_archive
from mambapeft_vision.utils.errors import UserError


def test_the_hub_delivers_once(tmp_path, monkeypatch):
    asked = []

    def deliver(**arguments):
        asked.append(arguments)
        (arguments["local_dir"] / arguments["filename"]).write_bytes(b"zip")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", deliver)
    folder = tmp_path / "new" / "folder"
    assert fetch_archive(folder) == fetch_archive(folder) == folder / ARCHIVE_NAME
    assert [(a["repo_id"], a["repo_type"], a["local_dir"]) for a in asked] == [("XiN0919/VTAB-1k", "dataset", folder)]


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("\x1b[31mred"), RuntimeError("429")])
def test_a_failure_names_the_reason_and_both_places(tmp_path, monkeypatch, error):
    def fail(**arguments):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match="continues where it stopped") as caught:
        fetch_archive(tmp_path)
    message = str(caught.value)
    assert type(error).__name__ in message and HUB_PAGE in message and DRIVE_PAGE in message and "--zip" in message
    assert "\x1b" not in message
