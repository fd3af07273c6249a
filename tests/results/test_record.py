"""result.json: written whole, read strictly."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers.run_files import result_of

from mambapeft_vision.results.layout import METRICS_FILE
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.record import CHECKSUM, RESULT_FILE, RunRecord, is_finished, read_record, write_record
from mambapeft_vision.utils.errors import UserError

RECORD = RunRecord(
    task="vtab/cifar",
    group="natural",
    methods=["lora_p_x"],
    seed=0,
    accuracy=0.75,
    loss=1.0,
    num_test=10000,
    epochs=100,
    train_loss=0.5,
    train_accuracy=0.9,
    trainable=1769472,
    trainable_by_method={"lora_p_x": 1769472},
    head=38500,
    frozen=25411584,
    unmerged={},
    train_images_per_second=2500.0,
    test_images_per_second=5000.0,
    train_seconds=40.0,
    wall_seconds=60.0,
    peak_memory_bytes=2**30,
    device="cuda:0",
    device_name="a GPU",
    kernel="triton",
    precision="bf16",
    backbone="vim_small_patch16_224",
    backbone_sha256="0" * 64,
    data_manifest="1" * 64,
    image_format="png",
    class_names=["cat", "dog"],
    multi_label=False,
    fingerprint="2" * 64,
    git_commit=None,
    git_dirty=None,
    versions={"torch": "2.6.0"},
    finished_at="2026-01-01T00:00:00+00:00",
    config={
        "seed": 0,
        "method_sizes": "given",
        "sweep": None,
        "backbone": {"name": "vim_small_patch16_224"},
        "dataset": {"train_split": "train800val200", "test_split": "test", "batch_size": 32},
        "trainer": {
            "clip_norm": None,
            "learning_rate": 1e-3,
            "micro_batch": None,
            "cuda_graph": True,
            "devices": 1,
            "on_nonfinite": "stop",
        },
        "method": {"lora_p_x": {"rank": 64}},
    },
)


def edit(folder: Path, **changes) -> None:
    write_record(folder, RECORD)
    content = result_of(folder / RESULT_FILE) | changes
    (folder / RESULT_FILE).write_text(json.dumps({k: v for k, v in content.items() if v != "(removed)"}))


def test_a_changed_digit_is_no_other_result(tmp_path):
    """Each digit of the file in turn; without its checksum it is as of earlier releases."""
    write_record(tmp_path, RECORD)
    file = tmp_path / RESULT_FILE
    text = file.read_text()
    for place in [found.start() for found in re.finditer(r"[0-9]", text)]:
        file.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")
        with pytest.raises(UserError, match="result.json|cannot|schema"):
            read_record(tmp_path)
    file.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != CHECKSUM}))
    assert read_record(tmp_path) == RECORD


def test_a_changed_digit_of_the_epochs_is_no_other_curve(tmp_path):
    """Each digit of metrics.csv in turn, cut and prolonged; an unfinished run and earlier releases have no checksum."""
    file = tmp_path / METRICS_FILE
    text = "epoch,loss,accuracy\n0,1.5,0.25\n1,0.5,0.75\n"
    damaged = [
        f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
        for place in [found.start() for found in re.finditer(r"[0-9]", text)]
    ]
    file.write_text(text)
    rows = read_metrics(tmp_path)
    write_record(tmp_path, RECORD)
    assert read_metrics(tmp_path) == rows and len(rows) == 2
    for other in (*damaged, text[:-12], text + "2,0.4,0.8\n", text.replace("\n", "\r\n")):
        file.write_text(other, newline="")
        with pytest.raises(UserError, match=r"metrics.csv is not as it was written.*resume=false"):
            read_metrics(tmp_path)
    edit(tmp_path)
    assert read_metrics(tmp_path)  # by an earlier release
    file.write_text(damaged[0])
    write_record(tmp_path, RECORD)
    (tmp_path / RESULT_FILE).write_text((tmp_path / RESULT_FILE).read_text().replace("0.", "1.", 1))
    with pytest.raises(UserError, match="result.json is not as it was written"):
        read_metrics(tmp_path)
    (tmp_path / RESULT_FILE).unlink()
    assert read_metrics(tmp_path)  # not finished


def test_round_trip(tmp_path):
    assert not is_finished(tmp_path)
    write_record(tmp_path, RECORD)
    assert is_finished(tmp_path)
    assert read_record(tmp_path) == read_record(tmp_path / RESULT_FILE) == RECORD
    assert [file.name for file in tmp_path.iterdir()] == [RESULT_FILE]


def test_whole_numbers_are_read_as_floats_too(tmp_path):
    edit(tmp_path, accuracy=1, wall_seconds=60)
    assert read_record(tmp_path).accuracy == 1


def test_a_result_that_is_no_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path, replace(RECORD, loss=float("nan")))
    assert not is_finished(tmp_path)


@pytest.mark.parametrize("name", [field.name for field in fields(RunRecord)])
def test_every_field_is_needed(tmp_path, name):
    edit(tmp_path, **{name: "(removed)"})
    with pytest.raises(UserError, match=name):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"acuracy": 0.5}, "acuracy is unknown"),
        ({"accuracy": "0.5"}, "accuracy='0.5'; expected a number"),
        ({"accuracy": True}, "accuracy=True"),
        ({"accuracy": 1.5}, "accuracy=1.5; expected 0 to 1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": 2**70}, "seed=1180591620717411303424"),
        ({"num_test": -1}, "num_test=-1"),
        ({"methods": "lora_p_x"}, "methods='lora_p_x'"),
        ({"methods": [1]}, "methods.0=1"),
        ({"trainable_by_method": {"a": "1"}}, "trainable_by_method.a='1'"),
        ({"git_commit": 3}, "git_commit=3"),
        ({"git_dirty": "no"}, "git_dirty='no'"),
        ({"config": {}}, "config.backbone=None; expected keys and values"),
        ({"config": None}, "config=None"),
        ({"config": RECORD.config | {"dataset": {}}}, "config.dataset.train_split=None"),
        ({"schema_version": 4}, "schema_version is 4"),
    ],
)
def test_wrong_fields_are_named(tmp_path, changes, message):
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_record(tmp_path)


def test_files_that_are_no_records(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_record(tmp_path)
    (tmp_path / RESULT_FILE).write_text('{"task": ')
    with pytest.raises(UserError, match="no valid JSON"):
        read_record(tmp_path)
    (tmp_path / RESULT_FILE).write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        read_record(tmp_path)
