"""Bundles hold exactly the records that went in, in little space, and damage is named."""

import json
from dataclasses import asdict, replace

import pytest
from helpers.fake_records import fake_record

from mambapeft_vision.results.bundle import read_bundle, write_bundle
from mambapeft_vision.results.record import write_record
from mambapeft_vision.results.tables import find_records
from mambapeft_vision.utils.errors import UserError


def some_records():
    records = [
        fake_record(task, preset, seed, 0.5 + seed / 7, dataset={"seed": seed}, wall_seconds=1 / (seed + 3))
        for task in ("vtab/cifar", "vtab/dtd", "custom/one")
        for preset in ("a", "hybrid", "lora_p_x")
        for seed in (0, 1, 2)
    ]
    odd = replace(records[0], seed=9, unmerged={"a": "„grund“\n"}, git_commit="c" * 40, git_dirty=False)
    other_sections = replace(records[1], seed=9, config={**records[1].config, "kernel": "auto", "sweep": None})
    return [*records, odd, other_sections]


def test_what_is_read_is_what_was_written(tmp_path):
    records = some_records()
    file = tmp_path / "sub" / "some.runs.json"
    write_bundle(file, reversed(records))
    key = lambda record: (record.task, record.methods, record.seed)  # noqa: E731
    read = read_bundle(file)
    assert sorted(read, key=key) == sorted(records, key=key)
    # Equal under == is not enough for numbers: 1 == 1.0 == True.
    assert [json.dumps(asdict(r), sort_keys=True) for r in sorted(read, key=key)] == [
        json.dumps(asdict(r), sort_keys=True) for r in sorted(records, key=key)
    ]
    again = tmp_path / "again.runs.json"
    write_bundle(again, records)
    assert again.read_bytes() == file.read_bytes()


def test_one_record_alone_and_a_bundle_of_thousands_is_small(tmp_path):
    (alone,) = some_records()[:1]
    write_bundle(tmp_path / "one.runs.json", [alone])
    assert read_bundle(tmp_path / "one.runs.json") == [alone]
    many = [replace(r, seed=s, train_loss=s / 997) for r in some_records() for s in range(70)]
    write_bundle(tmp_path / "many.runs.json", many)
    assert (tmp_path / "many.runs.json").stat().st_size < 250 * len(many)


def test_tables_read_bundles_beside_folders(tmp_path):
    records = some_records()
    write_bundle(tmp_path / "results" / "mini" / "some.runs.json", records[1:])
    (tmp_path / "results" / "run").mkdir()
    write_record(tmp_path / "results" / "run", records[0])
    found = find_records([tmp_path / "results"])
    assert len(found) == len(records) and all(record in found for record in records)
    assert len(find_records([tmp_path / "results" / "mini" / "some.runs.json"])) == len(records) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format=2), "format 2, expected 1"),
        (lambda content: content.pop("runs"), "KeyError"),
        (lambda content: content["runs"][3].pop(), "run 4 has"),
        (
            lambda content: content["common"].update(num_test="many"),
            "run 1 is no result of schema 3: num_test='many'",
        ),
        (lambda content: content["common"].pop("device"), "device is missing"),
        (lambda content: content["common"].update(colour=1), "colour is unknown"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    file = tmp_path / "some.runs.json"
    write_bundle(file, [record for record in some_records() if record.task == "vtab/cifar"])
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_bundle(file)
    assert str(file) in str(error.value)


def test_a_name_that_nothing_would_find_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.runs\.json"):
        write_bundle(tmp_path / "some.json", some_records())
