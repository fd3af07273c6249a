"""Names and paths that users give."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown

_METHOD = re.compile(r"[A-Za-z]\w*")
_PART = re.compile(r"\w[\w.-]*")
MOST_PARTS = 8  # parts of a task's name; each is a folder below paths.outputs
MOST_METHODS = 50  # methods of one model; each costs time on every parameter
LONGEST = 100  # bytes of one part: file systems take 255, and endings are added


def check_name(name: object, key: str, *, parts: int = 1) -> str:
    """A name that is part of paths and commands, e.g. of a task.

    Args:
        key: the key that the name is given for, for the message.
        parts: how many parts, divided by `/`, it may have.

    Raises:
        UserError: unless every part begins with a letter, digit or underscore and continues with these, `.` and `-`.
    """
    text = name if isinstance(name, str) else ""
    found = text.split("/")
    if len(found) > parts or not all(_PART.fullmatch(part) and len(part.encode()) <= LONGEST for part in found):
        divided = ", divided by /" if parts > 1 else ""
        raise UserError(
            f"{key}={shown(name)}; expected letters, digits, underscores, dots and dashes{divided}, at most {LONGEST} "
            "bytes. Choose another name"
        )
    return text


def check_method_names(names: Collection[object]) -> None:
    """The names of the methods in a config, each as in `check_method_name`. Raises UserError, also for too many."""
    if len(names) > MOST_METHODS:
        raise UserError(f"{len(names):,} methods; expected at most {MOST_METHODS}. Remove some")
    for name in names:
        check_method_name(name)


def check_method_name(name: object) -> str:
    """The name of a method in a config, which is part of names of tensors and folders.

    Raises:
        UserError: for one that is not a letter followed by letters, digits and underscores.
    """
    if not isinstance(name, str) or not _METHOD.fullmatch(name) or len(name.encode()) > LONGEST:
        raise UserError(
            f"method name {shown(name)}; expected letters, digits and underscores, at most {LONGEST} bytes. "
            "Choose another name"
        )
    return name


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path as a user gives it: `~` and `~name` are home folders, everything else stands for itself.

    Raises:
        UserError: where nobody has that name.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{shown(os.fspath(text))}: {plain(error)} Correct the path") from None
