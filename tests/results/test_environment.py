"""What is recorded about code and machine."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from mambapeft_vision.results import environment


@pytest.fixture(autouse=True)
def forget():
    """What a process asks once is asked again in each test, and by what runs after it."""

    def clear() -> None:
        environment.git_state.cache_clear()
        environment._library_versions.cache_clear()

    clear()
    yield
    clear()


def make_repository(folder: Path, *tracked: str) -> Path:
    source = folder / "package" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "start"], check=True)
    if tracked:
        subprocess.run([*git, "add", *tracked], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "source"], check=True)
    return source


def git_state_of(source: Path, monkeypatch) -> tuple[str | None, bool | None]:
    monkeypatch.setattr(environment, "__file__", str(source))
    environment.git_state.cache_clear()
    return environment.git_state()


def test_git_state_of_a_clean_and_of_a_changed_checkout(tmp_path, monkeypatch):
    source = make_repository(tmp_path, "package/environment.py")
    commit, dirty = git_state_of(source, monkeypatch)
    assert re.fullmatch("[0-9a-f]{40}", commit) and dirty is False
    source.write_text("x = 2\n")
    assert git_state_of(source, monkeypatch) == (commit, True)


def test_git_state_of_an_installed_package_inside_someone_elses_repository(tmp_path, monkeypatch):
    assert git_state_of(make_repository(tmp_path), monkeypatch) == (None, None)


def test_git_state_outside_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    source = tmp_path / "environment.py"
    source.write_text("")
    assert git_state_of(source, monkeypatch) == (None, None)


def test_git_state_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.git_state() == (None, None)


def test_a_process_asks_git_once(tmp_path, monkeypatch):
    """A sweep's runs are made with the code that was loaded, whatever is checked out meanwhile."""
    first = git_state_of(make_repository(tmp_path, "package/environment.py"), monkeypatch)
    monkeypatch.setenv("PATH", "")
    assert environment.git_state() == first != (None, None)


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
