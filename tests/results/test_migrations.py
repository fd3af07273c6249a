"""Results of earlier releases read as today's."""

import json
from pathlib import Path

import pytest
from helpers import runs

from mambapeft_vision.results.bundle import read_bundle
from mambapeft_vision.results.migrations import migrated_config, migrated_result
from mambapeft_vision.results.record import read_record, record_of
from mambapeft_vision.run.build import build_dataset, build_logger
from mambapeft_vision.run.config import TrainConfig, TrainerConfig
from mambapeft_vision.run.run_config import RunPlan

OLD = sorted((runs.ROOT / "results" / "demo").rglob("result.json"))


@pytest.mark.parametrize("file", OLD[:2], ids=lambda file: file.parent.name)
def test_the_oldest_results_have_every_key(file):
    """They were written before the trainer knew GPUs of one run, and before there were sweeps."""
    written = json.loads(file.read_text())["config"]
    config = read_record(file).config
    assert "devices" not in written["trainer"] and "sweep" not in written
    assert config.keys() == TrainConfig.__dataclass_fields__.keys() - {"pretrain"}  # which no fine-tuning run records
    assert config["trainer"] == {**written["trainer"], "micro_batch": None, "cuda_graph": True, "devices": 1} | {
        "on_nonfinite": "stop"
    }
    TrainerConfig(**config["trainer"]).check()


def test_older_results_do_not_say_how_images_are_encoded():
    written = json.loads(OLD[0].read_text())
    assert written["schema_version"] == 1 and "image_format" not in written
    record = read_record(OLD[0])
    assert record.image_format is None and record.schema_version == 3
    assert migrated_result({**written, "image_format": "png", "schema_version": 2})["image_format"] == "png"


@pytest.mark.parametrize("given", [True, False, None])
def test_older_results_name_no_classes_and_say_in_their_config_whether_an_image_has_several_labels(given):
    written = json.loads(OLD[0].read_text())
    if given is not None:
        written["config"]["dataset"]["multi_label"] = given
    record = record_of({**written, "image_format": "png", "schema_version": 2}, "there")
    assert (record.class_names, record.multi_label) == (None, given is True)
    assert (record.image_format, record.fingerprint) == ("png", written["fingerprint"])


def test_classes_that_moved_are_found():
    record = read_bundle(Path(__file__).parent / "earlier" / "2026-11-25.runs.json")[0]
    plan = RunPlan(record.config, TrainerConfig(**record.config["trainer"]), record.fingerprint, runs.ROOT)
    assert build_dataset(plan).name == record.task
    assert type(build_logger(plan)).__name__ == "NoLogger"


def test_todays_results_stay_as_they_are():
    config = {
        "method_sizes": "of_vim_s",
        "sweep": "mine",
        "paths": {"cache": "x", "backbones": None},
        "trainer": {"micro_batch": 4, "cuda_graph": False, "devices": 2, "on_nonfinite": "skip_run"},
        "method": {"a": {"_target_": "mambapeft_vision.methods.offset.Offset"}},
    }
    assert migrated_config(config) == config


@pytest.mark.parametrize(
    "content", [None, 3, [], "text", {}, {"config": 3}, {"config": {"trainer": 3, "logger": None}}]
)
def test_what_is_no_result_is_left_to_the_checks(content):
    migrated = migrated_result(content)
    assert migrated == content or migrated["config"]["trainer"] == 3
