"""Files that somebody sends to do harm: refused in one message, quickly, in little memory, with nothing else touched.

tests/helpers/hostile.py says how to add a row.
"""

import io
import json
import mmap
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import hostile
from helpers.hostile import Action, World
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.data import cache
from mambapeft_vision.data.image_list import parse_list, read_list
from mambapeft_vision.data.images import decode_list
from mambapeft_vision.data.manifest import MANIFEST_FILE, read_entry
from mambapeft_vision.data.own.table import read_table
from mambapeft_vision.data.prepare import archive
from mambapeft_vision.data.prepare.archive import copy_tasks, extract_tasks
from mambapeft_vision.data.prepare.importer import EncodedImage, EncodedSplits, import_task, lay_out_task, read_labelled
from mambapeft_vision.data.prepare.verify import verify_task
from mambapeft_vision.data.preprocessing import Preprocessing, decode_image
from mambapeft_vision.data.tasks import Task
from mambapeft_vision.integrations.from_peft import from_peft
from mambapeft_vision.run.predict import files_in, output
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.lock import locked, one_at_a_time, sole_writer
from mambapeft_vision.utils.typed import build
from mambapeft_vision.utils.untrusted import parse_json, read_arrays, read_json, read_yaml

PREPROCESSING = Preprocessing((4, 4), "bicubic", (0.5,) * 3, (0.5,) * 3)
TOY = Task("toy", "natural", 3, 4, num_train=5, num_val=2)


TABLE, attack = hostile.table()


# Kinds of files


def special(name: str, kind: str, world: World) -> Path:
    path = world.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.mkdir()
    return path


def an_image(world: World, content: bytes | None = None, name: str = "0.png") -> Path:
    """A list that names one image; its content is the attack."""
    if content is not None:
        (world.folder / name).write_bytes(content)
    file = world.folder / "test.txt"
    file.write_text(f"{name} 0\n")
    return file


def decode(file: Path) -> object:
    return decode_list(read_list(file, 2, remedy=""), PREPROCESSING)


for kind, word in {"pipe": "pipe", "device": "", "folder": "folder", "loop": ""}.items():

    @attack(f"JSON is a {kind}", words=[word or "is a link"])
    def _(world: World, kind: str = kind) -> Action:
        path = special("result.json", kind, world)
        return lambda: read_json(path)

    @attack(f"list is a {kind}", words=["test.txt", "missing" if kind == "loop" else word or "device"])
    def _(world: World, kind: str = kind) -> Action:
        path = special("test.txt", kind, world)
        return lambda: read_list(path, 3, remedy="")

    @attack(f"manifest is a {kind}", words=[] if kind == "loop" else [MANIFEST_FILE, word or "is a link"])
    def _(world: World, kind: str = kind) -> Action:
        special(MANIFEST_FILE, kind, world)
        return lambda: read_entry(world.folder, "toy")

    @attack(f"image is a {kind}", words=["test.txt:1", word or ("cannot decode" if kind == "loop" else "device")])
    def _(world: World, kind: str = kind) -> Action:
        special("0.png", kind, world)
        file = an_image(world)
        return lambda: decode(file)

    @attack(f"npz is a {kind}", words=["images.npz"])
    def _(world: World, kind: str = kind) -> Action:
        path = special("images.npz", kind, world)
        return lambda: read_labelled(path)

    @attack(f"images of a tree are a {kind}", words=["no image in"])
    def _(world: World, kind: str = kind) -> Action:
        for name in ("a", "b"):
            special(f"{name}/0.png", kind, world)
        return lambda: read_labelled(world.folder)

    @attack(f"copied images are a {kind}", words=[] if kind == "loop" else [word or "device"])
    def _(world: World, kind: str = kind) -> Action:
        special("toy/0.png", kind, world)
        (world.folder / "toy" / "test.txt").write_text("0.png 0\n")
        return lambda: copy_tasks(world.folder, world.folder / "root", [TOY])

    @attack(f"an image to verify is a {kind}")
    def _(world: World, kind: str = kind) -> Action:
        special("0.png", kind, world)
        an_image(world)
        return lambda: _only(verify_task(TOY, world.folder).problems, "cannot read the image")


def _only(problems: list[str], words: str) -> None:
    assert any(words in problem for problem in problems), problems


# JSON and YAML


@attack("deep JSON", words=["nested too deeply"])
def _(world: World) -> Action:
    (world.folder / "a.json").write_text("[" * 200_000)
    return lambda: read_json(world.folder / "a.json")


@attack("JSON of 100 levels", words=["nested too deeply"])
def _(world: World) -> Action:
    return lambda: parse_json("[" * 100 + "]" * 100, "a.json")


@attack("JSON of ten million values", words=["values; expected at most"], disk_mib=20)
def _(world: World) -> Action:
    (world.folder / "a.json").write_text("[" + "[]," * 4_000_000 + "[]]")
    return lambda: read_json(world.folder / "a.json")


@attack("JSON beyond the limit of bytes", words=["bytes; expected at most"], disk_mib=40)
def _(world: World) -> Action:
    (world.folder / "a.json").write_text('"' + "x" * 20_000_000 + '"')
    return lambda: read_json(world.folder / "a.json")


@attack("sparse JSON of 1 TB", words=["bytes; expected at most"])
def _(world: World) -> Action:
    with open(world.folder / "a.json", "wb") as file:
        file.truncate(1 << 40)
    return lambda: read_json(world.folder / "a.json")


for text in ('{"a": NaN}', '{"a": 1, "a": 2}', "9" * 5_000, '{"a": "\x1b[31m', "\udcff", "{", ""):

    @attack(f"JSON that is none: {text[:12]!r}", words=["a.json"])
    def _(world: World, text: str = text) -> Action:
        (world.folder / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        return lambda: read_json(world.folder / "a.json")


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


YAML = {
    "billion laughs": (laughs(9), "anchor"),
    "a merge key": ("a: &x {b: 1}\nc: {<<: *x}", "anchor"),
    "a tag": ("a: !!python/object/apply:os.system ['true']", "tag"),
    "a reference behind an escape": (r'name: "\x24{oc.env:HOME}"', "reference"),
    "a reference in a key": ('"${oc.env:HOME}": 1', "reference"),
    "a reference in a list": ("a: [[{b: ['${x}']}]]", "reference"),
    "deep flow": ("[" * 5_000, "depth"),
    "deep blocks": ("\n".join(" " * n + "-" for n in range(600)), "too large"),
    "too many values": ("[" + "x," * 60_000 + "x]", "too large"),
    "a key that is a list": ("? [a, b]\n: 1", "a.yaml"),
    "a key that is null": ("null: 1", "a.yaml"),
    "no YAML": ("a: [", "no valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "no valid YAML"),
    "terminal escapes": ('"\\e[31m": !!x 1', "a.yaml"),
}
for name, (text, word) in YAML.items():

    @attack(f"YAML: {name}", words=["a.yaml", word], seconds=3)
    def _(world: World, text: str = text) -> Action:
        (world.folder / "a.yaml").write_text(text)
        return lambda: read_yaml(world.folder / "a.yaml")


@attack("an endless value in a message", words=["expected"])
def _(world: World) -> Action:
    return lambda: build(int, ["x" * 20_000_000] * 3, "config")


# Arrays


def npz(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def header(descr: str, shape: str, version: bytes = b"\1\0") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version == b"\1\0" else 4, "little") + text


ARRAYS: dict[str, tuple[bytes, bytes]] = {
    "names of no bytes": (header("'|V0'", "(20_000_000,)"), b""),
    "texts of no letters": (header("'<U0'", "(20_000_000,)"), b""),
    "more than the file has": (header("'|u1'", "(1000000000000,)"), b""),
    "a negative shape": (header("'|u1'", "(-5,)"), b""),
    "a shape of booleans": (header("'|u1'", "(True,)"), b"x"),
    "objects": (header("'|O'", "(1,)"), b"\x80\x04N."),
    "records": (header("[('a', '|O')]", "(1,)"), b"12345678"),
    "a header of code": (header("__import__('os').system('true')", "(1,)"), b"1"),
    "a deep header": (header("(" * 4_000 + ")" * 4_000, "()"), b""),
    "no array": (b"text", b""),
}
for name, (start, content) in ARRAYS.items():

    @attack(f"npz: {name}", words=["a.npz"], mib=100)
    def _(world: World, content: bytes = start + content) -> Action:
        (world.folder / "a.npz").write_bytes(npz({"blob.npy": content}))
        return lambda: read_arrays(world.folder / "a.npz")


@attack("npz: a bomb", words=["unpacks to"], mib=50)
def _(world: World) -> Action:
    (world.folder / "a.npz").write_bytes(npz({"blob.npy": header("'|u1'", "(100000000,)") + bytes(100_000_000)}))
    return lambda: read_arrays(world.folder / "a.npz")


@attack("npz: 200 arrays", words=["200 members"])
def _(world: World) -> Action:
    (world.folder / "a.npz").write_bytes(npz({f"{n}.npy": header("'|u1'", "(0,)") for n in range(200)}))
    return lambda: read_arrays(world.folder / "a.npz")


@attack("npz: another compression", words=["a.npz", "compressed in a way"])
def _(world: World) -> Action:
    (world.folder / "a.npz").write_bytes(npz({"blob.npy": header("'|u1'", "(1,)") + b"1"}, zipfile.ZIP_LZMA))
    return lambda: read_arrays(world.folder / "a.npz")


@attack("npz: no zip", words=["a.npz", "cannot be read"])
def _(world: World) -> Action:
    (world.folder / "a.npz").write_bytes(b"PK\3\4" + bytes(100))
    return lambda: read_arrays(world.folder / "a.npz")


# Lists


@attack("a list of bad lines", words=["more bad lines"], mib=50)
def _(world: World) -> Action:
    (world.folder / "test.txt").write_text("x\n" * 400_000)
    return lambda: read_list(world.folder / "test.txt", 2, remedy="")


@attack("a line of blanks", seconds=2, disk_mib=20)
def _(world: World) -> Action:
    (world.folder / "test.txt").write_text("a" + " " * 5_000_000 + "b\n" + "a " * 2_500_000 + "\n")
    return lambda: _only(parse_list(world.folder / "test.txt", 2)[1], "cannot read")


@attack("a label of a million digits", words=["out of range"], seconds=2)
def _(world: World) -> Action:
    (world.folder / "test.txt").write_text("a " + "9" * 1_000_000)
    return lambda: read_list(world.folder / "test.txt", 2, remedy="")


@attack("a list of three million lines", words=["lines; expected at most"], mib=200, disk_mib=40)
def _(world: World) -> Action:
    (world.folder / "test.txt").write_bytes(b"a 0\n" * 3_000_000)
    return lambda: read_list(world.folder / "test.txt", 2, remedy="")


@attack("a sparse list of 1 TB", words=["bytes; expected at most"])
def _(world: World) -> Action:
    with open(world.folder / "test.txt", "wb") as file:
        file.truncate(1 << 40)
    return lambda: read_list(world.folder / "test.txt", 2, remedy="")


@attack("terminal escapes in a list", words=["cannot read"])
def _(world: World) -> Action:
    (world.folder / "test.txt").write_text("\x1b]0;owned\x07\x1b[2J\u202e\n")
    return lambda: read_list(world.folder / "test.txt", 2, remedy="")


# Images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def scans(repeated: int) -> bytes:
    """A progressive JPEG whose last scan stands `repeated` times."""
    file = io.BytesIO()
    Image.new("L", (4_000, 4_000), 128).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * repeated + content[-2:]


@attack("a JPEG of 300 scans", words=["test.txt:1", "scans"], seconds=2)
def _(world: World) -> Action:
    file = an_image(world, scans(300), "0.jpg")
    return lambda: decode(file)


@attack("an image of 400 million pixels", words=["test.txt:1", "pixels"], seconds=2)
def _(world: World) -> Action:
    size = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    file = an_image(world, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IEND", b""))
    return lambda: decode(file)


@attack("a sparse image of 1 TB", words=["test.txt:1", "bytes; expected at most"], seconds=2)
def _(world: World) -> Action:
    with open(world.folder / "0.png", "wb") as opened:
        opened.truncate(1 << 40)
    file = an_image(world)
    return lambda: decode(file)


@attack("gigabytes of text in an image", words=["test.txt:1", "cannot decode"])
def _(world: World) -> Action:
    size = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + bomb + chunk(b"IDAT", zlib.compress(b"\0\0"))
    file = an_image(world, content + chunk(b"IEND", b""))
    return lambda: decode(file)


SLOW = {
    "a PPM of text": b"P3\n2000 2000\n255\n" + b"0 " * 6_000_000,
    "a bitmap of text": b"P1\n4000 2500\n" + b"0 " * 10_000_000,
    "a BMP of runs": b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, 3000, 3000, 1, 8, 1,
        0, 0, 0, 256, 0) + bytes(1024) + (b"\1\0" * 3000 + b"\0\0") * 3000 + b"\0\1",
}  # fmt: skip
for name, content in SLOW.items():

    @attack(f"{name}, which Python would decode", words=["test.txt:1", "slow to decode"], seconds=2, disk_mib=30)
    def _(world: World, content: bytes = content) -> Action:
        file = an_image(world, content)
        return lambda: decode(file)


@attack("large images of 16 bits and four channels, four at a time", mib=400)
def _(world: World) -> Action:
    size = struct.pack(">IIBBBBB", 4_000, 4_000, 16, 6, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + 8 * 4_000) * 4_000, 1)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    for number in range(4):
        (world.folder / f"{number}.png").write_bytes(content)
    file = world.folder / "test.txt"
    file.write_text("".join(f"{number}.png 0\n" for number in range(4)))
    return lambda: decode_list(read_list(file, 2, remedy=""), PREPROCESSING, workers=4)


@attack("images of 40,000 x 40,000 pixels as the model's input", words=["expected at most"])
def _(world: World) -> Action:
    return lambda: Preprocessing((40_000, 40_000), "bicubic", (0.5,) * 3, (0.5,) * 3)


@attack("more decoded images than memory", words=["test.txt", "the machine has"])
def _(world: World) -> Action:
    file = world.folder / "test.txt"
    file.write_text("".join(f"{number}.png 0\n" for number in range(100_000)))
    return lambda: decode_list(
        read_list(file, 2, remedy=""), Preprocessing((4_000,) * 2, "bicubic", (0,) * 3, (1,) * 3)
    )


@attack("an honest image with 2 MB of text")
def _(world: World) -> Action:
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "edited " * 300_000, zip=True)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(world.folder / "0.png", pnginfo=text)
    return lambda: decode_image(world.folder / "0.png", PREPROCESSING)


# Archives


def zipped(world: World, members: dict[str, bytes], name: str = "a.zip") -> Path:
    path = world.folder / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def extraction(world: World, members: dict[str, bytes]) -> Action:
    path = zipped(world, {"toy/test.txt": b"", **members})
    return lambda: extract_tasks(path, world.folder / "root", [TOY])


@attack("a zip of deep folders", words=["16 parts"])
def _(world: World) -> Action:
    return extraction(world, {f"toy/{i}/{'d/' * 900}f": b"x" for i in range(100)})


@attack("a zip of many folders", words=["folders: expected at most"], seconds=3)
def _(world: World) -> Action:
    archive.MAX_FOLDERS //= 10  # in a process of its own
    return extraction(world, {f"toy/{i}/{'d/' * 12}f": b"" for i in range(800)})


@attack("a zip of names of 60 KB", words=["longer than 1,024 bytes"], seconds=2)
def _(world: World) -> Action:
    return extraction(world, {"toy/" + "a/" * 30_000 + str(i): b"" for i in range(4)})


@attack("a zip of a million members and more", words=["members; expected at most"], seconds=3, disk_mib=70)
def _(world: World) -> Action:
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, *(0,) * 7, 1, *(0,) * 6) + b"x"
    count = 1_100_000
    length = len(entry) * count
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, length, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (world.folder / "a.zip").write_bytes(entry * count + end64 + locator + end)
    return lambda: extract_tasks(world.folder / "a.zip", world.folder / "root", [TOY])


for compression in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):

    @attack(f"a zip of compression {compression}", words=["a.zip", "compressed in a way"])
    def _(world: World, compression: int = compression) -> Action:
        path = world.folder / "a.zip"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("toy/test.txt", b"a 0\n")
        return lambda: extract_tasks(path, world.folder / "root", [TOY])


@attack("a zip with a name that is no text", words=["a.zip", "damaged"])
def _(world: World) -> Action:
    path = zipped(world, {"toy/é": b"x"})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    return lambda: extract_tasks(path, world.folder / "root", [TOY])


@attack("a zip that is a pipe", words=["pipe"])
def _(world: World) -> Action:
    path = special("a.zip", "pipe", world)
    return lambda: extract_tasks(path, world.folder / "root", [TOY])


@attack("a zip of a file that is a folder too", words=["inside of the file"])
def _(world: World) -> Action:
    return extraction(world, {"toy/a": b"", "toy/a/b/c": b""})


@attack("a zip of a file and its `.part`")
def _(world: World) -> Action:
    extract = extraction(world, {"toy/a": b"1", "toy/a.part": b"2"})

    def act() -> None:
        extract()
        toy = world.folder / "root" / "toy"
        assert [(toy / name).read_bytes() for name in ("a", "a.part")] == [b"1", b"2"]

    return act


@attack("a bomb in a zip", words=["would extract to"])
def _(world: World) -> Action:
    path = zipped(world, {"toy/test.txt": b"", "toy/0.png": bytes(8_000_000)})
    return lambda: extract_tasks(path, world.folder / "root", [TOY], max_bytes=1_000_000)


@attack("terminal escapes in a member's name", words=["Refused"])
def _(world: World) -> Action:
    return extraction(world, {"../\x1b[2J": b""})


@attack("a sparse image to be copied", words=["bytes; expected at most"])
def _(world: World) -> Action:
    (world.folder / "toy").mkdir()
    (world.folder / "toy" / "test.txt").write_text("0.png 0\n")
    with open(world.folder / "toy" / "0.png", "wb") as file:
        file.truncate(2 << 30)
    return lambda: copy_tasks(world.folder, world.folder / "root", [TOY])


@attack("many sparse images to be copied", words=["are copied"])
def _(world: World) -> Action:
    (world.folder / "toy").mkdir()
    (world.folder / "toy" / "test.txt").write_text("".join(f"{n}.png 0\n" for n in range(100)))
    for n in range(100):
        with open(world.folder / "toy" / f"{n}.png", "wb") as file:
            file.truncate(250_000_000)
    return lambda: copy_tasks(world.folder, world.folder / "root", [TOY])


# Links and names that somebody planted


@attack("a link for a lock", words=["is a link"])
def _(world: World) -> Action:
    world.link(".lock")
    return lambda: locked(world.folder).__enter__()


@attack("a link for the lock of a file", words=["is a link"])
def _(world: World) -> Action:
    world.link(".x.part")
    return lambda: one_at_a_time(world.folder / "x").__enter__()


@attack("a link for a file that is being written", words=["is a link"])
def _(world: World) -> Action:
    world.link(".x.part")
    return lambda: sole_writer(world.folder / "x").__enter__()


@attack("links for all temporary names of the next processes")
def _(world: World) -> Action:
    for pid in range(os.getpid() - 10, os.getpid() + 2_000):
        world.link(f".evaluation.json.{pid}.tmp")
    world.link("evaluation.json")

    def act() -> None:
        write_json(world.folder / "evaluation.json", {})
        assert not (world.folder / "evaluation.json").is_symlink()

    return act


@attack("links for all temporary folders of the next processes")
def _(world: World) -> Action:
    for pid in range(os.getpid() - 10, os.getpid() + 2_000):
        (world.folder / f".birds.{pid}.tmp").symlink_to(world.folder.parent)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    images = [EncodedImage(file.getvalue(), 0)]
    task = Task("birds", "custom", 2, 1, num_train=1, num_val=1)

    def act() -> None:
        lay_out_task(task, world.folder / "birds", EncodedSplits(images, images, images))
        assert sorted(path.name for path in world.folder.parent.iterdir()) == ["attack", "victim"]

    return act


@attack("a cache full of files of others")
def _(world: World) -> Action:
    names = (".ubuntu.iso.part", ".notes.part", "x.npy")
    for name in names:
        (world.folder / name).write_text("x")
    world.link(f".{'0' * 40}.images.npy.part")

    def act() -> None:
        cache.clean(world.folder, 0)
        assert {path.name for path in world.folder.iterdir()} >= set(names)

    return act


for name in (
    "../x",
    "/tmp/x",
    "a/b",
    "",
    ".",
    "..",
    "con=fig",
    "my birds",
    "x\n",
    "n" * 300,
    "\x1b[31m",
    "-rf",
    "${x}",
):

    @attack(f"imported under the name {name[:12]!r}", words=["--name="])
    def _(world: World, name: str = name) -> Action:
        return lambda: import_task(world.folder, name, world.folder / "out")


MANIFESTS = {
    "no hash": {"sha256": None},
    "a hash that is none": {"sha256": "0"},
    "a number for a list": {"lists": {"test": 3}},
    "unknown keys": {"x": 1},
    "text for a number": {"images": "7"},
}
for name, change in MANIFESTS.items():

    @attack(f"a manifest with {name}", words=[MANIFEST_FILE, "Delete it"])
    def _(world: World, change: dict[str, object] = change) -> Action:
        entry = {"sha256": "0" * 64, "lists": {}, "images": 1, "bytes": 1, "classes_seen": {}, "decoded": True}
        content = {"format": 1, "tasks": {"toy": entry | change}}
        (world.folder / MANIFEST_FILE).write_text(json.dumps(content))
        return lambda: read_entry(world.folder, "toy")


# Tables of own images, outputs of predict, folders of peft


@attack("a table of too many rows", words=["t.csv", "more than 2,000,000 rows"], seconds=20, mib=1_500)
def _(world: World) -> Action:
    (world.folder / "t.csv").write_text("path,label\n" + "a,b\n" * 2_000_002)
    return lambda: read_table(world.folder / "t.csv")


@attack("a table of too many cells", words=["t.csv", "cells"], disk_mib=40)
def _(world: World) -> Action:
    (world.folder / "t.csv").write_text("path,label\n" + "," * 20_000_001)
    return lambda: read_table(world.folder / "t.csv")


OUTPUTS = {
    "is no JSON": ("o.jsonl", b"{"),
    "holds a list": ("o.jsonl", b"[]\n"),
    "holds a file without a name": ("o.jsonl", b'{"file": {}}\n'),
    "is not UTF-8": ("o.csv", b"file\n\xff\n"),
    "has no column of files": ("o.csv", b"x\n1\n"),
    "has an endless cell": ("o.csv", b"file\n" + b"x" * 200_000),
}

for name, (file, content) in OUTPUTS.items():

    @attack(f"an output that {name}", words=[file, "no output of mambapeft predict"])
    def _(world: World, file: str = file, content: bytes = content) -> Action:
        (world.folder / file).write_bytes(content)
        return lambda: files_in(world.folder / file)


@attack("an output that is a link", words=["link"])
def _(world: World) -> Action:
    out = world.link("o.csv")
    return lambda: output(out, append=True).__enter__()


for name, shape in {"no elements": (10**8, 0), "no axis": ()}.items():

    @attack(f"a tensor of peft with {name}", words=["lora_A", "shape"])
    def _(world: World, shape: tuple[int, ...] = shape) -> Action:
        (world.folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        save_file({"x.lora_A.weight": torch.zeros(shape)}, world.folder / "adapter_model.safetensors")
        return lambda: from_peft(world.folder, None)  # refused before the backbone is asked


PEFT_PATH = "base_model.model.layers.0.mixer.in_proj"
# Config, shapes of the tensors besides the head, classes, words: what they ask for takes gigabytes or hours.
PEFT_SIZES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], int, list[str]]] = {
    "a head of ten million classes": ({"peft_type": "LORA"}, {}, 10**7, ["head.weight", "shape"]),
    "a LoRA of rank ten million": (
        {"peft_type": "LORA", "lora_alpha": 1},
        {"lora_A.weight": (10**7, 1), "lora_B.weight": (1, 1)},
        2,
        ["down", "shape"],
    ),
    "a VeRA of a huge rank": (
        {"peft_type": "VERA", "r": 10**9, "d_initial": 0.1},
        {"vera_lambda_d": (4,), "vera_lambda_b": (128,)},
        2,
        ["random_down", "shape"],
    ),
    "a VeRA of a rank beyond all memory": (
        {"peft_type": "VERA", "r": 10**17, "d_initial": 0.1},
        {"vera_lambda_d": (4,), "vera_lambda_b": (128,)},
        2,
        ["adapter_config.json", "rank", "expected at most"],
    ),
    "a BOFT of endless factors": (
        {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 10**12},
        {"boft_R": (1, 4), "boft_s": (128, 1)},
        2,
        ["factors"],
    ),
    "very many patterns for modules that do not exist": (
        {"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {f"m{i}": 1 for i in range(40_000)}},
        {f"x{i}.lora_{key}.weight": (1, 1) for i in range(3_000) for key in "AB"},
        2,
        ["does not fit its tensors"],
    ),
}

for name, (config, shapes, classes, words) in PEFT_SIZES.items():

    @attack(f"a folder of peft with {name}", words=words, disk_mib=100)
    def _(world: World, config: Any = config, shapes: Any = shapes, classes: int = classes) -> Action:
        write_json(world.folder / "adapter_config.json", config)
        state = {f"{PEFT_PATH}.{key}": torch.ones(shape) for key, shape in shapes.items()}
        if config["peft_type"] == "VERA":
            state |= {f"base_model.vera_{key}": torch.ones(4, 4) for key in "AB"}
        head = {"base_model.model.head.weight": torch.ones(classes, 1), "base_model.model.head.bias": torch.ones(1)}
        save_file({**state, **head}, world.folder / "adapter_model.safetensors")
        backbone = create_backbone("vim_pico_patch8_32", "random", depth=1, embed_dim=32)
        return lambda: from_peft(world.folder, backbone)


@pytest.mark.parametrize("name", TABLE)
def test_attack(name, tmp_path):
    hostile.check(TABLE[name], name, tmp_path)


def test_the_table_finds_what_it_is_to_find(tmp_path):
    """Rows that must fail: too much memory, too much time, another exception, a victim that changes."""

    def outcome(act):
        return hostile.outcome_of(hostile.Attack(lambda world: lambda: act(world), (), 0, 50, 1), tmp_path)

    def endless(_):
        while True:
            pass

    # Pages of its own: malloc may hand out some that the parent process holds already.
    assert outcome(lambda world: np.frombuffer(mmap.mmap(-1, 200 << 20), np.uint8).fill(1)).mib > 50
    assert "MemoryError" in outcome(lambda world: np.ones(8 << 30, np.uint8)).failure
    assert "KeyError" in outcome(lambda world: {}["x"]).failure
    assert outcome(endless) is None
    assert "File too large" in outcome(lambda world: (world.folder / "big").write_bytes(bytes(2 << 20))).failure
