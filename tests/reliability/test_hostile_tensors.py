"""Weights and checkpoints that somebody sends to do harm; tests/helpers/hostile.py says how to add a row."""

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hostile
from helpers.hostile import Action, World
from safetensors.torch import save_file

from mambapeft_vision.backbones.weights import read_state_dict
from mambapeft_vision.engine.checkpoint import AtomicCheckpointIO
from mambapeft_vision.utils.tensor_files import MAX_BYTES, load_checked, read_tensors, with_checksum

TABLE, attack = hostile.table(mib=100)


def saved(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, with that pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def deflated(content: bytes) -> bytes:
    """The same zip file, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as given_zip, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        for info in given_zip.infolist():
            out.writestr(info.filename, given_zip.read(info))
    return file.getvalue()


def as_tar() -> bytes:
    """The oldest of PyTorch's formats."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


class Mark:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.mkdir, ("/tmp/must-not-be-made",))


def number(value: int) -> bytes:
    """Of a pickle: puts a whole number on the stack."""
    return b"\x8a\x08" + value.to_bytes(8, "little")


def called(name: str, *arguments: bytes) -> bytes:
    """A pickle of {"m": name(*arguments)}."""
    marked = b"(" + b"".join(arguments) + b"t"
    return b"\x80\x02}X\1\0\0\0mc" + name.replace(" ", "\n").encode() + b"\n" + marked + b"Rs."


PAIRS = b"](" + b"".join(b"K\1" + bytes([75, n % 250]) + b"\x86" for n in range(10_000)) + b"e"
COPIES = (
    b"\x80\x02]q\0(ccollections\nOrderedDict\nq\1" + PAIRS + b"q\2\x85R" + b"h\1h\2\x85R" * 20_000 + b"e."
)  # fmt: skip
STRIDES = {"model": {"a": torch.zeros(1, dtype=torch.int8).expand(40_000, 40_000)}}
PICKLES: dict[str, bytes] = {
    "bytes without end": called("builtins bytearray", number(5 * 10**9)),
    "bytes without end, in Python 2": called("__builtin__ bytearray", number(5 * 10**9)),
    "a tensor of any size": called("torch FloatTensor", number(10**9)),
    "a storage of any size": called("torch.storage UntypedStorage", number(5 * 10**9)),
    "a tensor made of another": called("torch._utils _rebuild_device_tensor_from_cpu_tensor", b"N", b"N", b"N", b"N"),
    "copies of a list": COPIES,
    "a set of a list": called("builtins set", PAIRS),
    "bytes of a text": called("_codecs encode", b"X\1\0\0\0a", b"X\6\0\0\0utf-32"),
    "a place beyond all others": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text that is not there": b"\x80\x02X\xff\xff\xff\x7fa.",
    "a newer kind of text": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"a.",
    "code by its newer name": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "code": pickle.dumps({"model": Mark()}, 2),
    "a hundred thousand lists in each other": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "no end": b"\x80\x02}",
}
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (lambda: deflated(saved({"model": {"a": torch.zeros(10_000_000)}})), "is compressed"),
    "compressed otherwise": (lambda: zipped(b"\x80\x02}.", zipfile.ZIP_LZMA), "compressed in a way"),
    "a tensor without values": (lambda: saved(STRIDES), "whose values are not in the file"),
    "a tensor without values, in the older form": (
        lambda: saved(STRIDES, _use_new_zipfile_serialization=False),
        "whose values are not in the file",
    ),
    "a tensor of no storage": (lambda: saved({"model": {"a": torch.zeros(3, device="meta")}}), "cannot be read"),
    "a sparse tensor": (lambda: saved({"model": {"a": torch.eye(3).to_sparse()}}), "cannot be read"),
    "a tensor": (lambda: saved(torch.zeros(3)), "no state dict"),
    "a list": (lambda: saved([1]), "no state dict"),
    "tensors by numbers": (lambda: saved({"model": {1: torch.zeros(3)}}), "no state dict"),
    "an archive of tape": (as_tar, "cannot be read"),
    "bare code": (lambda: pickle.dumps({"model": Mark()}), "holds more than tensors"),
    "damaged text in a pickle": (lambda: b"\x80\x02X\x03\x00\x00\x00\xff\xfe\xfd.", "cannot be read"),
    "nothing": (lambda: b"", "cannot be read"),
    "half a zip file": (lambda: saved({"model": {"a": torch.zeros(3)}})[:300], "damaged or not a zip file"),
    "a cut safetensors file": (lambda: (500).to_bytes(8, "little") + b"{" + b" " * 100, "safetensors"),
    "a safetensors file of a million tensors": (lambda: safetensors(1_000_000), "cannot be read"),
    **{name: (lambda content=content: zipped(content), "") for name, content in PICKLES.items()},
}


def safetensors(count: int) -> bytes:
    """A file of that many empty tensors."""
    entry = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % n for n in range(count)) + "}").encode()
    return len(header).to_bytes(8, "little") + header


for name, (make, word) in FILES.items():

    @attack(f"weights are {name}", ["w.pth", word], disk_mib=80)
    def _(world: World, make: Callable[[], bytes] = make) -> Action:
        (world.folder / "w.pth").write_bytes(make())
        return lambda: read_state_dict(world.folder / "w.pth")

    @attack(f"a checkpoint is {name}", ["w.ckpt", "delete it"], disk_mib=80)
    def _(world: World, make: Callable[[], bytes] = make) -> Action:
        content = make()
        (world.folder / "w.ckpt").write_bytes(content + trailer(content))
        return lambda: AtomicCheckpointIO().load_checkpoint(world.folder / "w.ckpt")


def trailer(content: bytes) -> bytes:
    """Anybody can compute the checksum of a checkpoint."""
    import hashlib

    return b"\nsha256:" + hashlib.sha256(content).hexdigest().encode()


@attack("a sparse checkpoint", ["w.ckpt", "checksum differs"], seconds=1)
def _(world: World) -> Action:
    with open(world.folder / "w.ckpt", "wb") as file:
        file.truncate(MAX_BYTES)
    return lambda: AtomicCheckpointIO().load_checkpoint(world.folder / "w.ckpt")


@attack("sparse weights", ["w.pth", "cannot be read"], seconds=1)
def _(world: World) -> Action:
    with open(world.folder / "w.pth", "wb") as file:
        file.truncate(MAX_BYTES)
    return lambda: read_state_dict(world.folder / "w.pth")


@attack("weights of more than the limit", ["w.pth", "bytes; expected at most"], seconds=1)
def _(world: World) -> Action:
    with open(world.folder / "w.pth", "wb") as file:
        file.truncate(1 << 40)
    return lambda: read_state_dict(world.folder / "w.pth")


@attack("a checkpoint that is a pipe", ["pipe"])
def _(world: World) -> Action:
    import os

    os.mkfifo(world.folder / "w.ckpt")
    return lambda: AtomicCheckpointIO().load_checkpoint(world.folder / "w.ckpt")


@attack("a checkpoint that is a link", ["is a link"])
def _(world: World) -> Action:
    path = world.link("w.ckpt")
    return lambda: AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("name", TABLE)
def test_attack(name, tmp_path):
    hostile.check(TABLE[name], name, tmp_path)
    assert not Path("/tmp/must-not-be-made").exists()


def test_weights_are_known_by_their_content(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "w.pth")  # as in the cache of a hub, where files have no ending
    torch.save({"model": state}, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert torch.equal(read_state_dict(tmp_path / name)["a"], state["a"])


@pytest.mark.parametrize("zipped", [True, False])
def test_what_honest_files_hold_is_read(tmp_path, zipped):
    """The state of an optimiser, half precision, numbers of any size, and what argparse left in official files."""
    from argparse import Namespace
    from collections import OrderedDict

    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": model.weight,
        "half": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.float16, torch.int8, torch.bool)],
        "args": Namespace(model="vim", lr=1e-3, size=(1, 2), none=None),
        "numbers": [0, -1, 300, 70_000, 2**40, 10**30, 0.5, True, *range(3_000)],
        "kinds": (torch.Size([1]), torch.device("cpu"), torch.float32, OrderedDict(a=1)),
    }
    (tmp_path / "w.pth").write_bytes(saved(content, _use_new_zipfile_serialization=zipped))
    found = read_tensors(tmp_path / "w.pth")
    assert found.keys() == content.keys() and found["numbers"] == content["numbers"]
    assert found["kinds"] == content["kinds"] and found["args"] == content["args"]
    assert torch.equal(found["parameter"], model.weight)
    (tmp_path / "w.ckpt").write_bytes(with_checksum(content))
    assert load_checked(tmp_path / "w.ckpt")["numbers"] == content["numbers"]


def test_the_header_of_a_large_model_is_read(tmp_path):
    """1,024 blocks of 30 tensors are far more than any model has."""
    (tmp_path / "w.safetensors").write_bytes(safetensors(1_024 * 30))
    assert len(read_state_dict(tmp_path / "w.safetensors")) == 1_024 * 30
