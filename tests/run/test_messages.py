"""What other libraries say of mistakes is translated: one line with a remedy, and none of their own advice."""

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import runs
from helpers.fake_records import fake_record
from helpers.run_files import result_of

from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.data.image_list import read_list
from mambapeft_vision.data.images import decode_list
from mambapeft_vision.data.own.table import read_parquet
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.integrations.program import quantise
from mambapeft_vision.results.record import read_record, write_record
from mambapeft_vision.run.exit import describe_error, is_mistake
from mambapeft_vision.utils.tensor_files import read_tensors

PREPROCESSING = Preprocessing((8, 8), "bicubic", (0.0,) * 3, (1.0,) * 3)
HEADER = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'  # of 36 bytes that do not follow


class Pickled:
    """What PyTorch's restricted unpickler refuses."""


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def an_object_in_a_checkpoint(folder: Path, _: pytest.MonkeyPatch) -> None:
    torch.save(Pickled(), folder / "w.pth")
    read_tensors(folder / "w.pth")


def half_a_safetensors_file(folder: Path, _: pytest.MonkeyPatch) -> None:
    read_tensors(written(folder, "w.pth", len(HEADER).to_bytes(8, "little") + HEADER))


def half_a_zip_file(folder: Path, _: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(folder / "whole.zip", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(1_000))
    read_tensors(written(folder, "w.pth", (folder / "whole.zip").read_bytes()[:500]))


def a_text_for_an_image(folder: Path, _: pytest.MonkeyPatch) -> None:
    written(folder, "0.png", b"no image")
    decode_list(read_list(written(folder, "test.txt", b"0.png 0\n"), 2, remedy=""), PREPROCESSING)


def a_record_of_other_types(folder: Path, _: pytest.MonkeyPatch) -> None:
    write_record(folder, fake_record("vtab/cifar", "lora_p_x", 0, 0.5))
    content = result_of(folder / "result.json")
    written(folder, "result.json", json.dumps({**content, "seed": "x"}).encode())
    read_record(folder)


def a_text_for_a_parquet_file(folder: Path, _: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    read_parquet(written(folder, "labels.parquet", b"path,label\n"))


def no_pyarrow(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "pyarrow.parquet", None)
    patch.setitem(sys.modules, "pyarrow", None)
    read_parquet(written(folder, "labels.parquet", b"PAR1"))


def no_onnxruntime(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "onnxruntime", None)
    quantise(folder / "model.onnx", folder / "small.onnx")


def no_network(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_adapter("nobody/no-such-adapter")


def a_group_that_is_not_there(folder: Path, _: pytest.MonkeyPatch) -> None:
    runs.compose_train(["datasets=folder"])


def an_option_that_is_not_there(folder: Path, _: pytest.MonkeyPatch) -> None:
    runs.compose_train(["dataset=cifar"])


def no_key(folder: Path, _: pytest.MonkeyPatch) -> None:
    runs.compose_train(["a b"])


# What arises, what is said of it, and the words of the library that nobody shall read.
MESSAGES: list[tuple[Callable[[Path, pytest.MonkeyPatch], None], str, str]] = [
    (an_object_in_a_checkpoint, "holds more than tensors", "weights_only"),
    (half_a_safetensors_file, "w.pth cannot be read as safetensors", "SafetensorError"),
    (half_a_zip_file, "it is damaged or not a zip file", "BadZipFile"),
    (a_text_for_an_image, "0.png", "BytesIO"),
    (a_record_of_other_types, "seed", "validation error"),
    (a_text_for_a_parquet_file, "labels.parquet is no Parquet file that can be read", "ArrowInvalid"),
    (no_pyarrow, "reading Parquet needs pyarrow. Install it", "ModuleNotFoundError"),
    (no_onnxruntime, "ONNX needs packages that are not installed", "ModuleNotFoundError"),
    (no_network, "Check the name; a private one needs HF_TOKEN", "outgoing traffic"),
    (a_group_that_is_not_there, "did you mean dataset", "defaults list"),
    (an_option_that_is_not_there, "did you mean vtab/cifar, ", "Available options"),
    (no_key, "is no override; expected key=value", "mismatched"),
]


@pytest.mark.parametrize(("arises", "said", "not_said"), MESSAGES, ids=[row[0].__name__ for row in MESSAGES])
def test_messages_of_other_libraries_are_translated(tmp_path, monkeypatch, arises, said, not_said):
    with pytest.raises(Exception) as caught:
        arises(tmp_path, monkeypatch)
    assert is_mistake(caught.value)
    message = describe_error(caught.value)
    assert said in message and not_said not in message
    assert len(message.splitlines()) == 1
