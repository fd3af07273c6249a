"""What a run leaves behind, and what stands around it, under random input: read, or refused with a UserError.

tests/helpers/fuzz.py has the strategies; test_fuzz.py is about adapters, images and archives.
"""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from helpers import runs
from helpers.fake_records import CONFIGS, fake_record
from helpers.fuzz import JSON, bounded, changed_values, mutated
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mambapeft_vision.adapter.presets import read_presets
from mambapeft_vision.data.manifest import MANIFEST_FILE, read_entry
from mambapeft_vision.engine.checkpoint import AtomicCheckpointIO
from mambapeft_vision.integrations.convert import read_reference_config
from mambapeft_vision.results import tables
from mambapeft_vision.results.bundle import read_bundle, write_bundle
from mambapeft_vision.results.metrics import read_metrics
from mambapeft_vision.results.predictions import read_labels
from mambapeft_vision.results.report import report
from mambapeft_vision.run.evaluate import recorded_config
from mambapeft_vision.run.exit import describe_error, is_mistake
from mambapeft_vision.run.overrides import prepare_multirun
from mambapeft_vision.run.own_code import NO_OWN_CODE
from mambapeft_vision.run.rerun import store_root_config
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.search.search import JOURNAL, Search, export, open_study, release_dead_trials
from mambapeft_vision.search.space import Range, Space, read_space
from mambapeft_vision.sweep.estimates import COLUMNS, read_rates
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.git_checkout import checkout_state
from mambapeft_vision.utils.names import check_method_names, check_name
from mambapeft_vision.utils.tensor_files import with_checksum
from mambapeft_vision.utils.text import csv_cell, html_text, latex, lines, markdown, override, plain, shown


def read_or_refused(name: str, content: bytes, read: Callable[[Path], object]) -> object:
    """What `read` makes of a folder with one file, or None where it refuses that in one printable message."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).parent.mkdir(exist_ok=True)
        (Path(folder) / name).write_bytes(content)
        try:
            return read(Path(folder))
        except UserError as error:
            message = str(error)
            assert lines(message) == message and len(message) < 4_000, ascii(message[:1_000])
            return None


def as_json(values: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: json.dumps(value).encode())


# Results

RECORD = asdict(fake_record("vtab/cifar", "a", 0, 0.5))
STANDARD = tables.read_standard(CONFIGS)


def shown_everywhere(folder: Path) -> None:
    found = tables.collect(tables.find_records([folder]), STANDARD)
    for collection in found:
        for render in (tables.to_text, tables.to_markdown, tables.to_latex):
            assert all(render(table) for table in tables.tables_of(collection))
    assert tables.to_csv(found) or not found


@bounded(80)
@given(content=as_json(changed_values(RECORD)) | mutated(json.dumps(RECORD).encode()))
@example(content=json.dumps(RECORD).replace(', "batch_size": 32', "").encode())
def test_records_and_tables_of_them(content):
    read_or_refused("result.json", content, shown_everywhere)


@bounded(25)
@given(content=as_json(changed_values(RECORD)))
def test_records_to_run_again(content):
    def again(folder: Path) -> None:
        store_root_config(folder, [], runs.CONFIGS)
        make_plan(runs.compose_root("from_result", []))

    try:
        read_or_refused("result.json", content, again)
    except Exception as error:
        assert is_mistake(error), describe_error(error)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("bundle") / "a.runs.json"
    write_bundle(path, [fake_record("vtab/cifar", "a", seed, 0.5 + seed / 100) for seed in range(3)])
    return path.read_bytes()


@bounded(60)
@given(data=st.data())
def test_bundles(bundle, data):
    content = data.draw(as_json(changed_values(json.loads(bundle))) | mutated(bundle))
    read_or_refused("a.runs.json", content, lambda folder: read_bundle(folder / "a.runs.json"))


@bounded(100)
@given(content=st.binary(max_size=60) | mutated(b"epoch,loss,accuracy\n0,1.5,0.1\n1,1.25,0.25\n"))
def test_metrics(content):
    read_or_refused("metrics.csv", content, read_metrics)


def predictions() -> bytes:
    with tempfile.TemporaryFile() as file:
        np.savez_compressed(file, predicted=np.arange(5), labels=np.arange(5))
        file.seek(0)
        return file.read()


@bounded(60)
@given(content=st.binary(max_size=60) | mutated(predictions()))
def test_predictions(content):
    found = read_or_refused("predictions.npz", content, read_labels)
    assert found is None or found[0].dtype == np.int64


# Texts of others, wherever they are shown


@bounded(200)
@given(text=st.text(st.characters(), max_size=80))
def test_texts(text):
    assert all(lines(show(text)) == show(text) for show in (plain, shown, markdown, latex, html_text))
    assert not re.search(r"(?<!\\)\|", markdown(text).replace("\\\\", "")) and "<" not in markdown(text)
    assert set(re.findall(r"\\[a-z]+", latex(text))) <= {r"\textbackslash", r"\textasciicircum", r"\textasciitilde"}
    assert not set(html_text(text)) & set("<>\"'")
    assert str(csv_cell(text))[:1] not in ("=", "@")
    for check in (lambda: check_name(text, "name"), lambda: check_method_names([text])):
        try:
            check()
        except UserError as error:
            assert lines(str(error)) == str(error)
        else:
            assert not set(text) & set("/\0\n\\${}'\" ;") and text not in (".", "..")


@bounded(2)
@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_reports_of_any_name(name):
    record = fake_record("vtab/cifar", "a", 0, 0.5, backbone={"name": name}, device_name=name)
    page = report(tables.collect([record], STANDARD), title=f"<b>{name}")
    assert "<b>" not in page and "&lt;b&gt;" in page


# Configs

CONFIG = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.create(RECORD["config"])))


@bounded(80)
@given(
    content=changed_values(CONFIG).map(lambda value: yaml.safe_dump(value).encode())
    | mutated(yaml.safe_dump(CONFIG).encode())
)
def test_configs_of_runs(content):
    read_or_refused(
        "config.yaml", content, lambda folder: make_plan(recorded_config(folder, cache=None, own=NO_OWN_CODE))
    )


SPACE = CONFIGS / "search" / "tune.yaml"
PRESETS = read_presets(CONFIGS / "method")
SPACES = [yaml.safe_load(file.read_text()) for file in sorted((CONFIGS / "search").glob("*.yaml"))]


@bounded(30)
@given(content=st.sampled_from(SPACES).flatmap(changed_values).map(lambda value: yaml.safe_dump(value).encode()))
def test_search_spaces(content):
    read_or_refused("s.yaml", content, lambda folder: read_space(folder / "s.yaml", PRESETS, "lora_p_x"))


REFERENCE = b"model = dict(backbone=dict(type='VimPEFTModel', l=dict(dim=8), module=dict(depth=24, x=[1, -2])))\n"


@bounded(100)
@given(content=mutated(REFERENCE) | st.text("()[]{}=,'\"dict:+-*.\n 1ae", max_size=60).map(str.encode))
def test_reference_configs(content):
    read_or_refused("c.py", content, lambda folder: read_reference_config(folder / "c.py"))


@bounded(40)
@given(content=as_json(JSON | st.fixed_dictionaries({"peft_kwargs": JSON, "module_kwargs": JSON})))
def test_reference_configs_in_json(content):
    read_or_refused("c.json", content, lambda folder: read_reference_config(folder / "c.json"))


WORDS = st.sampled_from(
    ["method", "dataset", "seed", "trainer", ".", "=", "glob(", ")", ",", "*", "[", "]", "{", "}", "${", "'", '"', "~",
     "+",
     "@", "lora_p_x", "vtab/*", "1", "-m", " ", "\n", "\\", ":", "null", "range(", "paths.outputs=~", "\x1b", "é"]
)  # fmt: skip


@bounded(60)
@given(arguments=st.lists(st.lists(WORDS, max_size=5).map("".join), max_size=3))
def test_command_lines(arguments):
    try:
        prepared = prepare_multirun(["-m", *arguments], CONFIGS)
        assert len(prepared) == len(arguments) + 3 or any("=" in text for text in prepared)
    except Exception as error:
        assert is_mistake(error), describe_error(error)
        assert lines(describe_error(error)) == describe_error(error)


@bounded(40)
@given(value=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12))
def test_any_value_can_be_given(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if "${" not in value:
        parsed = OverridesParser.create().parse_override(override("key", value)).value()
        assert str(parsed) == value or value in ("", "null") or not isinstance(parsed, str)


# What stands around runs

MANIFEST = {
    "format": 1,
    "tasks": {"toy": {"sha256": "0" * 64, "lists": {"test": "1" * 64}, "images": 1, "bytes": 2,
                      "classes_seen": {"test": 1},
                      "decoded": True}},
    "source": {"archive": "a.zip", "bytes": 3},
}  # fmt: skip


@bounded(80)
@given(content=as_json(changed_values(MANIFEST)) | mutated(json.dumps(MANIFEST).encode()))
def test_manifests(content):
    read_or_refused(MANIFEST_FILE, content, lambda folder: read_entry(folder, "toy"))


RATES = f"# measured\n{','.join(COLUMNS)}\nvim_s,*,100,200\nvim_s,lora_p_x,1.5,2\n".encode()


@bounded(80)
@given(content=mutated(RATES) | st.binary(max_size=40).map(lambda row: RATES + row))
def test_rates(content):
    read_or_refused("rates.csv", content, lambda folder: read_rates(folder / "rates.csv", PRESETS))


CHECKPOINT = with_checksum({"epoch": 1, "global_step": 2, "loops": {}, "state_dict": {}, "optimizer_states": []})


@bounded(40)
@given(content=mutated(CHECKPOINT) | JSON.map(with_checksum))
def test_checkpoints_of_runs(content):
    def read(folder: Path) -> None:
        AtomicCheckpointIO().load_checkpoint(folder / "checkpoint.ckpt")

    assert read_or_refused("checkpoint.ckpt", content, read) is None


def settings_in(folder: Path) -> Search:
    space = Space("all", ("vtab/cifar",), {}, {}, {"learning_rate": Range(1e-4, 1e-2, log=True)})
    return Search("s", space, "validation", 3, folder, None, ())


@pytest.fixture(scope="module")
def journal(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("journal")
    study = open_study(settings_in(folder))
    study.optimize(lambda trial: trial.suggest_float("trainer.learning_rate", 1e-4, 1e-2, log=True), n_trials=2)
    study.ask()
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


@bounded(60)
@given(data=st.data())
def test_journals(journal, data):
    changed = data.draw(changed_values(journal, 3))
    rows = changed if isinstance(changed, list) else [changed]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def read(folder: Path) -> None:
        study = open_study(settings_in(folder))
        release_dead_trials(study, settings_in(folder).space)
        export(settings_in(folder), study)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    read_or_refused(JOURNAL, data.draw(st.just(content) | mutated(content)), read)


GIT = {
    "HEAD": [b"ref: refs/heads/main\n", b"0" * 40],
    "index": [b"DIRC\0\0\0\2\0\0\0\1" + bytes(40) + bytes(20) + b"\0\5a.txt" + bytes(3) + b"TREE" + bytes(30)],
    "packed-refs": [b"# pack-refs\n" + b"1" * 40 + b" refs/heads/main\n"],
    "commondir": [b"..\n", b"."],
    "refs": [b"x"],
}


@bounded(150)
@given(data=st.data())
def test_checkouts(data):
    with tempfile.TemporaryDirectory() as name:
        git = Path(name) / ".git"
        git.mkdir()
        for file, contents in GIT.items():
            if data.draw(st.booleans()):
                whole = data.draw(st.sampled_from(contents))
                (git / file).write_bytes(data.draw(st.just(whole) | mutated(whole)))
        commit, differs = checkout_state(Path(name), "a.txt")
        assert commit is None or re.fullmatch("[0-9a-f]{40,64}", commit)
        assert differs in (None, True, False)
