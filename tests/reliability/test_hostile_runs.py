"""Run folders, adapters, records, checkpoints and reference configs that somebody sends to do harm.

The rows are as those of test_hostile_files.py (tests/helpers/hostile.py says what a row is); each gets a copy of one
finished run, which it changes.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import hostile, runs
from helpers.hostile import Action, Attack, World
from helpers.hub import hub_with
from helpers.run_files import result_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from mambapeft_vision.adapter.files import ADAPTER_FILE, CONFIG_FILE, read_adapter
from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.commands import explain, explore, export, interpolate, mini, reproduce
from mambapeft_vision.integrations.convert import read_reference_config
from mambapeft_vision.methods.targets import fits
from mambapeft_vision.results.record import read_record
from mambapeft_vision.results.tables import Found
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.outdated import outdated_note
from mambapeft_vision.run.rerun import store_root_config
from mambapeft_vision.run.run import train
from mambapeft_vision.utils.atomic import write_json
from mambapeft_vision.utils.errors import UserError

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
    content.pop("sha256", None)  # an attacker leaves it out
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


@attack("records of images that would be downloaded, to be done again", [])
def _(world: World, run: Path) -> Action:
    library = {"_target_": "mambapeft_vision.data.own.library.LibraryDataModule", "folder": None}
    hub = library | {"library": "hf", "source": "theirs/endless"}
    other = library | {"library": "torchvision", "source": "ImageNet", "download": True}
    record = (run / "result.json").read_text()

    def act() -> None:
        for section in (hub, other):
            (run / "result.json").write_text(record)
            changed_json(run / "result.json", lambda r, section=section: r["config"]["dataset"].update(section))
            with pytest.raises(UserError, match=f"would be downloaded.*dataset.source={section['source']}"):
                store_root_config(run, [], runs.CONFIGS)
            store_root_config(run, [f"dataset.source={section['source']}"], runs.CONFIGS)
            store_root_config(run, ["dataset=vtab/cifar"], runs.CONFIGS)

    return act


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


# Commands: several attacks share a child process


def saying(command: Callable[[Sequence[str]], object], *arguments: object) -> str:
    """What a command prints; it may not end otherwise."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert not command([str(argument) for argument in arguments])
    return said.getvalue()


def refusing(words: str, command: Callable[[Sequence[str]], object], *arguments: object) -> None:
    with pytest.raises(UserError, match=words) as caught:
        command([str(argument) for argument in arguments])
    assert len(str(caught.value)) < hostile.LONGEST_MESSAGE


NAMES = ["\x1b[2J$x^{$", "=cmd|' /C calc'!A0\u202e", "<script>alert(1)</script>" + "y" * 100_000]


@attack("explain: an image that is none, names of classes that are more, other sizes", [], seconds=15, disk_mib=30)
def _(world: World, run: Path) -> Action:
    changed_json(run / CONFIG_FILE, lambda c: c.update(class_names=NAMES))
    os.mkfifo(world.folder / "pipe.png")
    image = world.folder / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    large = shutil.copytree(run, world.folder / "large")
    changed_yaml(large / "config.yaml", lambda c: c["backbone"].update(depth=24, embed_dim=8192))
    given = f"run={run}", "--device", "cpu", "--grid", "2", "--out", world.folder / "out.png"

    def act() -> None:
        refusing("pipe", explain.main, *given, f"image={world.folder / 'pipe.png'}")
        refusing("different backbones", explain.main, f"run={large}", f"image={image}", "--device", "cpu")
        said = saying(explain.main, *given, f"image={image}")
        assert said.replace("\n", "").isprintable() and len(said) < 2_000

    return act


@attack("export: weights and seeds that a record names", [], disk_mib=30)
def _(world: World, run: Path) -> Action:
    given = "--run", run, "--to", "official", "--out", world.folder / "o.pth"
    changes: dict[str, dict[str, Any]] = {
        "do not exist": {"weights": "/dev/zero"},
        "expected a whole number": {"weights": "random", "seed": "x"},
        "expected 0 to": {"weights": "random", "seed": -5},
    }
    record = (run / "result.json").read_text()

    def act() -> None:
        for words, change in changes.items():
            (run / "result.json").write_text(record)
            changed_json(run / "result.json", lambda c, change=change: c["config"]["backbone"].update(change))
            refusing(words, export.main, *given)
        assert not (world.folder / "o.pth").exists()

    return act


@attack("explore: millions of predictions, odd settings and names", [], disk_mib=30, seconds=8)
def _(world: World, run: Path) -> Action:
    def odd(record: Any) -> None:
        record["config"]["backbone"].update(name={"a": [1]})
        record["config"]["method"]["lora_p_x"].update(_target_=[1, 2])
        record["config"].update(derived={"kind": "ensemble", "label": "</script>", "members": "\x1b"})

    many, more = (shutil.copytree(run, world.folder / name) for name in ("many", "more"))
    labels, zeros = np.arange(2_000_000, dtype=np.int32), np.zeros(50_000_000, np.int8)
    np.savez(many / "predictions.npz", predicted=np.zeros(2_000_000, np.int8), labels=labels)
    np.savez_compressed(more / "predictions.npz", predicted=zeros, labels=zeros)
    changed_json(run / "result.json", odd)
    page = world.folder / "page.html"

    def act() -> None:
        saying(explore.main, run, many, more, "--out", page)
        assert "</script>" not in page.read_text().partition("application/json")[2].partition("</script>")[0]

    return act


@attack("interpolate: names of folders, a head of a hundred million numbers", [], disk_mib=400, seconds=15, mib=600)
def _(world: World, run: Path) -> Action:
    given = "--alpha", "0.5", "--device", "cpu", "--out", world.folder / "out"
    probe = shutil.copytree(run, world.folder / "probe")
    changed_json(probe / "result.json", lambda r: r.update(trainable=0, trainable_by_method={}))
    save_file({"head.weight": torch.zeros(3, 30_000_000, dtype=torch.int8)}, probe / ADAPTER_FILE)
    changes: dict[str, dict[str, Any]] = {
        "expected a hash": {"fingerprint": "\x1b[2J"},
        "expected names in parts": {"task": "/".join("a" * 20)},
        "task='é": {"task": "é" * 100},
    }
    record = (run / "result.json").read_text()

    def act() -> None:
        refusing("no pretrained counterpart", interpolate.main, run, *given, "--probe", probe)
        for words, change in changes.items():
            (run / "result.json").write_text(record)
            changed_json(run / "result.json", lambda r, change=change: r.update(change))
            refusing(words, interpolate.main, run, *given)

    return act


@attack("reproduce: outputs with damaged results and a pipe", [], seconds=15)
def _(world: World, run: Path) -> Action:
    outputs = world.folder / "outputs"
    for name in ("deep", "pipe", "odd"):
        shutil.copytree(run, outputs / name)
        (outputs / name / "result.json").unlink()
    (outputs / "deep" / "result.json").write_text("[" * 200_000)
    os.mkfifo(outputs / "pipe" / "result.json")
    (outputs / "odd" / "result.json").write_text(json.dumps({"schema_version": "\x1b[2J"}))

    def act() -> None:
        options = "--dry-run", f"paths.outputs={outputs}", "backbone=vim_s", "method=lora_p_x", "dataset=vtab/cifar"
        said = saying(reproduce.main, *options)
        assert said.count("left out of the estimates") == 3 and said.replace("\n", "").isprintable()

    return act


@attack("mini unpack: runs that share a large config, and a link", [], seconds=10, mib=700)
def _(world: World, run: Path) -> Action:
    record = result_of(run / "result.json")
    config = record.pop("config")
    del record["seed"]
    common = record | {f"config.{name}": section for name, section in config.items()}
    bundle = {"format": 1, "schema_version": 2, "values": {}, "columns": ["seed"]}
    large = {f"k{n}": n for n in range(1_000)}
    files = {
        "configs of more than": bundle | {"common": common | {"config.x": large}, "runs": [[n] for n in range(50_000)]},
        "config has more than": bundle | {"common": common | {"config.x": ["x" * 5_000_000]}, "runs": [[0]]},
        "is a link": bundle | {"common": common, "runs": [[0]]},
    }
    for number, content in enumerate(files.values()):
        (world.folder / f"{number}.runs.json").write_text(json.dumps(content))
    (world.folder / "out").mkdir()
    (world.folder / "out" / "custom").symlink_to(world.victim.parent)

    def act() -> None:
        for number, words in enumerate(files):
            refusing(words, mini.main, "unpack", world.folder / f"{number}.runs.json", "--out", world.folder / "out")

    return act


@attack("an adapter in the hub's cache: pipes, links elsewhere, sizes", [])
def _(world: World, run: Path) -> Action:
    (snapshot := world.folder / "models--a--b" / "snapshots" / "0").mkdir(parents=True)
    blobs = world.folder / "models--a--b" / "blobs"
    shutil.copytree(run, blobs)
    world.link("models--a--b/blobs/elsewhere")

    def act() -> None:
        with pytest.MonkeyPatch.context() as patch:
            hub_with(patch, {})
            patch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
            for words, config in {"pipe": "pipe", "is a link": "elsewhere", "parameters; expected": "large"}.items():
                for name, target in (CONFIG_FILE, config), (ADAPTER_FILE, ADAPTER_FILE):
                    (snapshot / name).unlink(missing_ok=True)
                    (snapshot / name).symlink_to(f"../../blobs/{target}")
                with pytest.raises(UserError, match=words):
                    load_adapter("a/b", "random")

    os.mkfifo(blobs / "pipe")
    shutil.copy(run / CONFIG_FILE, blobs / "large")
    changed_json(blobs / "large", lambda c: c["backbone"]["architecture"].update(depth=24, embed_dim=8192))
    return act


@attack("a folder of timm's that names a backbone of gigabytes", ["parameters; expected at most"])
def _(world: World, run: Path) -> Action:
    model = timm.create_model("vim_pico_patch8_32", embed_dim=16, depth=1)
    save_for_hf(model, str(world.folder / "timm"), model_args={"embed_dim": 8192, "depth": 24}, safe_serialization=True)
    return lambda: timm.create_model(f"local-dir:{world.folder / 'timm'}", pretrained=True)


# Tables


@attack("record: tables over a backbone of gigabytes, whose weights are any file", [])
def _(world: World, run: Path) -> Action:
    weights = str(run / "result.json")
    sizes = {"weights": weights, "depth": 24, "embed_dim": 2048}
    changed_json(run / "result.json", lambda c: c["config"]["backbone"].update(sizes))
    return lambda: outdated_note([Found(read_record(run), run)])
