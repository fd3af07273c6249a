"""Folders of compiled kernels: what lies there is run (Numba's files are pickles), so nobody else may write there.

Checked once a process for each folder, before a backend that compiles is used.
"""

import os
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path

NUMBA_CONFIG = ".numba_config.yaml"
_IN_TREE = [Path(__file__).parent / op / "__pycache__" for op in ("rms_norm", "ssm_mixer")]


def check_caches(backend: str) -> None:
    """Raises ValueError unless what a backend compiles is kept where only this user can write.

    A folder that does not exist is made, for this user alone.
    """
    if os.name != "posix":
        return
    if backend == "numba":
        _check_numba()
    elif backend in ("cuda", "triton"):
        _check_triton()


def _check_triton() -> None:
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    check_private(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"), "TRITON_CACHE_DIR")


def _check_numba() -> None:
    # Numba reads that file in the current folder, which may be anybody's: it can name another cache.
    if os.path.lexists(NUMBA_CONFIG):
        raise ValueError(
            f"{os.path.abspath(NUMBA_CONFIG)} would tell Numba which code to run; expected none in the current "
            "folder. Delete it or start elsewhere; your own settings can be NUMBA_* in the environment"
        )
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given:
        check_private(given, "NUMBA_CACHE_DIR")
    elif not all(os.access(folder if folder.exists() else folder.parent, os.W_OK) for folder in _IN_TREE):
        # Beside the code, who can write can change the code as well. Where nobody can, Numba takes the user's cache.
        users = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        check_private(os.path.join(users, "numba"), "NUMBA_CACHE_DIR")


@cache
def check_private(folder: str, variable: str) -> None:
    """Raises ValueError where somebody else can write to a folder of compiled code; makes it where it is missing.

    variable: of the environment, which can name another folder.
    """
    with suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    place = Path(folder).resolve()
    if not place.is_dir():
        return  # and cannot be made: nothing is loaded from there
    status = place.stat()
    remedy = f"Set {variable} to a folder of your own"
    if status.st_uid not in (os.geteuid(), 0):
        raise ValueError(f"{place} belongs to another user, whose compiled code would run here. {remedy}")
    if _others_write(status):
        raise ValueError(
            f"{place} can be written by other users, whose compiled code would run here. {remedy}, or delete this one "
            "and let it be made again"
        )
    for above in place.parents:
        status = above.stat()
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            raise ValueError(f"{above} can be written by all users, who can put another {place.name} there. {remedy}")


def _others_write(status: os.stat_result) -> bool:
    group = bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)
    return group or bool(status.st_mode & stat.S_IWOTH)


def _is_own_group(number: int) -> bool:
    """Whether a group is a user's alone, as many systems make one for each user."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}
