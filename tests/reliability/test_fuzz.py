"""Parsers of untrusted files under random input: they give a result or a UserError, and write nowhere else.

The examples are the same in every run (derandomised) and few; HYPOTHESIS_EXAMPLES=10000 tries more.
"""

import copy
import io
import json
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from helpers.fuzz import JSON, bounded, change, mutated, places
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import apply_adapter
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import read_state_dict
from mambapeft_vision.data.image_list import parse_list, read_list
from mambapeft_vision.data.images import decode_entry
from mambapeft_vision.data.prepare.archive import extract_tasks
from mambapeft_vision.data.prepare.importer import read_npz
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.data.tasks import Task
from mambapeft_vision.methods.affix import Affix
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.sdt import SDT
from mambapeft_vision.results.record import read_record
from mambapeft_vision.utils.errors import UserError

TOY = Task("toy", "natural", num_classes=3, num_test=1)


# List files

PIECES = st.sampled_from(
    [
        "images/a.png",
        "../a",
        "/a",
        "a b",
        "C:\\a",
        " ",
        "\t",
        "1",
        "-1",
        "2",
        "3",
        "9" * 30,
        "\u0663",
        "\ufeff",
        "\0",
        ".",
        "é",
    ]
)
LINES = st.lists(st.lists(PIECES, max_size=4).map("".join), max_size=8).map("\n".join).map(str.encode)


@bounded(300)
@given(content=st.one_of(st.binary(max_size=200), LINES, LINES.flatmap(mutated)))
def test_lists(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "test.txt"
        file.write_bytes(content)
        listing, problems = parse_list(file, num_classes=3)
        for entry in listing.entries:
            path = PurePosixPath(entry.path)
            assert not path.is_absolute() and ".." not in path.parts
            assert 0 <= entry.label < 3
            assert 1 <= entry.line <= content.count(b"\n") + 1
            assert str(path) in str(listing.error(entry, "x"))
        assert len({entry.path for entry in listing.entries}) == len(listing.entries)
        assert problems or listing.entries
        if problems:
            with pytest.raises(UserError, match=r"test\.txt"):
                read_list(file, 3, remedy="")


# Adapters


def tiny():
    return create_backbone("vim_pico_patch8_32", "random", depth=1, embed_dim=8, d_state=2)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[dict, bytes]:
    folder = tmp_path_factory.mktemp("adapter")
    sdt = SDT(warmup_steps=1, f_channels=0.5, f_states=0.5, rank=1)
    lora = LoRA(targets=["layers.*.mixer.in_proj.weight"], rows="x", rank=2)
    model = adapt(tiny(), {"lora": lora, "affix": Affix(tokens=2, projection=True), "sdt": sdt}, 3)
    sdt.finish_warmup()
    model.save(folder, {"task": "x"})
    return json.loads((folder / "adapter_config.json").read_text()), (folder / "adapter.safetensors").read_bytes()


def loads_or_is_refused(config: bytes, tensors: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter.safetensors").write_bytes(tensors)
        try:
            model = apply_adapter(read_adapter(folder), tiny())
        except UserError as error:
            assert str(folder) in str(error)
            return
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 32, 32))
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter.safetensors"}


@bounded(120)
@given(data=st.data())
def test_adapter_configs(adapter, data):
    config = copy.deepcopy(adapter[0])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(adapter[0])))
        change(config, path, data.draw(JSON), data.draw(st.sampled_from(["set", "set", "set", "remove", "rename"])))
    loads_or_is_refused(json.dumps(config).encode(), adapter[1])


@bounded(60)
@given(data=st.data())
def test_bytes_of_adapter_configs(adapter, data):
    loads_or_is_refused(data.draw(mutated(json.dumps(adapter[0]).encode()) | st.binary(max_size=50)), adapter[1])


@bounded(100)
@given(data=st.data())
def test_bytes_of_adapter_tensors(adapter, data):
    header = 8 + int.from_bytes(adapter[1][:8], "little")
    damaged = mutated(adapter[1][:header]).map(lambda front: front + adapter[1][header:])
    loads_or_is_refused(json.dumps(adapter[0]).encode(), data.draw(damaged | mutated(adapter[1])))


# Other files

CHECKPOINT = io.BytesIO()
torch.save({"model": {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.int64)}}, CHECKPOINT)
OLD_CHECKPOINT = io.BytesIO()
torch.save({"model": {"a": torch.zeros(3)}}, OLD_CHECKPOINT, _use_new_zipfile_serialization=False)


@bounded(100)
@given(content=st.one_of(st.binary(max_size=100), mutated(CHECKPOINT.getvalue()), mutated(OLD_CHECKPOINT.getvalue())))
def test_checkpoints(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        file.write_bytes(content)
        with suppress(UserError):
            state = read_state_dict(file)
            assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


@bounded(60)
@given(content=st.one_of(st.binary(max_size=60), st.builds(json.dumps, JSON).map(str.encode)))
def test_records(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "result.json").write_bytes(content)
        with pytest.raises(UserError, match=r"result\.json"):
            read_record(Path(folder))


def small_npz() -> bytes:
    file = io.BytesIO()
    arrays = {"blob": np.arange(9, dtype=np.uint8), "offsets": np.array([0, 4, 9]), "labels": np.array([0, 1])}
    np.savez(file, **arrays, class_names=np.array(["a", "b"]))
    return file.getvalue()


@bounded(100)
@given(content=st.one_of(st.binary(max_size=60), mutated(small_npz())))
def test_npz_files(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npz"
        file.write_bytes(content)
        with suppress(UserError):
            labelled = read_npz(file)
            assert all(isinstance(labelled.read(i), bytes) for i in range(len(labelled)))


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 9, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


IMAGES = st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]).map(encoded).flatmap(mutated)


@bounded(200)
@given(content=st.one_of(IMAGES, st.binary(max_size=60)))
def test_images(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.png").write_bytes(content)
        (Path(folder) / "test.txt").write_text("a.png 0\n")
        listing, _ = parse_list(Path(folder) / "test.txt", 2)
        with suppress(UserError):
            pixels = decode_entry(listing, listing.entries[0], Preprocessing((4, 4), "bicubic", (0,) * 3, (1,) * 3))
            assert pixels.shape == (3, 4, 4)


# Archives

PARTS = st.sampled_from(
    [
        "toy",
        "toy",
        "test.txt",
        "images",
        "a.png",
        "..",
        ".",
        "",
        "/",
        "C:",
        "\\",
        "n" * 300,
        "é",
        "\x01",
        " ",
        "~",
        "toy2",
    ]
)
MEMBERS = st.tuples(
    st.lists(PARTS, min_size=1, max_size=5).map("/".join),
    st.binary(max_size=30),
    st.sampled_from([0, 0, 0, 0o100644, 0o120777, 0o010644, 0o060644, 0o040755]),
)


def zip_of(members: list[tuple[str, bytes, int]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name or "x")  # Python cannot write a member without a name
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return file.getvalue()


WHOLE = zip_of([("x/toy/test.txt", b"images/a.png 0\n", 0), ("x/toy/images/a.png", b"abc", 0)])


@pytest.mark.filterwarnings("ignore:Duplicate name")
@bounded(250)
@given(
    content=st.one_of(
        st.lists(MEMBERS, max_size=5).map(lambda members: zip_of([("toy/test.txt", b"", 0), *members])),
        st.lists(MEMBERS, max_size=5).map(zip_of),
        mutated(WHOLE),
        st.binary(max_size=60),
    )
)
@example(content=WHOLE[1:])  # a member's place is before the file's beginning
def test_archives_write_inside_of_the_target_alone(content):
    with tempfile.TemporaryDirectory() as name:
        around = Path(name)
        (around / "a.zip").write_bytes(content)
        (around / "data").mkdir()
        with suppress(UserError):
            extract_tasks(around / "a.zip", around / "data" / "root", [TOY], max_bytes=10_000)
        written = {path.relative_to(around) for path in around.rglob("*")}
        target = Path("data/root")
        assert all(path in (Path("a.zip"), Path("data")) or target in (path, *path.parents) for path in written)
        finished = [path for path in written if len(path.parts) > 2 and path.parts[2] != ".incomplete"]
        assert all(path.parts[2] == "toy" for path in finished)
        assert not any((around / path).is_symlink() for path in written)
