"""Files with tensors, read within bounds: safetensors, and PyTorch's through its restricted unpickler.

The content decides the format, never the name. Nothing in a file is executed.
"""

import argparse
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.pickle_checks import check_pickle
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.untrusted import open_plain, open_zip

MAX_BYTES = 16_000_000_000  # a file of weights
MAX_HEADER = 5_000_000  # bytes of safetensors' header: some 40,000 tensors
_MAX_PICKLE = 50_000_000
_MAX_MEMBERS = 100_000  # members of PyTorch's zip files, a tensor each
_BLOCK = 1 << 20
_ZIP = b"PK\3\4"
_TRAILER = b"\nsha256:"  # after the file that `torch.save` writes, which PyTorch's reader takes no notice of
_TRAILER_BYTES = len(_TRAILER) + 64
_FORMS = "Expected safetensors, or a PyTorch file that holds tensors only"


def read_tensors(file: Path | str, *, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a file of weights: a dict of tensors, or the value given to `torch.save` if it is plain data.

    Args:
        max_bytes: largest size of the file in bytes; no tensor takes more memory than the file has for it.

    Raises:
        UserError: for a file that is damaged, holds more than tensors and plain data, or exceeds the limits.
        OSError: for a file that is missing or not permitted.
    """
    with open_plain(file, max_bytes=max_bytes, follow_links=True) as opened:
        if is_safetensors(opened):
            try:
                return load_file(file)
            except (SafetensorError, MemoryError) as error:  # the file is mapped, and no room for that is no memory
                raise UserError(
                    f"{plain(file)} cannot be read as safetensors ({plain(error)}); download it again"
                ) from None
        return _load(opened, str(file), f". {_FORMS}; download it again")


def is_safetensors(opened: BinaryIO) -> bool:
    """Whether the content begins as safetensors does: the length of a header, and the header's brace."""
    start = opened.read(9)
    opened.seek(0)
    return len(start) == 9 and int.from_bytes(start[:8], "little") <= MAX_HEADER and start[8:] == b"{"


def metadata_of(file: Path | str) -> dict[str, Any]:
    """The metadata of a safetensors file that `read_tensors` has read; {} for other files."""
    with open_plain(file, max_bytes=MAX_BYTES, follow_links=True) as opened:
        if not is_safetensors(opened):
            return {}
        metadata = json.loads(opened.read(int.from_bytes(opened.read(8), "little"))).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


# What people find in the place of a checkpoint: what it is → whether a file that starts so is one.
_NO_CHECKPOINTS: dict[str, Callable[[bytes], bool]] = {
    "a pointer of Git LFS instead of the file (`git lfs pull` fetches it)": lambda start: start.startswith(
        b"version https://git-lfs"
    ),
    "a web page": lambda start: start.lstrip().lower().startswith((b"<!doctype", b"<html")),
}


def _load(opened: BinaryIO, where: str, remedy: str, map_location: Any = "cpu") -> Any:
    """Reads a file of PyTorch's. `argparse.Namespace` is allowed: a leftover of training in official files.

    Args:
        remedy: ends each message, with the sign before it.
    """
    start = opened.read(64)
    opened.seek(0)
    for kind, is_it in _NO_CHECKPOINTS.items():
        if is_it(start):
            raise UserError(f"{plain(where)} cannot be read as a checkpoint: it is {kind}{remedy}")
    try:
        _check_pickles(opened)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(opened, map_location=map_location, weights_only=True)
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(f"{plain(where)} cannot be read as a checkpoint: {error}{remedy}") from None
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{plain(where)} cannot be read as a checkpoint: it is damaged or not a zip file ({plain(error)}){remedy}"
        ) from None
    except Exception as error:  # the restricted unpickler raises anything on bytes that are no pickle
        # Its text is advice to run what the file holds.
        raise UserError(
            f"{plain(where)} cannot be read as a checkpoint: it is damaged, or holds more than tensors "
            f"({type(error).__name__}){remedy}"
        ) from None
    for tensor in _tensors(content):
        size = tensor.numel() * tensor.element_size()
        if tensor.layout is not torch.strided or size > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{plain(where)} holds a tensor of shape {tuple(tensor.shape)} whose values are not in the file{remedy}"
            )
    return content


def _check_pickles(opened: BinaryIO) -> None:
    """Checks the pickles that PyTorch will read. Raises UserError (which calls the file "it") or another error."""
    is_zip = opened.read(4) == _ZIP
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    if not is_zip:  # as before PyTorch 1.6: four pickles (number, version, machine, content), and the tensors
        for _ in range(5):
            check_pickle(opened)
        opened.seek(0)
        return
    with open_zip(opened, "it", max_members=_MAX_MEMBERS) as archive:
        infos = archive.infolist()
        # Stored without compression, so that what they unpack to is what they take.
        if any(info.compress_type for info in infos) or sum(info.file_size for info in infos) > size:
            raise UserError("it is compressed; expected a file as torch.save writes it")
        for info in infos:
            if info.filename.endswith(".pkl"):
                if info.file_size > _MAX_PICKLE:
                    raise UserError(f"{info.file_size:,} bytes of it are no tensors; expected at most {_MAX_PICKLE:,}")
                check_pickle(io.BytesIO(archive.read(info)))
    opened.seek(0)


def _tensors(content: Any) -> Iterator[Tensor]:
    stack, seen = [content], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, Mapping) else value)


@contextmanager
def system_errors(path: str | Path) -> Iterator[None]:
    """Turns safetensors' errors of the disk back into the OSError that they were, which names `path`."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


# Our own files


def with_checksum(content: Any) -> bytes:
    """`torch.save` of a value, followed by a sha256 that `load_checked` compares."""
    file = io.BytesIO()
    torch.save(content, file)
    saved = file.getvalue()
    return saved + _TRAILER + hashlib.sha256(saved).hexdigest().encode()


def load_checked(file: Path | str, *, max_bytes: int = MAX_BYTES, map_location: Any = "cpu") -> Any:
    """Reads a value that `with_checksum` wrote.

    Raises:
        UserError: for a file that differs from what was written, in any bit. The caller knows the remedy.
        OSError: for a file that is missing or not permitted.
    """
    with open_plain(file, max_bytes=max_bytes) as opened:
        if not _is_as_written(opened):
            raise UserError(f"{plain(file)} cannot be read: it is not as it was written (its checksum differs)")
        return _load(opened, str(file), "", map_location)


def _is_as_written(opened: BinaryIO) -> bool:
    """Whether the trailer is the checksum of what stands before it; the file is read block by block."""
    left = opened.seek(0, os.SEEK_END) - _TRAILER_BYTES
    opened.seek(max(0, left))
    trailer = opened.read(_TRAILER_BYTES)
    if not trailer.startswith(_TRAILER):
        return False
    opened.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := opened.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    opened.seek(0)
    return trailer == _TRAILER + digest.hexdigest().encode()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not tensor.is_meta:  # a model without values, made to count parameters
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
