"""PEFT methods, one file each. A file added here (or in a folder given to `add_methods_folder`) is all it takes."""

from pathlib import Path

from mambapeft_vision.utils.errors import UserError


def add_methods_folder(folder: str | Path) -> None:
    """Makes the files of `folder` importable as `mambapeft_vision.methods.<file>`.

    For methods that live outside the package (`paths.methods` in the config). Files of the package win.
    Raises: UserError when there is no such folder.
    """
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"paths.methods={str(folder)!r} is no folder; give the folder that holds your method's file")
    if str(path) not in __path__:
        __path__.append(str(path))
