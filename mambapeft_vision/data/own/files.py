"""Files and folders of a tree of images: hidden files, images, and folders of splits."""

import re
from pathlib import Path

from mambapeft_vision.data.preprocessing import MAX_IMAGE_BYTES
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.untrusted import files_below, is_hidden, open_plain

# First bytes of a file → its usual ending. Names are ignored: images are stored as .jfif, .JPG_1 or without an ending.
_SIGNATURES = {
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    **{f"P{kind}{space}".encode(): ".ppm" for kind in "2356" for space in "\n\r\t "},
}
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ARRAY_SUFFIX = ".npy"
SPLIT_FOLDERS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_FOLDERS |= dict.fromkeys(("val", "valid", "validation"), "val")
NAMED = 5  # files that a note names


def split_folders(folder: Path) -> dict[Path, str | None]:
    """The folders of splits that were made already, with their words; empty where these are classes."""
    found = {child: split_of(child.name) for child in visible_folders(folder)}
    split = "train" in found.values() and None not in found.values() and len(found) > 1
    if not split or not all(any(visible_folders(part)) for part in found):
        return {}
    return {_unwrapped(part): word for part, word in found.items()}


def split_of(name: str) -> str | None:
    """train, val or test for what a folder of images is called: `Training`, `test_set`, `seg_train`, `val2017`."""
    parts = re.findall(r"[a-z]+", name.lower())
    words = {
        SPLIT_FOLDERS[bare] for part in parts for bare in (part, part.removesuffix("set")) if bare in SPLIT_FOLDERS
    }
    return words.pop() if len(words) == 1 else None


def _unwrapped(folder: Path) -> Path:
    """The folder with the classes, where one is wrapped in others of its own: `train/train/…`."""
    while len(inside := visible_folders(folder)) == 1 and any(visible_folders(inside[0])):
        folder = inside[0]
    return folder


def visible_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are not hidden, in the order of their names."""
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name))


def visible_files(folder: Path) -> list[Path]:
    """Files at any depth that neither are hidden nor lie in a hidden folder, in the order of their paths."""
    return files_below(folder, hidden=False)


def is_image(file: Path) -> bool:
    """Whether a file is an image by its ending or else by its content."""
    return file.suffix.lower() in IMAGE_SUFFIXES | {ARRAY_SUFFIX} or suffix_of(file) is not None


def suffix_of(file: Path) -> str | None:
    """The usual ending of an image with the file's content; None if it is no image or no plain file."""
    try:
        with open_plain(file, max_bytes=MAX_IMAGE_BYTES, follow_links=True) as opened:
            start = opened.read(10)
    except (OSError, UserError):
        return None
    if not start:  # empty files are damaged images if their name says so
        return ".img" if file.suffix.lower() in IMAGE_SUFFIXES else None
    return known_suffix(start) or (".img" if file.suffix.lower() in IMAGE_SUFFIXES else None)


def known_suffix(content: bytes) -> str | None:
    """The usual ending of a file that begins so; None for no known format."""
    if content.startswith(b"BM") and content[6:10] == bytes(4):  # two letters alone could begin any text
        return ".bmp"
    return next((suffix for start, suffix in _SIGNATURES.items() if content.startswith(start)), None)
