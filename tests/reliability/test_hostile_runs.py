"""Run folders, adapters, records, checkpoints and reference configs that somebody sends to do harm.

The rows are as those of test_hostile_files.py (tests/helpers/hostile.py says what a row is); each gets a copy of one
finished run, which it changes.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import hostile, runs
from helpers.hostile import Action, Attack, World
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mambapeft_vision.adapter.files import ADAPTER_FILE, CONFIG_FILE, read_adapter
from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.integrations.convert import read_reference_config
from mambapeft_vision.methods.targets import fits
from mambapeft_vision.results.record import read_record
from mambapeft_vision.results.tables import Found
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.outdated import outdated_note
from mambapeft_vision.run.rerun import store_root_config
from mambapeft_vision.run.run import train
from mambapeft_vision.utils.atomic import write_json

Prepare = Callable[[World, Path], Action]
Change = Callable[[Any], object]

TABLE: dict[str, tuple[Prepare, Attack]] = {}


def attack(
    name: str, words: Sequence[str], *, seconds: float = 5.0, mib: int = 400, disk_mib: int = 20
) -> Callable[[Prepare], Prepare]:
    """Adds a row: a function of a world and the run's folder in it, which returns what the user would do."""

    def add(prepare: Prepare) -> Prepare:
        assert name not in TABLE, name
        TABLE[name] = prepare, Attack(lambda world: lambda: None, words, seconds, mib, disk_mib)
        return prepare

    return add


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that was tested again, so that no row has to import anything."""
    folder = tmp_path_factory.mktemp("finished")
    task = runs.lay_out_task(folder / "task")
    runs.run(runs.overrides(task, folder / "out", "trainer.max_epochs=1", "paths.cache=null"))
    run = runs.only_run_folder(folder / "out")
    evaluation(run)()
    return run


@pytest.mark.parametrize("name", TABLE)
def test_attack(name, tmp_path, finished):
    prepare, row = TABLE[name]
    world = hostile.make_world(tmp_path)
    action = prepare(world, shutil.copytree(finished, world.folder / "run"))
    hostile.check(Attack(lambda _: action, row.words, row.seconds, row.mib, row.disk_mib), name, tmp_path)


def evaluation(run: Path) -> Action:
    return lambda: evaluate(runs.compose_root("evaluate", [f"run={run}", "device=cpu"]))


def changed_json(file: Path, change: Change) -> None:
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


def changed_yaml(file: Path, change: Change) -> None:
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content))


# config.yaml


def config_row(name: str, words: Sequence[str], change: Change, **limits: Any) -> None:
    @attack(f"config.yaml: {name}", words, **limits)
    def _(world: World, run: Path) -> Action:
        changed_yaml(run / "config.yaml", change)
        return evaluation(run)


def text_row(name: str, words: Sequence[str], text: str) -> None:
    @attack(f"config.yaml: {name}", words)
    def _(world: World, run: Path) -> Action:
        (run / "config.yaml").write_text(text)
        return evaluation(run)


LAUGHS = "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x,x]", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 10}]" for n in range(1, 9))])
text_row("billion laughs", ["config.yaml", "anchor"], LAUGHS)
text_row("a reference behind an escape", ["config.yaml", "reference"], r'name: "\x24{oc.env:HOME}"')
text_row("a reference in a key", ["config.yaml", "reference"], '"${oc.env:HOME}": 1')
text_row("a list", ["config.yaml", "no config of a run"], "[1, 2]")
config_row("a backbone of gigabytes", ["different backbones"], lambda c: c["backbone"].update(depth=24, embed_dim=8192))
config_row("another backbone", ["different backbones"], lambda c: c["backbone"].update(name="vim_small_patch16_224"))
config_row(
    "a data module that makes files",
    ["test.txt"],
    lambda c: c["dataset"].update(_target_="mambapeft_vision.data.DemoDataModule", folder="/nonexistent/x"),
)
config_row("weights from a device", ["do not exist"], lambda c: c["backbone"].update(weights="/dev/zero"))
config_row("a method with a path for a name", ["method name"], lambda c: c["method"].update({"../../x": {}}))
config_row("a task with a path for a name", ["dataset.name"], lambda c: c["dataset"].update(name="../../x"))
config_row("a name of 300 letters", ["dataset.name"], lambda c: c["dataset"].update(name="x" * 300))
config_row("escapes in a key", ["config.yaml"], lambda c: c["trainer"].update({"\x1b[2J": 1}))


def test_nothing_of_a_sent_config_says_where_files_are_written(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    cache = tmp_path / "theirs"
    cache.mkdir()
    (cache / ".ubuntu.iso.part").write_text("precious")
    changed_yaml(
        run / "config.yaml", lambda c: c["paths"].update(cache=str(cache), outputs=str(cache), data=str(cache))
    )
    evaluation(run)()
    assert [file.name for file in cache.iterdir()] == [".ubuntu.iso.part"]


@pytest.mark.parametrize("name", [".lock", "evaluation.json"])
def test_a_link_in_a_run_folder_is_not_followed_for_writing(finished, tmp_path, name):
    run = shutil.copytree(finished, tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    evaluation(run)()
    assert victim.read_text() == "precious"


# result.json


for kind, word in {"pipe": "pipe", "device": "is a link", "folder": "cannot be read", "loop": "is a link"}.items():

    @attack(f"result.json is a {kind}", ["result.json", word if kind != "folder" else ""])
    def _(world: World, run: Path, kind: str = kind) -> Action:
        return special(run, "result.json", kind)

    @attack(f"adapter_config.json is a {kind}", [CONFIG_FILE])
    def _(world: World, run: Path, kind: str = kind) -> Action:
        return special(run, CONFIG_FILE, kind)

    @attack(f"adapter.safetensors is a {kind}", [ADAPTER_FILE])
    def _(world: World, run: Path, kind: str = kind) -> Action:
        return special(run, ADAPTER_FILE, kind)

    @attack(f"config.yaml is a {kind}", ["config.yaml"])
    def _(world: World, run: Path, kind: str = kind) -> Action:
        return special(run, "config.yaml", kind)


def special(run: Path, name: str, kind: str) -> Action:
    path = run / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    return evaluation(run)


RECORDS: dict[str, Change] = {
    "no config": lambda r: r.update(config={}),
    "a config that is text": lambda r: r.update(config="x"),
    "a section that is a list": lambda r: r["config"].update(trainer=[1]),
    "paths that are text": lambda r: r["config"].update(method={"../x": {}}),
    "a long name": lambda r: r.update(task="x" * 300),
    "a config of 10 MB": lambda r: r.update(config=["x" * 10_000_000]),
    "escapes in a method's name": lambda r: r.update(methods=["\x1b[2J"]),
}
for name, change in RECORDS.items():

    @attack(f"result.json has {name}", ["result.json"])
    def _(world: World, run: Path, change: Change = change) -> Action:
        changed_json(run / "result.json", change)
        return lambda: store_root_config(run, [], runs.CONFIGS)


@attack("deep JSON as result.json", ["result.json", "nested too deeply"])
def _(world: World, run: Path) -> Action:
    (run / "result.json").write_text("[" * 200_000)
    return evaluation(run)


@attack("a record of a rank of 10^8, to be done again", ["expected at most"])
def _(world: World, run: Path) -> Action:
    def rank(record: Any) -> None:
        record["config"]["method"]["lora_p_x"]["rank"] = 10**8

    changed_json(run / "result.json", rank)
    record = store_root_config(run, [], runs.CONFIGS)
    cfg = runs.compose_root("from_result", [f"paths.outputs={world.folder / 'again'}"])
    return lambda: train(cfg, expected=record)


# Adapters


def adapter_row(name: str, words: Sequence[str], change: Change, **limits: Any) -> None:
    @attack(f"adapter_config.json: {name}", words, **limits)
    def _(world: World, run: Path) -> Action:
        changed_json(run / CONFIG_FILE, change)
        return lambda: load_adapter(run, "random")


def targets(text: str) -> Change:
    return lambda c: c["methods"]["lora_p_x"].update(targets=text)


adapter_row("targets that backtrack", ["matches no parameter"], targets("**" * 14 + "!"), seconds=3)
adapter_row("targets of many stars", ["matches no parameter"], targets("*a" * 90 + "!"), seconds=3)
adapter_row("targets without end", ["at most 200 characters"], targets("*" * 1_000_000), disk_mib=40)
adapter_row("a rank of 10^8", ["does not fit"], lambda c: c["methods"]["lora_p_x"].update(rank=10**8))
adapter_row(
    "a backbone of gigabytes",
    ["parameters; expected at most"],
    lambda c: c["backbone"]["architecture"].update(depth=24, embed_dim=8192),
)
adapter_row(
    "a backbone that the tensors do not fit",
    ["does not fit"],
    lambda c: c["backbone"]["architecture"].update(depth=12, embed_dim=2048),
)
adapter_row("a reference", ["reference"], targets("${oc.env:HOME}"))
adapter_row(
    "thousands of methods",
    [CONFIG_FILE, "20,000 methods"],
    lambda c: c["methods"].update({f"m{n}": c["methods"]["lora_p_x"] for n in range(19_999)}),
    disk_mib=30,
)
adapter_row(
    "thousands of targets",
    ["100,000 targets"],
    lambda c: c["methods"]["lora_p_x"].update(targets=["layers.**"] * 100_000),
)
adapter_row(
    "many methods of many targets on a deep backbone",
    [CONFIG_FILE],
    lambda c: (
        c["backbone"]["architecture"].update(depth=256, embed_dim=16),
        c["methods"].update(
            {f"m{n}": {**c["methods"]["lora_p_x"], "targets": ["*a" * 90 + "!"] * 50} for n in range(49)}
        ),
    ),
    seconds=40,
)
adapter_row(
    "an order of as many entries as a backbone has",
    ["does not fit"],
    lambda c: (
        c["backbone"]["architecture"].update(depth=1, embed_dim=12_000),
        c.update(methods={"f": {
            "_target_": "mambapeft_vision.methods.fourierft.FourierFT", "targets": "in_proj", "n_frequency": 10}}),
    ),
)  # fmt: skip
adapter_row(
    "a matrix of its own as large as it likes",
    ["does not fit"],
    lambda c: c.update(methods={"v": {
        "_target_": "mambapeft_vision.methods.vera.VeRA", "targets": "in_proj", "rank": 10_000_000}}),
)  # fmt: skip
adapter_row(
    "a series of as many terms as it likes",
    ["neumann_terms=1000000000", "from 3 to 64"],
    lambda c: c.update(methods={"o": {
        "_target_": "mambapeft_vision.methods.oft.OFT", "targets": "in_proj", "neumann_terms": 10**9}}),
)  # fmt: skip
adapter_row(
    "a rank beyond 64 bits",
    ["rank=", "expected at most 2,147,483,647"],
    lambda c: c["methods"]["lora_p_x"].update(rank=10**30),
)
adapter_row("escapes in a method's name", [CONFIG_FILE], lambda c: c["methods"].update({"\x1b[2J": {"_target_": "x"}}))


@attack("a tensor of an odd type", ["float8", "expected numbers"])
def _(world: World, run: Path) -> Action:
    save_file({"head.weight": torch.zeros(3, 32).to(torch.float8_e4m3fn)}, run / ADAPTER_FILE)
    return lambda: read_adapter(run)


@attack("escapes in a tensor's name", ["does not fit"])
def _(world: World, run: Path) -> Action:
    save_file({"\x1b]0;owned\x07": torch.zeros(3)}, run / ADAPTER_FILE)
    return lambda: load_adapter(run, "random")


@attack("a sparse adapter of 1 TB", [ADAPTER_FILE, "bytes; expected at most"])
def _(world: World, run: Path) -> Action:
    os.truncate(run / ADAPTER_FILE, 1 << 40)
    return lambda: read_adapter(run)


# Configs of the reference

REFERENCE = {
    "a number": "model = dict(backbone=5)",
    "a list for a key": "model = {[1]: 2}",
    "a list": "model = [1]",
    "deep lists": "model = " + "[" * 300 + "]" * 300,
    "many signs": "model = " + "-" * 100_000 + "1",
    "many sums": "model = " + "1+" * 20_000 + "1",
    "a module that is text": "model = dict(backbone=dict(type='VimPEFTModel', module='x'))",
    "bytes of zero": "model = \0",
    "two megabytes": "#" * 2_000_000,
}
for name, text in REFERENCE.items():

    @attack(f"a reference's config is {name}", ["config.py"])
    def _(world: World, run: Path, text: str = text) -> Action:
        (world.folder / "config.py").write_text(text)
        return lambda: read_reference_config(world.folder / "config.py")


for name, text in {
    "deep": "[" * 100_000,
    "a list": "[1]",
    "of other keys": "{}",
    "of text": '{"peft_kwargs": "x"}',
}.items():

    @attack(f"a reference's JSON is {name}", ["config.json"])
    def _(world: World, run: Path, text: str = text) -> Action:
        (world.folder / "config.json").write_text(text)
        return lambda: read_reference_config(world.folder / "config.json")


# Patterns


@given(st.text("ab.*", max_size=8), st.text("ab.", max_size=8))
def test_patterns_mean_what_their_regular_expressions_meant(pattern, name):
    import re

    expression = re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"[^.]*")
    assert fits(pattern, name) == (re.fullmatch(expression, name) is not None)


# Tables


@attack("record: tables over a backbone of gigabytes, whose weights are any file", [])
def _(world: World, run: Path) -> Action:
    weights = str(run / "result.json")
    sizes = {"weights": weights, "depth": 24, "embed_dim": 2048}
    changed_json(run / "result.json", lambda c: c["config"]["backbone"].update(sizes))
    return lambda: outdated_note([Found(read_record(run), run)])
