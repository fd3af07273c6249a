"""Tables of images, published lists and peft's folders that somebody sends to do harm.

tests/helpers/hostile.py says how to add a row; test_hostile_files.py has the other files.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from helpers import hostile
from helpers.fake_records import fake_record
from helpers.hostile import Action, World
from PIL import Image
from safetensors.torch import save_file

from mambapeft_vision.adapter.predict import Prediction
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.data.encoding import encoding_of
from mambapeft_vision.data.own.index import INDEX_FILE, read_index
from mambapeft_vision.data.own.layout import CLASSES_FILE, RECORD_FILE, OwnImages, lay_out, read_classes, read_notes
from mambapeft_vision.data.own.table import Columns, read_table
from mambapeft_vision.data.prepare.published import FGVC, prepare_fgvc, read_list_labels
from mambapeft_vision.integrations.from_peft import from_peft
from mambapeft_vision.results.layout import METRICS_FILE, PREDICTIONS_FILE
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.plots import confusion_matrix
from mambapeft_vision.run.ensemble import Member, ensemble
from mambapeft_vision.run.predict import files_in, find_images, output
from mambapeft_vision.run.run_config import make_run_folder
from mambapeft_vision.utils.errors import UserError

TABLE, attack = hostile.table()


# Parquet


def columns(count: int) -> pa.Table:
    return pa.Table.from_arrays([pa.array(["a"])] * count, names=[f"c{i}" for i in range(count)])


def nested(levels: int) -> pa.Array:
    value: object = "a"
    for _ in range(levels):
        value = [value]
    return pa.array([value, value])


def of_rows(path: object, label: object = None, arrow: bool = True) -> Callable[[Path], None]:
    """arrow: whether the file says how Arrow held its values, which other writers do not say."""

    def write(file: Path) -> None:
        paths = pa.array(path) if isinstance(path, list) else path
        labels = pa.array(["a", "b"] * (len(paths) // 2)) if label is None else label
        pa.parquet.write_table(pa.table({"path": paths, "label": labels}), file, store_schema=arrow)

    return write


def long_text(rows: int, size: int) -> pa.Array:
    """One text of `size` characters for every row, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))


def long_lists(rows: int, size: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), long_text(rows, size))


def long_maps(rows: int, size: int) -> pa.Array:
    offsets = pa.array(range(rows + 1), pa.int32())
    return pa.MapArray.from_arrays(offsets, pa.array(range(rows)), long_text(rows, size))


def many_groups(file: Path) -> None:
    pa.parquet.write_table(pa.table({"path": ["a"] * 20_000, "label": ["b"] * 20_000}), file, row_group_size=1)


PARQUET: dict[str, tuple[Callable[[Path], None], list[str], float]] = {
    "three million rows in a few bytes": (of_rows(long_text(3_000_000, 1)), ["rows"], 5),
    "a text of 8 MB for each of 2,000 rows": (of_rows(long_text(2_000, 8_000_000)), ["unpacked"], 5),
    "the same from another writer": (of_rows(long_text(2_000, 8_000_000), arrow=False), ["unpacked"], 5),
    "the same in lists": (of_rows(["a.png"] * 2_000, long_lists(2_000, 8_000_000)), ["unpacked"], 5),
    "the same in maps": (of_rows(["a.png"] * 2_000, long_maps(2_000, 8_000_000)), ["unpacked"], 5),
    "texts of 1 MB for each of 100,000 rows": (of_rows(long_text(100_000, 1_000_000)), ["unpacked"], 5),
    "20,000 columns": (lambda file: pa.parquet.write_table(columns(20_000), file), ["columns"], 5),
    "20,000 groups of one row": (many_groups, ["stands before"], 10),
    "lists in 40 levels": (of_rows(["a.png", "b.png"], nested(40)), ["classes"], 5),
    "lists in 60 levels": (of_rows(["a.png", "b.png"], nested(60)), ["nested"], 5),
    "a column of nothing": (of_rows(pa.nulls(4)), ["no path"], 5),
    "a path that leaves the folder": (of_rows(["a.png", "../../etc/passwd"]), ["row 2", "'..'"], 5),
    "an absolute path": (of_rows(["a.png", "/etc/passwd"]), ["row 2", "not below"], 5),
    "control characters": (of_rows(["a.png", "\x1b[2J\r"]), ["control characters"], 5),
}
for name, (write, words, seconds) in PARQUET.items():

    @attack(f"Parquet: {name}", words=["t.parquet", *words], seconds=seconds)
    def _(world: World, write: Callable[[Path], None] = write) -> Action:
        write(world.folder / "t.parquet")
        return lambda: read_table(world.folder / "t.parquet")


@attack("Parquet: columns that no label is in, and lists of labels")
def _(world: World) -> Action:
    pairs = pa.array([[("a", 1), ("b", 2)], []], pa.map_(pa.string(), pa.int32()))
    table = {"path": ["a.png", "b.png"], "label": [["cat"], ["cat", "dog"]], "pairs": pairs, "x": [{"y": b"1"}] * 2}
    pa.parquet.write_table(pa.table(table), world.folder / "t.parquet")
    return lambda: _equals(read_table(world.folder / "t.parquet", several=True).labels, ((0,), (0, 1)))


@attack("Parquet: a footer that is longer than the file", words=["t.parquet", "no Parquet file"])
def _(world: World) -> Action:
    (world.folder / "t.parquet").write_bytes(b"PAR1" + b"\xff\xff\xff\x7fPAR1")
    return lambda: read_table(world.folder / "t.parquet")


@attack("Parquet: a sparse file of 1 TB", words=["t.parquet", "bytes; expected at most"])
def _(world: World) -> Action:
    with open(world.folder / "t.parquet", "wb") as file:
        file.truncate(1 << 40)
    return lambda: read_table(world.folder / "t.parquet")


# CSV

CSV: dict[str, tuple[bytes, list[str]]] = {
    "an endless line": (b"path,label\n" + b"x" * 30_000_000, ["no CSV", "field"]),
    "an endless text in quotes": (b'path,label\n"' + b"a\n" * 3_000_000, ["no CSV"]),
    "a million columns": (b"path,label" + b",x" * 1_000_000 + b"\n", ["columns"]),
    "a million columns in its second line": (b"path,label\na,b" + b",x" * 1_000_000 + b"\n", ["cells; expected 2"]),
    "NULs": (b"path,label\na\0.png,cat\nb.png,dog\n", ["control characters"]),
    "two marks of order": ("\ufeff\ufeffpath,label\na.png,cat\n".encode(), ["columns"]),
    "UTF-16": ("path,label\na.png,cat\n".encode("utf-16"), ["UTF-8"]),
    "carriage returns within names": (b'path,label\n"a\r.png",cat\nb.png,dog\n', ["control characters"]),
    "a path that leaves the folder": (b"path,label\na.png,cat\nb/../../x.png,dog\n", ["row 2", "'..'"]),
    "an absolute path": (b"path,label\na.png,cat\n/etc/passwd,dog\n", ["row 2", "not below"]),
    "a path of Windows": (b"path,label\na.png,cat\nC:\\x.png,dog\n", ["backslashes"]),
    "an endless name of a class": (b"path,label\na.png,cat\nb.png," + b"x" * 100_000 + b"\n", ["class", "characters"]),
}
for name, (content, words) in CSV.items():

    @attack(f"CSV: {name}", words=["t.csv", *words], disk_mib=40)
    def _(world: World, content: bytes = content) -> Action:
        (world.folder / "t.csv").write_bytes(content)
        return lambda: read_table(world.folder / "t.csv")


@attack("CSV: another column among ten thousand endless ones", words=["t.csv", "no column"], mib=400, disk_mib=40)
def _(world: World) -> Action:
    (world.folder / "t.csv").write_text(",".join("x" * 2_000 + str(i) for i in range(10_000)) + "\n")
    return lambda: read_table(world.folder / "t.csv", columns=Columns(label="wanted" * 1_000))


@attack("CSV: line ends of all kinds")
def _(world: World) -> Action:
    (world.folder / "t.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\na.png,cat\n\r\nb.png,dog\rc.png,cat")
    return lambda: _equals(read_table(world.folder / "t.csv").paths, ("a.png", "b.png", "c.png"))


def _equals(found: object, expected: object) -> None:
    assert found == expected, found


for kind in ("a device", "a folder", "missing"):

    @attack(f"CSV: an image that is {kind}", words=["a.png"])
    def _(world: World, kind: str = kind) -> Action:
        Image.new("RGB", (8, 8)).save(world.folder / "b.png")
        (world.folder / "t.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
        if kind == "a device":
            (world.folder / "a.png").symlink_to("/dev/zero")
        elif kind == "a folder":
            (world.folder / "a.png").mkdir()
        return lambda: lay_out(OwnImages(world.folder / "t.csv"), world.folder / "task")


# Published lists


@attack("a published list with a path that is too long", words=["lacks 2 of 2 images"])
def _(world: World) -> Action:
    for split in ("train", "val", "test"):
        (world.folder / f"{split}.json").write_text(json.dumps({"n" * 300: 0, "m" * 5_000: 1}))
    task = replace(FGVC["cub"], num_classes=2, counts={})
    return lambda: prepare_fgvc(task, world.folder, world.folder, world.folder / "task")


# Folders of peft

MODULE = "base_model.model.layers.0.mixer.in_proj"
PEFT: dict[str, tuple[dict[str, object], list[str]]] = {
    "a pattern that backtracks": ({"alpha_pattern": {"(a+)+$": 1}}, ["regular expression"]),
    "a pattern of modules that backtracks": (
        {"peft_type": "IA3", "feedforward_modules": "(a+)+$"},
        ["regular expression"],
    ),
    "an alpha of text": ({"lora_alpha": "x" * 900_000}, ["does not fit"]),
    "an alpha beyond all floats": ({"lora_alpha": 10**4_000}, ["does not fit"]),
    "an endless kind": ({"peft_type": "x" * 900_000}, ["peft_type"]),
    "options that change the meaning": ({"layer_replication": [[0, 10**9]]}, ["layer_replication"]),
}
IGNORED = {
    "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"},
    "base_model_name_or_path": "http://127.0.0.1:9/x",
    "target_modules": "(a+)+$",
    "modules_to_save": ["../../victim"] * 1_000,
    "exclude_modules": "(a+)+$",
}


def peft_folder(world: World, config: dict[str, object]) -> Action:
    config = {"peft_type": "LORA", "lora_alpha": 2} | config
    (world.folder / "adapter_config.json").write_text(json.dumps(config))
    state = {f"{MODULE}.lora_A.weight": torch.zeros(2, 8), f"{MODULE}.lora_B.weight": torch.zeros(32, 2)}
    head = {"base_model.model.head.weight": torch.zeros(3, 8), "base_model.model.head.bias": torch.zeros(3)}
    save_file({**state, **head}, world.folder / "adapter_model.safetensors")
    backbone = create_backbone("vim_pico_patch8_32", "random", depth=1, embed_dim=8, d_state=2)
    return lambda: from_peft(world.folder, backbone)


for name, (config, words) in PEFT.items():

    @attack(f"peft: {name}", words=words)
    def _(world: World, config: dict[str, object] = config) -> Action:
        return peft_folder(world, config)


@attack("peft: names, addresses and patterns that nothing follows")
def _(world: World) -> Action:
    return peft_folder(world, IGNORED)


# What is kept of own images, and is read when they are used again


def endless(file: Path, size: int = 900_000_000) -> None:
    """One line as long as a limit of bytes lets it be; on the disk it takes nothing."""
    with open(file, "wb") as opened:
        opened.truncate(size)


KEPT: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object], str]] = {
    "an index of one line": (INDEX_FILE, endless, read_index, "more than 100,000 bytes"),
    "a sparse index of 1 TB": (INDEX_FILE, lambda f: endless(f, 1 << 40), read_index, "bytes; expected at most"),
    "a pipe for an index": (INDEX_FILE, os.mkfifo, read_index, "pipe"),
    "classes of one line": (CLASSES_FILE, lambda f: endless(f, 60_000_000), read_classes, "more than 1,000,000 bytes"),
    "a million classes and one": (CLASSES_FILE, lambda f: f.write_text("a\n" * 1_000_001), read_classes, "lines"),
    "notes of a terabyte": (RECORD_FILE, lambda f: endless(f, 1 << 40), read_notes, "bytes; expected at most"),
    "a published list of one line": (
        "train.txt",
        lambda f: endless(f, 90_000_000),
        lambda folder: read_list_labels(folder / "train.txt", FGVC["cub"], []),
        "more than 1,000,000 bytes",
    ),
    "epochs of one line": (METRICS_FILE, lambda f: endless(f, 60_000_000), read_metrics, "more than 10,000 bytes"),
    "predictions of one line": (
        "o.jsonl",
        lambda f: endless(f, 1_900_000_000),
        lambda folder: files_in(folder / "o.jsonl"),
        "more than 16,000,000 bytes",
    ),
}


@attack("what is kept in lists of lines", mib=150, disk_mib=20)
def _(world: World) -> Action:
    places = {name: world.folder / str(number) for number, name in enumerate(KEPT)}
    for name, (file, make, _, _) in KEPT.items():
        places[name].mkdir()
        make(places[name] / file)

    def act() -> None:
        for name, (_, _, read, words) in KEPT.items():
            with pytest.raises(UserError, match=words):
                read(places[name])

    return act


@attack("an image that is a pipe, whose encoding is asked for")
def _(world: World) -> Action:
    os.mkfifo(world.folder / "a.png")

    def act() -> None:
        assert encoding_of([world.folder / "a.png"]) == "other"

    return act


@attack("a pattern that links lead in circles", seconds=2)
def _(world: World) -> Action:
    (world.folder / "a" / ".b").mkdir(parents=True)
    for name in ("a.png", "a/b.png", "a/.b/c.png", ".d.png"):
        (world.folder / name).write_bytes(b"x")
    for name in ("l", "m", "a/n"):
        (world.folder / name).symlink_to(world.folder)

    def act() -> None:
        for pattern in ("**/*.png", "**", "*/*.png", "a/**"):
            found = {file.name for file in find_images([f"{world.folder}/{pattern}"])}
            assert {"b.png"} <= found <= {"a.png", "b.png"}

    return act


@attack("confusions of two thousand million classes", mib=100)
def _(world: World) -> Action:
    classes = np.array([0, 2**31 - 1])
    np.savez(world.folder / PREDICTIONS_FILE, predicted=classes, labels=classes[::-1])
    return lambda: confusion_matrix(world.folder, "title")


@attack("predictions with names that a terminal would obey")
def _(world: World) -> Action:
    name, out = "a\x1b[2J\x9b2J\u202e.png", world.folder / "o.jsonl"

    def act() -> None:
        with output(out) as write:
            write(Prediction(name, 0, name, 1.0, ((name, 1.0),), (name,)))
        assert out.read_text().rstrip("\n").isprintable() and files_in(out) == {name}

    return act


# Where ensembles, interpolations and unpacked bundles write


def ensemble_in(out: Path, task: str = "vtab/cifar") -> Action:
    members = []
    for seed in range(2):
        record = fake_record(task, "a", seed, 0.5)
        folder = out.parent / f"run{seed}"
        folder.mkdir()
        np.savez(
            folder / PREDICTIONS_FILE,
            predicted=np.array([0, 1]),
            labels=np.array([0, 1]),
            top_classes=np.array([[0, 1], [1, 0]]),
            top_probabilities=np.full((2, 2), 0.5, np.float32),
        )
        members.append(Member(folder, record))
    return lambda: ensemble(members, out)


@attack("an ensemble below a folder that is a link", words=["vtab", "is a link"])
def _(world: World) -> Action:
    (world.folder / "out").mkdir()
    (world.folder / "elsewhere").mkdir()
    (world.folder / "out" / "vtab").symlink_to(world.folder / "elsewhere")
    return ensemble_in(world.folder / "out")


for task in ("../../x", "/tmp/x", "..", "a/../../../x"):

    @attack(f"an ensemble of the task {task}", words=["task", "below"])
    def _(world: World, task: str = task) -> Action:
        return ensemble_in(world.folder / "out", task)


for fingerprint in ("/../../x", "../../.."):

    @attack(f"a record with the fingerprint {fingerprint}", words=["fingerprint", "below"])
    def _(world: World, fingerprint: str = fingerprint) -> Action:
        record = replace(fake_record("vtab/cifar", "a", 0, 0.5), fingerprint=fingerprint)
        return lambda: make_run_folder(world.folder, record)


@pytest.mark.parametrize("name", TABLE)
def test_attack(name, tmp_path):
    hostile.check(TABLE[name], name, tmp_path)
