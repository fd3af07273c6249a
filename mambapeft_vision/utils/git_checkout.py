"""The commit of a checkout and whether its files differ from it, read from git's own files.

`git` itself is never started: the configuration of a repository can name programs that it runs (core.fsmonitor,
filters, hooks), and the repository around an installed package may come from anybody. The formats are those of
gitrepository-layout(5), gitformat-index(5) and gitformat-pack(5).
"""

import hashlib
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "mambapeft_vision/__init__.py"  # tracked in a checkout of this project
_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MOST_BYTES = 2**26  # one of git's files
_MOST_FILES = 50_000  # tracked
_COMMIT = 1  # type of an object in a pack
_GITLINK = 0o16  # kind of an entry that stands for a submodule
_SYMLINK = 0o12


def checkout_state(root: Path, tracked: str = PACKAGE) -> tuple[str | None, bool | None]:
    """Commit and whether tracked files differ from it.

    Args:
        root: folder that holds `.git`.
        tracked: path of a file that git must know here; otherwise the repository is not ours.

    Returns:
        (None, None) outside of a checkout of ours; None for "differs" where git's files do not tell (a format that is
        not read here, a commit that is stored as a difference).
    """
    try:
        git = _git_folder(root)
        index = None if git is None else _read_index(git / "index")
        if git is None or index is None or tracked not in {entry.path for entry in index.entries}:
            return None, None
        commit = _head(git)
        return commit, None if commit is None else _differs(root, git, index, commit)
    except (OSError, ValueError, LookupError, StopIteration, struct.error, zlib.error):
        return None, None


# Folders and references


def _git_folder(root: Path) -> Path | None:
    """`.git`, or the folder that the file `.git` of a linked worktree names."""
    place = root / ".git"
    if place.is_dir():
        return place
    if not place.is_file():
        return None
    kind, _, path = _text(place).partition(": ")
    return root / path if kind == "gitdir" else None


def _common(git: Path) -> Path:
    """The folder with objects and branches, which linked worktrees share."""
    file = git / "commondir"
    return git / _text(file) if file.is_file() else git


def _head(git: Path) -> str | None:
    kind, _, name = _text(git / "HEAD").partition(": ")
    if kind != "ref":
        return kind if _ID.fullmatch(kind) else None
    if not name.startswith("refs/") or ".." in name:
        return None
    for folder in (git, _common(git)):
        if (folder / name).is_file():
            found = _text(folder / name)
            return found if _ID.fullmatch(found) else None
    packed = _common(git) / "packed-refs"
    lines = _text(packed).splitlines() if packed.is_file() else []
    return next((line[: -len(name) - 1] for line in lines if line.endswith(f" {name}")), None)


# The index


@dataclass(frozen=True)
class _Entry:
    """A tracked file. seconds, nanoseconds: time of its last change when git wrote it; ignored: git skips it."""

    path: str
    mode: int
    size: int
    seconds: int
    nanoseconds: int
    id: bytes
    stage: int
    ignored: bool


@dataclass(frozen=True)
class _Index:
    """tree: id of the tree that a commit of the index would have; None where files are staged."""

    entries: list[_Entry]
    tree: bytes | None


def _read_index(file: Path) -> _Index:
    content = _bytes(file)
    signature, version, count = struct.unpack_from(">4sII", content)
    if signature != b"DIRC" or version not in (2, 3):
        raise ValueError(f"index of version {version}")
    if count > _MOST_FILES:
        raise ValueError(f"{count:,} tracked files")
    entries, place = [], 12
    for _ in range(count):
        _, _, seconds, nanoseconds, _, _, mode, _, _, size = struct.unpack_from(">10I", content, place)
        identity = content[place + 40 : place + 60]
        (flags,) = struct.unpack_from(">H", content, place + 60)
        extended = bool(flags & 0x4000)
        begin = place + (64 if extended else 62)
        end = content.index(b"\0", begin)
        skipped = extended and bool(struct.unpack_from(">H", content, place + 62)[0] & 0x4000)
        path = content[begin:end].decode("utf-8", "surrogateescape")
        ignored = bool(flags & 0x8000) or skipped
        entries.append(_Entry(path, mode, size, seconds, nanoseconds, identity, flags >> 12 & 3, ignored))
        place += (end - place) // 8 * 8 + 8  # filled up with zeros
    return _Index(entries, _staged_tree(content[place:-20]))


def _staged_tree(extensions: bytes) -> bytes | None:
    place = 0
    while place < len(extensions):
        name, size = struct.unpack_from(">4sI", extensions, place)
        body = extensions[place + 8 : place + 8 + size]
        if name == b"TREE":
            path, _, rest = body.partition(b"\0")
            counts, _, identity = rest.partition(b"\n")
            known = path == b"" and not counts.startswith(b"-")
            return identity[:20] if known else None
        place += 8 + size
    return None


# Differences


def _differs(root: Path, git: Path, index: _Index, commit: str) -> bool | None:
    written = (git / "index").stat().st_mtime_ns
    if any(_has_changed(root, entry, written) for entry in index.entries):
        return True
    if index.tree is None:
        return True  # something is staged
    tree = _tree_of(_common(git), commit)
    return None if tree is None else tree != index.tree.hex()


def _has_changed(root: Path, entry: _Entry, written: int) -> bool:
    kind = entry.mode >> 12
    if entry.stage:
        return True
    if entry.ignored or kind == _GITLINK:
        return False
    try:
        found = (root / entry.path).lstat()
    except FileNotFoundError:
        return True
    if kind == _SYMLINK:
        return not stat.S_ISLNK(found.st_mode)
    if not stat.S_ISREG(found.st_mode):
        return True
    if bool(found.st_mode & stat.S_IXUSR) != bool(entry.mode & stat.S_IXUSR):
        return True
    changed = divmod(found.st_mtime_ns, 10**9)
    # A file that changed as late as git wrote its index may have changed once more since then.
    if changed == (entry.seconds, entry.nanoseconds) and found.st_mtime_ns < written:
        return found.st_size % 2**32 != entry.size
    content = _bytes(root / entry.path)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).digest() != entry.id


# Objects


def _tree_of(common: Path, commit: str) -> str | None:
    """The tree of a commit; None where it is not found, or is stored as a difference."""
    loose = common / "objects" / commit[:2] / commit[2:]
    content = _start_of(_bytes(loose)).partition(b"\0")[2] if loose.is_file() else _packed(common, commit)
    match = re.match(rb"tree ([0-9a-f]{40})\n", content or b"")
    return match[1].decode() if match else None


def _packed(common: Path, commit: str) -> bytes | None:
    for index in sorted((common / "objects" / "pack").glob("*.idx")):
        offset = _offset(index, bytes.fromhex(commit))
        if offset is None:
            continue
        with open(index.with_suffix(".pack"), "rb") as file:
            file.seek(offset)
            head = file.read(4096)
        if head[0] >> 4 & 7 != _COMMIT:
            return None
        begin = next(place for place, byte in enumerate(head) if byte < 0x80) + 1  # the size ends there
        return _start_of(head[begin:])
    return None


def _start_of(compressed: bytes) -> bytes:
    """Of an object only its beginning: it can unpack to any size."""
    return zlib.decompressobj().decompress(compressed, 200)


def _offset(index: Path, identity: bytes) -> int | None:
    """Where a pack has an object, by its index of version 2; None where it has not."""
    content = _bytes(index)
    if content[:8] != b"\377tOc\0\0\0\2":
        return None
    counts = struct.unpack_from(">256I", content, 8)
    first, last = (counts[identity[0] - 1] if identity[0] else 0), counts[identity[0]]
    for number in range(first, last):
        begin = 1032 + 20 * number
        if content[begin : begin + 20] == identity:
            (offset,) = struct.unpack_from(">I", content, 1032 + 24 * counts[255] + 4 * number)
            return None if offset >= 2**31 else offset
    return None


def _bytes(file: Path) -> bytes:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file} is no file")
    with open(file, "rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{file} is too large")
    return content


def _text(file: Path) -> str:
    return _bytes(file).decode("utf-8").strip()
