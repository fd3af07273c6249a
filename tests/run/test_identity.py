"""A run is found again by its fingerprint: those of earlier releases stay, and one experiment has one."""

import json
import os
from pathlib import Path

import pytest
from helpers import runs

from mambapeft_vision.results.bundle import read_bundle
from mambapeft_vision.results.record import DERIVED, RunRecord
from mambapeft_vision.run import run_config
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.hashing import sha256_json
from mambapeft_vision.utils.identity import (
    SAME_EXPERIMENT,
    UNDECIDING,
    UNDECIDING_IN_PRETRAINING,
    fingerprint,
    identity,
    undeciding,
)

# Command → fingerprint at commit 6f29c08, before classes moved.
PINNED = json.loads((Path(__file__).parent / "fingerprints.json").read_text())
RESULTS = runs.ROOT / "results"
EARLIER = runs.ROOT / "tests" / "results" / "earlier" / "2026-11-25"  # every fiftieth of the runs published then


def fingerprint_of(*overrides: str) -> str:
    return make_plan(runs.compose_train(overrides)).fingerprint


@pytest.mark.parametrize("command", PINNED)
def test_runs_of_earlier_releases_are_found_again(command):
    assert fingerprint_of(*command.split()) == PINNED[command]


def test_every_published_result_has_the_fingerprint_of_its_config():
    """Of the configs as they were written, and of the migrated ones where no key came later."""
    files = sorted(RESULTS.glob("demo/**/result.json"))
    assert len(files) == 12
    for file in files:
        content = json.loads(file.read_text())
        assert fingerprint(identity(content["config"])) == content["fingerprint"], file
    mini = {"vim_nano": 8817, "mambareg_nano": 8479, "vmamba_nano": 6710}
    for path, number in {**{RESULTS / "mini" / name: count for name, count in mini.items()}, EARLIER: 81}.items():
        records = read_bundle(path.with_suffix(".runs.json"))
        assert len(records) == number
        assert [r.fingerprint for r in records if _fingerprint_by_config(r) != r.fingerprint] == []


def _fingerprint_by_config(record: RunRecord) -> str:
    made = record.config.get(DERIVED)  # a result that was made from finished runs
    return run_config.fingerprint_of(record.config) if made is None else sha256_json(made)


FOLDER = ("dataset=folder", "dataset.name=custom/tiny", "dataset.num_classes=3")


@pytest.mark.parametrize(
    "path", ["./tiny", "tiny/", "{here}/tiny", "{here}/other/../tiny", "../{name}/tiny"], ids=lambda path: path
)
def test_a_task_is_one_task_however_its_path_is_written(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = path.format(here=tmp_path, name=tmp_path.name)
    one = fingerprint_of(*FOLDER, "dataset.folder=tiny")
    assert fingerprint_of(*FOLDER, f"dataset.folder={written}") == one
    assert fingerprint_of(*FOLDER, "dataset.folder=tiny2") != one


def test_what_can_be_asked_of_own_images_counts_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ("dataset=folder", "dataset.name=custom/tiny")
    one = fingerprint_of(*own, "dataset.path=photos")
    assert fingerprint_of(*own, f"dataset.path={tmp_path}/photos") == one
    others = ["dataset.shots=2", "dataset.split_seed=1", "dataset.augment={flip: 0.5}", "dataset.multi_label=true"]
    assert len({one, *(fingerprint_of(*own, "dataset.path=photos", other) for other in others)}) == 5
    assert fingerprint_of("dataset.shots=null", "dataset.split_seed=0", "dataset.augment=null") == fingerprint_of()


def test_data_that_moved_are_the_same_data(tmp_path):
    interpolated = fingerprint_of(*FOLDER, "dataset.folder=${paths.data}/tiny")
    spelled = fingerprint_of(*FOLDER, f"dataset.folder={tmp_path}/tiny", f"paths.data={tmp_path}")
    relative = fingerprint_of(*FOLDER, f"dataset.folder={os.path.relpath(tmp_path)}/tiny", f"paths.data={tmp_path}/")
    assert interpolated == spelled == relative
    assert fingerprint_of(*FOLDER, f"dataset.folder={tmp_path}/tiny") != interpolated


@pytest.mark.parametrize("outputs", ["{here}/outputs", "{here}/results/", "/elsewhere/outputs"])
def test_one_command_is_one_run_from_every_folder(outputs, tmp_path, monkeypatch):
    command = (*FOLDER, f"dataset.folder={tmp_path}/tiny", f"paths.outputs={outputs.format(here=tmp_path)}")
    (tmp_path / "below").mkdir()
    found = set()
    for folder in (tmp_path, tmp_path / "below", tmp_path.parent):
        monkeypatch.chdir(folder)
        found.add(fingerprint_of(*command))
    assert len(found) == 1


def test_weights_with_a_name_are_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fingerprint_of("paths.data=.") == fingerprint_of()
    file = fingerprint_of("backbone.weights=vim.pth")
    assert fingerprint_of(f"backbone.weights={tmp_path}/vim.pth") == file != fingerprint_of()


def test_auto_finds_what_cuda_did():
    """On a machine with GPUs they are the same; the CPU computes with other roundings and stays apart."""
    assert len({fingerprint_of(f"trainer.device={name}") for name in ("auto", "cuda", "cuda:1")}) == 1
    assert fingerprint_of("trainer.device=cpu") != fingerprint_of()


def test_every_listed_key_exists_and_has_its_reason():
    config = make_plan(runs.compose_train(["backbone=mambareg_s"])).config
    for key, reason in SAME_EXPERIMENT.items():
        section, _, name = key.partition(".")
        assert section in config and (not name or name in config[section]), key
        assert len(reason) > 10
    assert UNDECIDING.items() <= SAME_EXPERIMENT.items()
    assert undeciding("dataset") == {"num_workers", "test_batch_size"}


def test_every_listed_key_of_pretraining_exists():
    from dataclasses import fields

    from mambapeft_vision.pretraining.config import PretrainConfig

    assert UNDECIDING_IN_PRETRAINING.keys() <= {field.name for field in fields(PretrainConfig)}
