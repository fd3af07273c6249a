"""Readers for untrusted files: weights, results, lists, arrays and configs that somebody sent.

Every reader opens plain files only (no device, pipe or socket, and no link unless it says so), reads no more bytes than
its limit, unpacks and nests no more than its limits, runs nothing, and raises nothing but `UserError`.
"""

import ast
import io
import json
import math
import os
import re
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import yaml

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain, shown

MAX_TEXT_BYTES = 16_000_000
MAX_YAML_BYTES = 1_000_000
MAX_VALUES = 2_000_000  # values of a JSON file, counted by its commas and brackets
MAX_YAML_VALUES = 50_000
MAX_DEPTH = 64
MAX_LINES = 2_000_000
MAX_LINE_BYTES = 1_000_000
MAX_ARRAY_BYTES = 1_000_000_000
_MAX_MEMBERS = 100
_BEST_COMPRESSION = 200  # times; what unpacks to more than this is a bomb, unless it is small
_SMALL_BYTES = 64_000_000
_READ_BYTES = 1 << 20

_AGAIN = "Copy it again from where it was made"


def open_plain(file: Path | str, *, max_bytes: int, follow_links: bool = False) -> BinaryIO:
    """Opens a plain file for reading, in binary.

    Args:
        max_bytes: the largest size; a file that grows while it is read is the caller's to bound (`read_bytes` does).
        follow_links: whether the last part of the path may be a link, as in people's own data.

    Raises:
        UserError: for a link, a device, a pipe, a folder, or a file that is too large.
        OSError: for a file that is missing or not permitted.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    if not follow_links and os.path.islink(file):
        raise UserError(f"{plain(file)} is a link; expected a file. {_AGAIN}")
    descriptor = os.open(file, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
            raise UserError(f"{plain(file)} is {kind}; expected a file. {_AGAIN}")
        if status.st_size > max_bytes:
            raise _too_large(file, status.st_size, max_bytes)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(file: Path | str, *, max_bytes: int, follow_links: bool = False) -> bytes:
    """The content of a plain file; of one that grows meanwhile never more than the limit. Raises as `open_plain`."""
    with open_plain(file, max_bytes=max_bytes, follow_links=follow_links) as opened:
        content = opened.read(os.fstat(opened.fileno()).st_size + 1)  # not the limit: Python would ask for that memory
        while len(content) <= max_bytes and (more := opened.read(_READ_BYTES)):
            content += more
    if len(content) > max_bytes:
        raise _too_large(file, len(content), max_bytes)
    return content


def read_text(file: Path | str, *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The content of a UTF-8 file. Raises UserError; OSError for one that is missing."""
    try:
        return read_bytes(file, max_bytes=max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{plain(file)} is not UTF-8 text ({error.reason}). {_AGAIN}") from None


def read_lines(
    file: Path | str,
    *,
    max_bytes: int,
    max_lines: int = MAX_LINES,
    max_line_bytes: int = MAX_LINE_BYTES,
    follow_links: bool = False,
) -> Iterator[str]:
    """The lines of a UTF-8 file, each with its line end; one of them is in memory at a time.

    Raises:
        UserError: as `open_plain`, and for lines that are too many, too long or no text.
        OSError: for a file that is missing or not permitted.
    """
    with open_plain(file, max_bytes=max_bytes, follow_links=follow_links) as opened:
        read = number = 0
        while line := opened.readline(max_line_bytes + 1):
            read, number = read + len(line), number + 1
            if read > max_bytes:  # it has grown
                raise _too_large(file, read, max_bytes)
            if number > max_lines:
                raise UserError(f"{plain(file)} has more than {max_lines:,} lines; expected fewer. {_AGAIN}")
            if len(line) > max_line_bytes:
                raise UserError(
                    f"{plain(file)}:{number} has more than {max_line_bytes:,} bytes; expected fewer. {_AGAIN}"
                )
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{plain(file)}:{number} is not UTF-8 text ({error.reason}). {_AGAIN}") from None


# JSON


def read_json(
    file: Path | str, *, max_bytes: int = MAX_TEXT_BYTES, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH
) -> Any:
    """The values of a strict JSON file (no NaN or infinity). Raises UserError; OSError for one that is missing."""
    text = read_text(file, max_bytes=max_bytes)
    return parse_json(text, str(file), max_values=max_values, max_depth=max_depth)


def parse_json(text: str, where: str, *, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH) -> Any:
    """As `read_json`, from a text. `where` names it in messages."""
    values = sum(map(text.count, ",[{"))
    if values > max_values:
        raise UserError(f"{plain(where)} holds {values:,} values; expected at most {max_values:,}. {_AGAIN}")
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise UserError(f"{plain(where)} is nested too deeply; expected at most {max_depth} levels. {_AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{plain(where)} is no valid JSON ({plain(error)}). {_AGAIN}") from None
    _check_depth(content, where, max_depth)
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def _check_depth(content: Any, where: str, max_depth: int) -> None:
    level, depth = [content], 0
    while level:
        level = [item for value in level for item in _children(value)]
        depth += 1
        if depth > max_depth + 1:
            raise UserError(f"{plain(where)} is nested too deeply; expected at most {max_depth} levels. {_AGAIN}")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


# YAML


SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's takes a tenth of the time


class _Loader(yaml.SafeLoader):
    """YAML's plain values. Numbers such as 1e-3, which YAML 1.1 takes for text, are numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:timestamp",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+"),
    list("-+0123456789."),
)


def read_yaml(file: Path | str, *, max_bytes: int = MAX_YAML_BYTES, references: bool = False) -> Any:
    """The plain values of a YAML file: no anchors, tags or repeated keys.

    Args:
        references: whether keys and values may hold `${`, which OmegaConf would resolve (environment variables, other
            keys). Never for untrusted files.

    Raises:
        UserError: for any other content; OSError for a file that is missing.
    """
    return parse_yaml(read_text(file, max_bytes=max_bytes), str(file), references=references)


def parse_yaml(text: str, where: str, *, references: bool = False) -> Any:
    """As `read_yaml`, from a text. `where` names it in messages."""
    try:
        _check_events(text, where)
        content = _Loader(text).get_single_data()
        _check_keys(content, where)
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{plain(where)} is no valid YAML ({plain(error)}). {_AGAIN}") from None
    if not references:
        refuse_references(content, where)
    return content


def refuse_references(content: Any, where: str) -> None:
    """Raises UserError where a key or value holds `${`, however the file had written it."""
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{plain(where)}: {shown(value)} is a reference; expected plain values. Write the value out"
            )
        stack.extend(_children(value))
        if isinstance(value, dict):
            stack.extend(value)


def _check_events(text: str, where: str) -> None:
    """Raises UserError for anchors (each alias is a copy), tags and large contents, before anything is built."""
    depth = 0
    for values, event in enumerate(yaml.parse(text, Loader=SafeLoader)):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UserError(f"{plain(where)} has an anchor or alias; expected plain values. Write the values out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UserError(f"{plain(where)} has the tag {shown(tag)}; expected plain values. Remove it")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH or values > MAX_YAML_VALUES:
            raise UserError(
                f"{plain(where)} is too large; expected at most {MAX_YAML_VALUES:,} values in {MAX_DEPTH} levels. "
                f"{_AGAIN}"
            )


def _check_keys(content: Any, where: str) -> None:
    stack = [content]
    while stack:
        value = stack.pop()
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, (str, int, bool)):
                raise UserError(f"{plain(where)}: the key {shown(key)} is no text; expected a name. Correct it")
        stack.extend(_children(value))


# Arrays


def read_arrays(
    file: Path | str, *, max_bytes: int = MAX_ARRAY_BYTES, kinds: str = "biufUS", follow_links: bool = False
) -> dict[str, np.ndarray]:
    """The arrays of an npz file.

    Types and shapes are read and checked before any memory is taken; nothing is unpickled.

    Args:
        max_bytes: largest size of all arrays together, unpacked, in bytes.
        kinds: NumPy's letters of the kinds of type that are allowed.

    Raises:
        UserError: for any other content; OSError for a file that is missing.
    """
    try:
        with open_plain(file, max_bytes=max_bytes, follow_links=follow_links) as opened:
            size = os.fstat(opened.fileno()).st_size
            with open_zip(opened, str(file), max_members=_MAX_MEMBERS) as archive:
                infos = archive.infolist()
                _check_members(file, infos, min(max_bytes, max(_SMALL_BYTES, _BEST_COMPRESSION * size)))
                return {info.filename.removesuffix(".npy"): _read_array(archive, info, kinds) for info in infos}
    except UserError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        raise UserError(
            f"{plain(file)} cannot be read ({type(error).__name__}: {plain(error)}); expected a complete npz file of "
            "plain arrays. Get or write it again"
        ) from None


def array_from(content: bytes, kinds: str = "biuf") -> np.ndarray:
    """The array of a file in NumPy's format (.npy), given its bytes; nothing is unpickled. Raises UserError."""
    try:
        stream = io.BytesIO(content)
        shape, order, dtype, _ = _read_header(stream, "it", len(content), kinds)
        return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order=order)
    except _UNREADABLE as error:
        raise UserError(f"no array that can be read ({type(error).__name__}: {plain(error)})") from None


# Errors of zipfile and NumPy on damaged files; an array's header is a literal of Python, read as such.
_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    OverflowError,
    RecursionError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    KeyError,
    zlib.error,
    zipfile.BadZipFile,
    tokenize.TokenError,
)


def _check_members(file: Path | str, infos: list[zipfile.ZipInfo], max_bytes: int) -> None:
    if len({info.filename for info in infos}) != len(infos):
        raise UserError(f"{plain(file)} has an array twice; expected each once. {_AGAIN}")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max_bytes:
        raise UserError(f"{plain(file)} unpacks to {unpacked:,} bytes; expected at most {max_bytes:,}. Split it")


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str) -> np.ndarray:
    with archive.open(info) as member:
        shape, order, dtype, expected = _read_header(member, info.filename, info.file_size, kinds)
        content = bytearray()
        while block := member.read(_READ_BYTES):  # at the end zipfile compares the checksum
            content += block
        if len(content) != expected:
            raise EOFError(f"{info.filename} ends after {len(content):,} of {expected:,} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _read_header(
    member: Any, name: str, size: int, kinds: str
) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype, int]:
    """Shape, order and type of an array in NumPy's format, and the bytes of its values, which are all that follows.

    Args:
        name: names it in messages.
        size: size of the header and the values.
        kinds: as in `read_arrays`.
    """
    start = member.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("no array of NumPy")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(member.read(width), "little")
    if length > 10_000:
        raise ValueError(f"a header of {length:,} bytes")
    header = ast.literal_eval(member.read(length).decode("latin1").strip())
    shape, descr = header["shape"], header["descr"]
    if not (isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape) and len(shape) <= 32):
        raise ValueError(f"a shape of {shown(shape)}")
    if not isinstance(descr, str):
        raise ValueError("an array of records")
    dtype = np.dtype(descr)
    if dtype.hasobject or dtype.kind not in kinds or dtype.itemsize == 0:
        raise ValueError(f"{name} holds {dtype}; plain arrays of kinds {kinds} are read")
    expected, found = math.prod(shape) * dtype.itemsize, size - (8 + width + length)
    if expected != found:
        raise ValueError(f"{name} declares {expected:,} bytes and has {found:,}")
    return shape, "F" if header["fortran_order"] else "C", dtype, expected


def _too_large(file: Path | str, size: int, max_bytes: int) -> UserError:
    return UserError(f"{plain(file)} has {size:,} bytes; expected at most {max_bytes:,}. {_AGAIN}")


# Folders


# What operating systems, network drives and archives of macOS put beside people's files.
_OF_SYSTEMS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_OF_SYSTEMS |= {"Thumbs.db", "desktop.ini"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none that a person made to be seen."""
    return name.startswith(".") or name in _OF_SYSTEMS


def files_below(folder: Path, *, hidden: bool = True) -> list[Path]:
    """Everything below `folder` that is no folder, sorted. Linked folders are not entered; vanished ones are skipped.

    Args:
        hidden: whether files and folders count that `is_hidden` says of.

    Raises:
        UserError: for folders nested deeper than anybody makes by hand, because each level costs time.
    """
    found = []
    todo = [(folder, 0)]
    while todo:
        place, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{plain(folder)} has folders in more than {MAX_DEPTH} levels; expected fewer. Clear it up")
        with suppress(OSError), os.scandir(place) as entries:
            for entry in entries:
                if not hidden and is_hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    todo.append((place / entry.name, depth + 1))
                else:
                    found.append(place / entry.name)
    return sorted(found)


def refuse_links(path: Path, base: Path) -> None:
    """Raises UserError where a folder below `base`, on the way to `path`, is a link: files would be written elsewhere.

    Links above `base` are the user's own.
    """
    for place in (path, *path.parents):
        if place == base:
            return
        if place.is_symlink():
            raise UserError(
                f"{plain(place, 1_000)} is a link to {plain(os.readlink(place))}; expected none, as files are written "
                "there. If it is yours, put there what it leads to, or choose another folder (paths.outputs=DIR)"
            )


# Zip files


@contextmanager
def open_zip(opened: BinaryIO, where: str, *, max_members: int) -> Iterator[zipfile.ZipFile]:
    """Opens a zip file with a directory of limited size; members must be stored or deflated.

    Args:
        opened: result of `open_plain`.
        where: names the file in messages.

    Raises:
        UserError: for a directory that is too large, and for other compressions, whose readers take memory by what a
            member declares.
        zipfile.BadZipFile: for a directory that is damaged; callers know where the file is from, and say what to do.
    """
    try:
        members = _count_members(opened)
        if members > max_members:
            raise UserError(f"{plain(where)} has {members:,} members; expected at most {max_members:,}. Take another")
        archive = zipfile.ZipFile(opened)
    except UserError:
        raise
    except (ValueError, OSError, NotImplementedError, struct.error) as error:
        raise zipfile.BadZipFile(plain(error)) from None
    with archive:
        for info in archive.infolist():
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{plain(where)}: {shown(info.filename)} is compressed in a way that is not read here; expected "
                    "stored or deflated members. Pack it again"
                )
        yield archive


def _count_members(opened: BinaryIO) -> int:
    """Members of a zip file, counted where its directory is, before anything is made of them.

    The records at the end tell where that is (APPNOTE.TXT, 4.3.14 to 4.3.16); the number of members that they state is
    not asked, as readers do not ask it either.
    """
    size = opened.seek(0, os.SEEK_END)
    start = max(0, size - (1 << 16) - 22 - 20 - 56)  # the longest comment, and the records before it
    opened.seek(start)
    tail = opened.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + 22 > len(tail):
        raise zipfile.BadZipFile("its directory is missing")
    (length,) = struct.unpack_from("<L", tail, end + 12)
    directory_end = start + end
    if tail[max(0, end - 20) :].startswith(b"PK\6\7") and tail[max(0, end - 76) :].startswith(b"PK\6\6"):
        (length,) = struct.unpack_from("<Q", tail, end - 76 + 40)
        directory_end -= 76
    if length > directory_end:
        raise zipfile.BadZipFile("its directory is longer than the file")
    opened.seek(directory_end - length)
    members, previous, left = 0, b"", length
    while left > 0 and (block := opened.read(min(left, _READ_BYTES))):
        members += (previous + block).count(b"PK\1\2")
        previous, left = block[-3:], left - len(block)
    opened.seek(0)
    return members


def count_scans(content: bytes) -> int:
    """Scans of a JPEG file: each is decoded over the whole image, and a file can repeat them at little cost.

    Counts start-of-scan markers; in coded data they cannot occur, so that only an embedded preview adds to them.
    """
    return content.count(b"\xff\xda")
