"""What is recorded about code and machine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mambapeft_vision.utils import environment
from mambapeft_vision.utils.git_checkout import checkout_state


@pytest.fixture(autouse=True)
def forget():
    """What a process asks once is asked again in each test, and by what runs after it."""

    def clear() -> None:
        environment.git_state.cache_clear()
        environment.cached_versions.cache_clear()

    clear()
    yield
    clear()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with two commits; the package's first file and a link are tracked."""
    package = tmp_path / "mambapeft_vision"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (tmp_path / "link").symlink_to("mambapeft_vision")
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "start")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "source")
    return tmp_path


def asked(folder: Path) -> tuple[str | None, bool]:
    """What git itself says."""
    return git(folder, "rev-parse", "HEAD"), bool(git(folder, "status", "--porcelain", "--untracked-files=no"))


def change_nothing(folder: Path) -> None:
    (folder / "untracked").write_text("")


def change_content(folder: Path) -> None:
    (folder / "mambapeft_vision" / "__init__.py").write_text("x = 2\n")


def touch(folder: Path) -> None:
    os.utime(folder / "mambapeft_vision" / "__init__.py", (1, 1))


def change_mode(folder: Path) -> None:
    (folder / "mambapeft_vision" / "__init__.py").chmod(0o755)


def delete(folder: Path) -> None:
    (folder / "mambapeft_vision" / "__init__.py").unlink()


def stage(folder: Path) -> None:
    change_content(folder)
    git(folder, "add", ".")


def commit(folder: Path) -> None:
    stage(folder)
    git(folder, "commit", "-q", "-m", "more")


def pack(folder: Path) -> None:
    git(folder, "gc", "-q")
    assert not list((folder / ".git" / "objects").glob("??/*"))


def detach(folder: Path) -> None:
    git(folder, "checkout", "-q", "--detach", "HEAD")


@pytest.mark.parametrize(
    "change", [change_nothing, change_content, touch, change_mode, delete, stage, commit, pack, detach]
)
def test_the_state_of_a_checkout_is_what_git_says(checkout, change):
    change(checkout)
    found = checkout_state(checkout)  # first: git's own answer may renew the index
    assert found == asked(checkout) and found[0] is not None


def test_the_state_of_a_linked_worktree(checkout, tmp_path_factory):
    other = tmp_path_factory.mktemp("worktrees") / "other"
    git(checkout, "worktree", "add", "-q", "-b", "other", str(other))
    git(other, "commit", "-q", "--allow-empty", "-m", "there")
    assert checkout_state(other) == asked(other) != checkout_state(checkout)


def test_repositories_that_are_not_ours_are_not_asked(checkout, tmp_path_factory):
    """Installed into an environment inside of somebody's repository, the package is not tracked there."""
    git(checkout, "rm", "-q", "--cached", "mambapeft_vision/__init__.py")
    assert checkout_state(checkout) == (None, None)
    assert checkout_state(checkout / "mambapeft_vision") == (None, None)
    assert checkout_state(tmp_path_factory.mktemp("no checkout")) == (None, None)


def test_no_program_that_a_repository_names_runs(checkout):
    """core.fsmonitor and filters of .git/config were run by `git ls-files` and `git status`."""
    marker, hook = checkout / "marker", checkout / "hook.sh"
    hook.write_text(f"#!/bin/sh\necho ran >> {marker}\n")
    hook.chmod(0o755)
    (checkout / ".gitattributes").write_text("* filter=theirs\n")
    for key in ("core.fsmonitor", "filter.theirs.clean", "filter.theirs.smudge", "core.sshCommand", "core.pager"):
        git(checkout, "config", key, str(hook))
    touch(checkout)
    assert checkout_state(checkout)[0] is not None and not marker.exists()


@pytest.mark.parametrize("name", ["index", "HEAD", "objects"])
@pytest.mark.parametrize("content", [b"", b"DIRC", b"\0" * 100, b"ref: refs/heads/../../../x", b"ref: x\n" * 1000])
def test_damaged_repositories_are_no_error(checkout, name, content):
    place = checkout / ".git" / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.write_bytes(content)
    assert checkout_state(checkout)[1] is not False


def test_a_process_asks_once(monkeypatch):
    """A sweep's runs are made with the code that was loaded, whatever is checked out meanwhile."""
    found = environment.git_state()
    monkeypatch.setattr(environment, "checkout_state", lambda root: ("another", True))
    assert environment.git_state() == found
    environment.git_state.cache_clear()
    assert environment.git_state() == ("another", True)


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(environment, "LIBRARIES", ("torch", "no-such-library"))
    versions = environment.library_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "no-such-library" not in versions and versions["python"].count(".") == 2


def test_peak_memory_is_in_bytes():
    held = torch.ones(2**24)  # 64 MiB
    assert environment.peak_memory_bytes(torch.device("cpu")) > held.nbytes
    assert environment.peak_memory_bytes(torch.device("cpu")) < 2**40


def test_device_name_is_not_empty():
    assert environment.device_name(torch.device("cpu"))
