"""Compiled kernels are run: they are loaded only from folders where nobody else can write."""

import os
import stat

import mambapeft_kernels.backends as backends
import pytest
import torch
from mambapeft_kernels import resolve_backend
from mambapeft_kernels.private_cache import NUMBA_CONFIG, check_private

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT RUN: another user can be played by root alone")
NOBODY = 65534


@pytest.fixture(params=["NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"])
def resolved(request, monkeypatch, tmp_path):
    """Names a folder as the cache of a compiler, and resolves the backend that uses it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "can_run", lambda *_: True)
    check_private.cache_clear()

    def resolve(folder):
        monkeypatch.setenv(request.param, str(folder))
        return resolve_backend(*(("numba", "cpu") if request.param.startswith("NUMBA") else ("cuda", "cuda")))

    return resolve


def test_a_private_folder_is_taken_and_a_missing_one_is_made_private(resolved, tmp_path):
    resolved(tmp_path / "new" / "cache")
    assert stat.S_IMODE((tmp_path / "new" / "cache").stat().st_mode) == 0o700
    (tmp_path / "mine").mkdir(mode=0o755)
    resolved(tmp_path / "mine")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_a_folder_that_others_can_write_to_is_refused(resolved, tmp_path, mode):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ValueError, match=r"shared can be written by other users.*Set \w+_CACHE_DIR"):
        resolved(folder)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="shared can be written by other users"):
        resolved(tmp_path / "link")


def test_a_folder_that_others_can_replace_is_refused(resolved, tmp_path):
    (tmp_path / "shared" / "mine").mkdir(parents=True)
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(ValueError, match="shared can be written by all users, who can put another mine there"):
        resolved(tmp_path / "shared" / "mine")
    (tmp_path / "shared").chmod(0o1777)
    resolved(tmp_path / "shared" / "mine")


@needs_root
def test_a_folder_of_another_user_is_refused(resolved, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(ValueError, match="theirs belongs to another user"):
        resolved(folder)


@needs_root
def test_of_groups_a_users_own_may_write(resolved, tmp_path):
    for group, refused in ((os.getgid(), False), (NOBODY, True)):
        folder = tmp_path / f"of {group}"
        folder.mkdir()
        os.chown(folder, -1, group)
        folder.chmod(0o775)
        if refused:
            with pytest.raises(ValueError, match="can be written by other users"):
                resolved(folder)
        else:
            resolved(folder)


def test_numbas_settings_in_the_current_folder_are_refused(tmp_path, monkeypatch):
    """They could name a folder of pickles."""
    pytest.importorskip("numba")
    monkeypatch.chdir(tmp_path)
    assert resolve_backend("auto", "cpu") == "numba"
    (tmp_path / NUMBA_CONFIG).write_text("cache_dir: theirs")
    with pytest.raises(ValueError, match="would tell Numba which code to run"):
        resolve_backend("auto", torch.device("cpu"))
