"""A backbone in a file outside the package, from training to prediction."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm.models._registry as timm_registry
from helpers import runs

import mambapeft_vision.backbones as package
from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.backbones import add_backbones_folder, create_backbone
from mambapeft_vision.backbones.registry import registered
from mambapeft_vision.commands import convert, methods
from mambapeft_vision.commands.predict import main as predict
from mambapeft_vision.results.record import RunRecord, read_record
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.inputs import OWN_BACKBONES, Fingerprints, Inputs, changed, own_backbone_sha256
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.errors import UserError

CODE = """
from typing import Any

from timm.models import generate_default_cfgs, register_model

from mambapeft_vision.backbones.build import build, cfg
from mambapeft_vision.backbones.{sizes} import SIZES
from mambapeft_vision.backbones.vim import Vim

default_cfgs = generate_default_cfgs({{"{name}": cfg(32, crop_mode="squash")}})


@register_model
def {name}(pretrained: bool = False, **kwargs: Any){returns}:
    return build(Vim, "{name}", pretrained, SIZES, kwargs)
"""
SIZES = 'SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2}\n'
NAME = "own_vim_patch8_32"


@pytest.fixture(autouse=True)
def only_the_packages_after(monkeypatch) -> Iterator[None]:
    registered()  # before the copies: the package's own names
    for name, value in list(vars(timm_registry).items()):
        if isinstance(value, (dict, set)) and name.startswith(("_model_", "_module_")):
            monkeypatch.setattr(timm_registry, name, copy.deepcopy(value))
    paths, modules = list(package.__path__), set(sys.modules)
    yield
    package.__path__[:] = paths
    registered.cache_clear()
    for name in set(sys.modules) - modules:
        if name.startswith("mambapeft_vision.backbones."):
            del sys.modules[name]
            delattr(package, name.rpartition(".")[2])


def write(folder: Path, file: str = "own_vim", name: str = NAME, returns: str = " -> Vim") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{file}_sizes.py").write_text(SIZES)
    (folder / f"{file}.py").write_text(CODE.format(sizes=f"{file}_sizes", name=name, returns=returns))
    return folder


def command(tmp_path: Path) -> list[str]:
    task = tmp_path / "task"
    if not task.exists():
        runs.lay_out_task(task)
    words = runs.overrides(
        task, tmp_path / "out", "trainer.max_epochs=1", "trainer.warmup_epochs=0", "paths.cache=null"
    )
    kept = [word for word in words if "backbone" not in word]
    config = tmp_path / "configs" / "backbone" / "mine.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    target = "_target_: mambapeft_vision.backbones.create_backbone"
    config.write_text(f"{target}\nname: {NAME}\nweights: random\nseed: 0\n")
    search = f"hydra.searchpath=[file://{tmp_path / 'configs'}]"
    return [search, "backbone=mine", f"paths.backbones={tmp_path / 'code'}", *kept]


def test_from_training_to_prediction(tmp_path, capsys):
    code = write(tmp_path / "code")
    (code / "other.py").write_text("")
    record = runs.run(command(tmp_path))
    assert isinstance(record, RunRecord) and record.backbone == NAME and len(record.versions[OWN_BACKBONES]) == 64
    folder = runs.only_run_folder(tmp_path / "out")
    images = sorted((tmp_path / "task" / "images" / "test").glob("*.png"))[:2]

    package.__path__[:] = package.__path__[:1]  # as in a new process
    registered.cache_clear()
    with pytest.raises(UserError, match=rf"{NAME}.*is unknown.*--backbones DIR.*add_backbones_folder"):
        load_adapter(folder, "random")
    out = tmp_path / "classes.csv"
    assert predict([f"run={folder}", *map(str, images), "--out", str(out), f"backbones={code}", "device=cpu"]) is None
    assert len(out.read_text().splitlines()) == 3
    assert load_adapter(folder, "random").backbone.pretrained_cfg["architecture"] == NAME
    evaluation = evaluate(runs.compose_root("evaluate", [f"run={folder}", "device=cpu", f"paths.backbones={code}"]))
    assert (evaluation["accuracy"], evaluation["loss"]) == (record.accuracy, record.loss)
    capsys.readouterr()
    methods.main(["lora_p_x", "lora_qv", f"backbones={code}", f"backbone={NAME}"])
    assert "1 of 2 methods fit" in capsys.readouterr().out

    (code / "other.py").write_text("unrelated = 1")
    runs.run(command(tmp_path))
    assert "was finished before" in capsys.readouterr().out
    (code / "own_vim_sizes.py").write_text(f"{SIZES}# imported by the backbone's file\n")
    plan = make_plan(runs.compose_train(command(tmp_path)))
    assert plan.fingerprint == read_record(folder).fingerprint  # the file decides as images do: by its hash
    assert changed(Fingerprints.of_record(record), Inputs().of(plan)) == "backbone files"


def test_all_files_count_where_none_has_a_function_of_the_name(tmp_path):
    plan = make_plan(runs.compose_train(command(tmp_path)))
    assert own_backbone_sha256(plan) is None  # no folder
    code = write(tmp_path / "code", name="another")
    before = own_backbone_sha256(plan)
    (code / "made_in_a_loop.py").write_text("")
    assert before is not None and own_backbone_sha256(plan) not in (None, before)


@pytest.mark.filterwarnings("ignore:Overwriting vim_small")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"name": "vim_small_patch16_224"}, r"own_bad registers vim_small_patch16_224, which the package has"),
        ({"name": "own_unsaid", "returns": ""}, r"own_bad\.own_unsaid does not say what it returns"),
    ],
)
def test_what_a_file_gets_wrong_is_said(tmp_path, content, said):
    add_backbones_folder(write(tmp_path / "code", "own_bad", **content))
    with pytest.raises(UserError, match=said):
        create_backbone(content["name"], "random")


def test_a_file_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "own_broken.py").write_text("import nothing_of_that_name")
    add_backbones_folder(tmp_path)
    with pytest.raises(UserError, match=r"own_broken\.py of paths.backbones cannot be imported: ModuleNotFoundError"):
        registered()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        add_backbones_folder(tmp_path / "none")
    with pytest.raises(UserError, match="no folder"):
        convert.main(["from-peft", "x", "--backbone", NAME, "--backbones", str(tmp_path / "none"), "--out", "y"])


def test_the_packages_file_wins(tmp_path):
    write(tmp_path / "code", "vim", name="never_seen")
    add_backbones_folder(tmp_path / "code")
    assert "never_seen" not in registered() and "vim_pico_patch8_32" in registered()
