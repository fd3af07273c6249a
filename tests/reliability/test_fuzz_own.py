"""What users bring along, under random input: tables of images, published lists, peft's adapters, stored predictions.

tests/helpers/fuzz.py has the strategies; test_fuzz_runs.py is about what a run leaves behind.
"""

import copy
import datetime
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from helpers.fake_records import fake_record
from helpers.fuzz import JSON, bounded, changed_values, mutated
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.data.own.index import INDEX_FILE, IndexedFile, index_text, per_class, read_index
from mambapeft_vision.data.own.layout import RECORD_FILE, read_classes, read_notes
from mambapeft_vision.data.own.table import Columns, read_table
from mambapeft_vision.data.prepare.published import FEW_SHOT, FGVC, prepare_few_shot, prepare_fgvc
from mambapeft_vision.integrations.from_peft import from_peft
from mambapeft_vision.integrations.hub import to_hub_folder
from mambapeft_vision.results.predictions import read_class_names, read_probabilities
from mambapeft_vision.run.ensemble import Member, ensemble
from mambapeft_vision.run.predict import files_in
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import lines


def read_or_refused(files: dict[str, bytes], read: Callable[[Path], object]) -> object:
    """What `read` makes of a folder with these files, or None where it refuses them in one printable message."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        try:
            return read(folder)
        except UserError as error:
            message = str(error)
            assert lines(message) == message and len(message) < 4_000, ascii(message[:1_000])
            return None


# Tables of own images

CELLS = st.sampled_from(
    ["path", "label", "split", "file", "class", "a.png", "b/c.jpg", "../a", "/etc/passwd", "/", ".", "C:\\a", "",
     " ", "cat", "dog", "0", "1", "1.0", "cat|dog", "train", "test", "val", '"', '"a', "\0", "\r", "\ufeff", "\x1b[2J",
     "=1+1", "é", "²", "٣", "9" * 5_000, "-" * 300]
)  # fmt: skip
ROWS = st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=6)
ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n"])
DELIMITERS = st.sampled_from([",", ";", "\t"])
WHOLE = b"path,label,split\na.png,cat,train\nb.png,dog,test\nc.png,cat,val\n"
CSV = st.builds(lambda rows, comma, end: end.join(map(comma.join, rows)).encode(), ROWS, DELIMITERS, ENDS)


def check_table(file: Path, several: bool, columns: Columns) -> None:
    source = read_table(file, columns=columns, several=several)
    assert len(source.paths) == len(source.labels) == len(set(source.paths)) > 0
    for path in map(PurePosixPath, source.paths):
        assert not path.is_absolute() and ".." not in path.parts
    assert all(0 <= label < len(source.class_names) for labels in source.labels for label in labels)
    assert several or all(len(labels) == 1 for labels in source.labels)
    assert source.splits is None or set(source.splits) <= {"train", "val", "test"}


@bounded(250)
@given(
    content=CSV | mutated(WHOLE) | st.binary(max_size=60) | CSV.map(lambda text: b"\xef\xbb\xbfpath,label\n" + text),
    ending=st.sampled_from(["csv", "tsv", "txt"]),
    several=st.booleans(),
    columns=st.builds(Columns, st.none() | CELLS, st.none() | CELLS, st.none() | CELLS) | st.just(Columns()),
)
def test_tables_of_text(content, ending, several, columns):
    read_or_refused({f"t.{ending}": content}, lambda folder: check_table(folder / f"t.{ending}", several, columns))


# Kinds of columns, each with values that are hard on some reader.
KINDS = st.sampled_from(
    [
        pa.array(["a.png", "b.png"]),
        pa.array(["cat", "dog"]),
        pa.array(["train", None]),
        pa.array(["a.png", "b.png"]).dictionary_encode(),
        pa.array([b"\xff", b"a"]),
        pa.array([["cat"], ["dog", None]]),
        pa.array([[[["cat"]]], []]),
        pa.array([{"path": "a"}, {"path": "b"}]),
        pa.array([None, None]),
        pa.array([0, 1]),
        pa.array([float("nan"), float("inf")]),
        pa.array([True, False]),
        pa.array([Decimal("1e30"), Decimal(2)]),
        pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
        pa.array([2**62, -(2**62)]).cast(pa.timestamp("us")),
        pa.array([1, 2**62 + 1]).cast(pa.timestamp("ns", tz="Nowhere/City")),
        pa.array([2**62, 0]).cast(pa.duration("us")),
        pa.array([datetime.time(1), None]),
    ]
)
NAMES = st.sampled_from(["path", "label", "split", "class", "a", "", "\x1b[2J", "é"])


@st.composite
def parquet(draw) -> bytes:
    columns = draw(st.lists(st.tuples(NAMES, KINDS), max_size=4))
    table = pa.Table.from_arrays([values for _, values in columns], names=[name for name, _ in columns])
    file = io.BytesIO()
    pa.parquet.write_table(table, file)
    content = file.getvalue()
    return draw(st.just(content) | mutated(content))


@bounded(200)
@given(content=parquet() | st.binary(max_size=40), several=st.booleans())
def test_tables_of_parquet(content, several):
    read_or_refused({"t.parquet": content}, lambda folder: check_table(folder / "t.parquet", several, Columns()))


# The record of own images

INDEX = index_text(
    [IndexedFile("a.png", "0", "train", "", 3, 5, "0" * 64), IndexedFile("b.png", "1,2", "test", "test", 3, 5, "1")]
).encode()
RECORD = {"classes": ["cat", "dog"], "notes": ["two images are equal"], "format": 1}


@bounded(120)
@given(content=mutated(INDEX) | st.binary(max_size=40) | CSV)
def test_indices_of_own_images(content):
    def read(folder: Path) -> None:
        found = read_index(folder)
        assert found is not None
        per_class(found, ("train", "val"))

    read_or_refused({INDEX_FILE: content}, read)


@bounded(80)
@given(content=changed_values(RECORD).map(lambda v: json.dumps(v).encode()) | mutated(json.dumps(RECORD).encode()))
def test_notes_of_own_images(content):
    def read(folder: Path) -> None:
        assert all(isinstance(note, str) for note in read_notes(folder))
        classes = read_classes(folder)
        assert classes is None or all(isinstance(name, str) for name in classes)

    read_or_refused({RECORD_FILE: content}, read)


# Published lists; the images are missing, or two files that are none

PATHS = st.sampled_from(["images/a.jpg", "images/b.jpg", "../a", "/etc/passwd", "", ".", "a\0", "\x1b[2J", "n" * 300])
LABELS = st.dictionaries(PATHS, st.sampled_from([0, 1, 2, -1, 2**70]), max_size=4)
IMAGES = {"images/images/a.jpg": b"no image", "images/images/b.jpg": b""}
TWO = replace(FGVC["cub"], num_classes=2, counts={})
FEW_OF_TWO = replace(FEW_SHOT["pets"], num_classes=2)


@bounded(120)
@given(given=st.tuples(*[LABELS.map(json.dumps) | st.builds(json.dumps, JSON)] * 3), damage=mutated(b'{"images/a": 0}'))
def test_lists_of_json(given, damage):
    lists = {f"lists/{s}.json": text.encode() for s, text in zip(("train", "val", "test"), given, strict=True)}

    def prepare(folder: Path) -> None:
        prepare_fgvc(TWO, folder / "lists", folder / "images", folder / "root" / "task")

    read_or_refused(lists | IMAGES, prepare)
    read_or_refused(lists | {"lists/val.json": damage} | IMAGES, prepare)


LINES = st.tuples(PATHS, st.sampled_from(["0", "1", "2", "-1", "²", "٣", "9" * 5_000, "", "x"])).map(" ".join)


@bounded(80)
@given(data=st.data())
def test_lists_of_few_shots(data):
    good = b"images/a.jpg 0\nimages/b.jpg 1\n"
    some = st.lists(LINES, max_size=4).map("\n".join).map(str.encode) | mutated(good) | st.just(good)
    names = ["val_meta.list", "test_meta.list"]
    names += [f"train_meta.list.num_shot_{shots}.seed_{seed}" for shots in (1, 2, 4, 8, 16) for seed in range(3)]
    lists = {f"lists/{name}": good for name in names}
    lists[f"lists/{data.draw(st.sampled_from(names))}"] = data.draw(some)

    def prepare(folder: Path) -> None:
        prepare_few_shot(FEW_OF_TWO, folder / "lists", folder / "images", folder / "root" / "task")

    read_or_refused(lists | IMAGES, prepare)


# Outputs of `predict --watch`

OUTPUTS = {
    "o.csv": b"file,class,probability,top\na.png,cat,0.5,cat:0.5000\nb.png,dog,0.5,dog:0.5000\n",
    "o.jsonl": b'{"file": "a.png", "class": "cat"}\n{"file": "b.png", "class": "dog"}\n',
}


@bounded(120)
@given(data=st.data(), name=st.sampled_from(sorted(OUTPUTS)))
def test_outputs_of_predictions(data, name):
    rows = st.lists(st.builds(json.dumps, JSON), max_size=3).map("\n".join).map(str.encode)
    content = data.draw(mutated(OUTPUTS[name]) | st.binary(max_size=40) | CSV | rows)
    found = read_or_refused({name: content}, lambda folder: files_in(folder / name))
    assert found is None or all(isinstance(file, str) for file in found)


# Predictions that are stored, for ensembles

SHAPES = st.sampled_from([(), (0,), (1,), (3,), (4,), (3, 0), (3, 2), (2, 3), (3, 2, 1), (0, 2)])
DTYPES = st.sampled_from(["i8", "u8", "i1", "f4", "f2", "f8", "U3"])
FILLS = st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, float("nan"), float("inf"), 0.5])
GOOD = {
    "predicted": np.array([0, 1, 1]),
    "labels": np.array([0, 1, 0]),
    "top_classes": np.array([[0, 1], [1, 0], [1, 0]]),
    "top_probabilities": np.full((3, 2), 0.5, np.float32),
    "names": np.array(["a", "b", "c"]),
    "class_names": np.array(["cat", "dog"]),
}


@st.composite
def other_array(draw) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.full(draw(SHAPES), draw(FILLS), "f8").astype(draw(DTYPES))


def predictions(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@bounded(120)
@given(changes=st.dictionaries(st.sampled_from(sorted(GOOD)), st.none() | other_array(), min_size=1, max_size=3))
def test_predictions_of_an_ensemble(changes):
    changed = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    records = [fake_record("vtab/cifar", "a", seed, 0.5) for seed in range(2)]

    def average(folder: Path) -> None:
        shares, labels, names = read_probabilities(folder / "1")
        assert shares.shape[0] == len(labels) and np.isfinite(shares).all()
        assert names is None or len(names) == len(labels)
        read_class_names(folder / "1")
        for first, second in (("0", "1"), ("1", "0")):
            members = [Member(folder / place, record) for place, record in zip((first, second), records, strict=True)]
            ensemble(members, folder / "out")

    read_or_refused({"0/predictions.npz": predictions(GOOD), "1/predictions.npz": predictions(changed)}, average)


# Adapters of peft, and adapters to publish

PEFT = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    "target_modules": ["in_proj"], "modules_to_save": ["head"], "auto_mapping": None, "use_dora": False,
    "base_model_name_or_path": "../x", "init_lora_weights": True, "feedforward_modules": [], "d_initial": 0.1,
    "block_size": 4, "boft_block_size": 4, "boft_n_butterfly_factor": 1, "n_frequency": 2, "scaling": 1.0,
}  # fmt: skip
KINDS_OF_PEFT = ["LORA", "VERA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "FOURIERFT", "HRA", "MISS", "C3A"]
PARTS_OF_PEFT = [
    "lora_A.weight", "lora_B.weight", "vera_lambda_d", "vera_lambda_b", "ia3_l", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "lokr_w1", "lokr_w2", "oft_R.weight", "boft_R", "boft_s", "fourierft_spectrum", "hra_u", "miss_block",
    "c3a_kernel", "x",
]  # fmt: skip
MODULE = "base_model.model.layers.0.mixer.in_proj"
SIZES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 32]), max_size=3).map(tuple)


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("vim_pico_patch8_32", "random", depth=1, embed_dim=8, d_state=2)


@bounded(200)
@given(data=st.data())
def test_adapters_of_peft(backbone, data):
    kind = data.draw(st.sampled_from(["LORA", "LORA", *KINDS_OF_PEFT]))
    config = json.dumps(data.draw(st.just(PEFT | {"peft_type": kind}) | changed_values(PEFT | {"peft_type": kind})))
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (32, 2)} if kind == "LORA" else {}
    shapes |= data.draw(st.dictionaries(st.sampled_from(PARTS_OF_PEFT), SIZES, max_size=3))
    state = {f"{MODULE}.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    head = {"base_model.model.head.weight": torch.zeros(3, 8), "base_model.model.head.bias": torch.zeros(3)}
    tensors = save({**state, **head})
    files = {
        "adapter_config.json": data.draw(st.just(config.encode()) | mutated(config.encode())),
        "adapter_model.safetensors": data.draw(st.just(tensors) | st.just(tensors) | mutated(tensors)),
    }
    own = copy.deepcopy(backbone)  # it is changed
    model = read_or_refused(files, lambda folder: from_peft(folder, own))
    if model is not None:
        with torch.no_grad():
            assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


ADAPTER = {
    "format": 1, "methods": {}, "num_classes": 3, "task": "x",
    "backbone": {"name": "vim_pico_patch8_32", "sha256": "0" * 64, "architecture": {}},
}  # fmt: skip


@bounded(60)
@given(config=changed_values(ADAPTER).map(json.dumps) | st.builds(json.dumps, JSON), name=st.text(max_size=9))
def test_adapters_to_publish(config, name):
    tensors = save({"head.weight": torch.zeros(3, 8), "head.bias": torch.zeros(3)})
    record = fake_record("vtab/cifar", "a", 0, 0.5, backbone={"name": name})

    def publish(folder: Path) -> None:
        to_hub_folder(folder, folder / "out", record)
        assert (folder / "out" / "README.md").read_text().count("\n---\n") == 1

    read_or_refused({"adapter_config.json": config.encode(), "adapter.safetensors": tensors}, publish)
