"""Files of others are data: nothing in them is run, and they cannot name what is called."""

import ast
import hashlib
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import runs
from helpers.hub import hub_with
from omegaconf import OmegaConf
from safetensors.torch import save_file

import mambapeft_vision.integrations.convert as convert
from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import build_methods, load_adapter
from mambapeft_vision.adapter.model import adapt
from mambapeft_vision.adapter.presets import read_preset
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import read_state_dict
from mambapeft_vision.data.prepare.archive import MAX_MEMBERS, extract_tasks, safe_path
from mambapeft_vision.data.prepare.importer import read_npz
from mambapeft_vision.data.tasks import Task
from mambapeft_vision.engine.checkpoint import AtomicCheckpointIO
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.run.build import build
from mambapeft_vision.utils.errors import UserError

ROOT = runs.ROOT
TINY = {"depth": 1, "embed_dim": 16}


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that only exists when something was run."""
    return tmp_path / "was_run"


def tiny():
    return create_backbone("vim_pico_patch8_32", "random", **TINY)


def write_adapter(folder: Path) -> Path:
    model = adapt(tiny(), {"lora": LoRA(targets="layers.*.mixer.in_proj.weight", rank=2)}, 3)
    model.save(folder, {"task": "test"})
    return folder


# Pickles


def zipped_pickle(path: Path, content: object) -> None:
    torch.save({"model": content, "state_dict": content}, path)


def bare_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [zipped_pickle, bare_pickle])
@pytest.mark.parametrize(
    "read",
    [
        read_state_dict,
        lambda path: create_backbone("vim_pico_patch8_32", str(path), **TINY),
        lambda path: AtomicCheckpointIO().load_checkpoint(path),
        lambda path: AtomicCheckpointIO().load_checkpoint(path, weights_only=False),
        lambda path: convert.from_reference(reference_config(path.parent), path, path, path.parent / "out"),
        lambda path: read_npz(path),
        lambda path: read_state_dict(shutil.copy(path, path.with_suffix(".safetensors"))),
    ],
    ids=["weights", "backbone", "checkpoint", "checkpoint not weights_only", "reference", "npz", "safetensors"],
)
def test_no_pickle_is_run(tmp_path, mark, write, read):
    path = tmp_path / "malice.pth"
    write(path, Malice(mark))
    with pytest.raises(UserError, match="malice"):
        read(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malice(mark)))  # what would have happened
    assert mark.exists()


def reference_config(folder: Path) -> Path:
    (folder / "config.py").write_text("model = dict(backbone=dict(type='VisionMamba'))\n")
    return folder / "config.py"


def test_no_array_of_objects_is_unpickled(tmp_path, mark):
    np.savez(tmp_path / "images.npz", blob=np.array([Malice(mark)], dtype=object))
    with pytest.raises(UserError, match="plain arrays"):
        read_npz(tmp_path / "images.npz")
    assert not mark.exists()


def test_an_adapters_tensors_are_no_pickle(tmp_path, mark):
    folder = write_adapter(tmp_path / "adapter")
    zipped_pickle(folder / "adapter.safetensors", Malice(mark))
    with pytest.raises(UserError, match=r"adapter\.safetensors cannot be read"):
        read_adapter(folder)
    assert not mark.exists()


# Names of code


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "mambapeft_vision.utils.atomic.write_text",
        "mambapeft_vision.methods.add_methods_folder",
        "mambapeft_vision.methods.lora.torch",
        "mambapeft_vision.methods.lora.torch.load",
        "mambapeft_vision.methods.lora.UserError",
        "mambapeft_vision.methods.lora.LowRank",
        "mambapeft_vision.methods.lora.LoRA.__init__",
        "mambapeft_vision.methods.lora.LoRA.attach",
        "mambapeft_vision.methods.lora.Method",
        "mambapeft_vision.methods.method.Method",
        "mambapeft_vision.methods.method.WeightPort",
        "mambapeft_vision.methods.lora.__builtins__",
        "mambapeft_vision.methods.__path__.Append",
        "mambapeft_vision.methods.__init__.Path",
        "mambapeft_vision.methods...os.System",
        "mambapeft_vision.methods.lora.LoRA\n",
        " mambapeft_vision.methods.lora.LoRA",
        "mambapeft_vision/methods/lora.LoRA",
        "mambapeft_vision.methods.ℓora.LoRA",
        "",
        None,
        3,
        ["mambapeft_vision.methods.lora.LoRA"],
        {"_target_": "mambapeft_vision.methods.lora.LoRA"},
    ],
)
def test_an_adapter_names_methods_alone(tmp_path, target):
    folder = write_adapter(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["methods"]["lora"]["_target_"] = target
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter_config\.json: methods\.lora"):
        build_methods(read_adapter(folder))


@pytest.mark.parametrize("key", ["targets", "rank", "scale", "rows", "space", "dropout", "lr_mult"])
def test_arguments_are_values_and_never_built(key, mark):
    nested = {"_target_": "pathlib.Path.touch", "_args_": [str(mark)], "_partial_": False}
    spec = {"_target_": "mambapeft_vision.methods.lora.LoRA", "targets": "layers.**", "rank": 2}
    for value in (nested, [nested], {"a": nested}):
        with pytest.raises(UserError, match=rf"test\.lora\.{key}="):
            build_method("lora", {**spec, key: value}, "test")
    assert not mark.exists()


@pytest.mark.parametrize(
    "key", ["forward", "__class__", "__dict__", "_backward_hooks", "training", "name", "self", "cls"]
)
def test_attributes_are_no_arguments(key):
    spec = {"_target_": "mambapeft_vision.methods.lora.LoRA", "targets": "layers.**", "rank": 2}
    with pytest.raises(UserError, match="is no key of LoRA"):
        build_method("lora", {**spec, key: 1}, "test")


@pytest.mark.parametrize("name", ["", "a.b", "__init__", "a/b", "../x", "methods\n", "1"])
def test_names_of_methods_are_plain_words(name):
    with pytest.raises(UserError, match="expected letters, digits and underscores"):
        adapt(tiny(), {name: LoRA(targets="layers.*.mixer.in_proj.weight", rank=2)}, 3)


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("dataset", "mambapeft_vision.utils.atomic.write_text"),
        ("dataset", "mambapeft_vision.data.ImageSet"),
        ("backbone", "mambapeft_vision.run.build.importlib.import_module"),
        ("backbone", "mambapeft_vision.run.run.train"),
        ("backbone", "mambapeft_vision.__init__"),
        ("logger", "mambapeft_vision.utils.lock.locked"),
        ("logger", "mambapeft_vision.integrations.wandb_logger.Path"),
        ("dataset", "shutil.rmtree"),
    ],
)
def test_a_config_calls_only_what_its_section_is_for(group, target, tmp_path):
    with pytest.raises(UserError, match=rf"{group}\._target_="):
        build(group, {"_target_": target, "path": str(tmp_path), "text": "x"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint_path", "malice.pth"),
        ("pretrained", True),
        ("pretrained_cfg", {"url": "https://x"}),
        ("features_only", True),
    ],
)
def test_an_adapters_architecture_is_sizes_alone(tmp_path, key, value):
    """timm has arguments that read files and fetch weights."""
    folder = write_adapter(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["backbone"]["architecture"][key] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"backbone\.{key} is no key of Vim"):
        load_adapter(folder, "random")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("backbone", "architecture", "embed_dim"), 10**9, "embed_dim"),
        (("backbone", "architecture", "depth"), 10**9, "depth"),
        (("methods", "lora", "rank"), 10**15, "rank"),
        (("num_classes",), 10**15, "head.weight"),
    ],
)
def test_an_adapters_sizes_cost_nothing_before_they_are_known_to_fit(tmp_path, path, value, message):
    folder = write_adapter(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_adapter(folder, "random")


# YAML


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:pathlib.Path.touch ['{mark}']",
        "seed: !!python/name:os.system ''",
        "seed: !!python/module:os ''",
    ],
)
def test_yaml_is_not_evaluated(tmp_path, mark, text):
    preset = "# What\n# y = x\n# count: 1\n# paper: 1\n# run: x\n" + text.format(mark=mark)
    (tmp_path / "preset.yaml").write_text(preset)
    with pytest.raises(Exception) as error:  # a preset is the project's own: PyYAML's error will do
        read_preset(tmp_path / "preset.yaml")
    assert "could not determine a constructor" in str(error.value)
    (tmp_path / "config.yaml").write_text(text.format(mark=mark))
    with pytest.raises(Exception, match="could not determine a constructor"):
        OmegaConf.load(tmp_path / "config.yaml")
    assert not mark.exists()


# Archives


def test_an_archive_of_too_many_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mambapeft_vision.data.prepare.archive.MAX_MEMBERS", 3)
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"toy/{number}", b"")
    with pytest.raises(UserError, match="4 members; expected at most 3"):
        extract_tasks(tmp_path / "many.zip", tmp_path / "root", [Task("toy", "natural", 3, 4)])
    assert not (tmp_path / "root").exists()
    assert MAX_MEMBERS > 500_000  # VTAB-1K has some 430,000


@pytest.mark.parametrize("names", [("toy/a", "toy/a/b"), ("toy/" + "n" * 300,)], ids=["file as folder", "long name"])
def test_members_that_no_disk_can_hold_are_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name in ("toy/test.txt", *names):
            archive.writestr(name, b"x")
    with pytest.raises(UserError, match=r"Refused to extract|odd\.zip"):
        extract_tasks(tmp_path / "odd.zip", tmp_path / "root", [Task("toy", "natural", 3, 4)])
    assert not (tmp_path / "root" / "toy").exists()


def test_a_member_without_a_name_is_refused():
    with pytest.raises(UserError, match="it has no name"):
        safe_path(zipfile.ZipInfo(""))


def test_an_npz_that_promises_more_than_it_may_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", blob=np.zeros(10_000_000, np.uint8))
    monkeypatch.setattr("mambapeft_vision.data.prepare.importer.MAX_BYTES", 1_000_000)
    with pytest.raises(UserError, match="unpacks to 10,000,128 bytes"):
        read_npz(tmp_path / "bomb.npz")


# The source itself

FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "shutil.unpack_archive",
    "subprocess.getoutput",
    "hydra.utils.instantiate",
    "instantiate",
}
PLACES = ("mambapeft_vision", "kernels", "scripts")
SOURCES = [
    *sorted(file for place in PLACES for file in (ROOT / place).rglob("*.py")),
    *(ROOT / name for name in ("train.py", "evaluate.py")),
]


def calls(file: Path):
    """(dotted name of what is called, the call) of every call with a plain name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def unsafe(name: str, call: ast.Call) -> bool:
    if name.startswith("subprocess."):
        command = call.args[0] if call.args else None
        return keyword(call, "shell") is not None or isinstance(command, (ast.JoinedStr, ast.Constant))
    if name == "torch.load":
        return keyword(call, "weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return keyword(call, "allow_pickle") not in (None, "False")
    return name in FORBIDDEN or name.endswith(".extractall")


@pytest.mark.parametrize("source", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_evaluates_text_or_starts_a_shell(source):
    assert not [f"{source}:{call.lineno}: {name}" for name, call in calls(source) if unsafe(name, call)]


@pytest.mark.parametrize(
    "text",
    [
        "eval(x)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(f'ls {x}')",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
        "archive.extractall(x)",
    ],
)
def test_that_check_finds_each(tmp_path, text):
    (tmp_path / "file.py").write_text(text)
    assert [unsafe(name, call) for name, call in calls(tmp_path / "file.py")] == [True]


# What is fetched


def test_weights_can_be_pinned(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in tiny().state_dict().items() if not k.startswith("head.")}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    create_backbone("vim_pico_patch8_32", str(path), weights_sha256=digest.upper(), **TINY)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"has sha256 [0-9a-f]{{64}}; expected {digest}"):
        create_backbone("vim_pico_patch8_32", str(path), weights_sha256=digest, **TINY)


def test_official_weights_can_be_pinned_before_they_are_read(tmp_path, monkeypatch, mark):
    bare_pickle(tmp_path / "official.pth", Malice(mark))
    hub_with(monkeypatch, {}, lambda *args, **kwargs: str(tmp_path / "official.pth"))
    with pytest.raises(UserError, match="backbone.weights_sha256"):
        create_backbone("vim_tiny_patch16_224", "official", weights_sha256="0" * 64, depth=1)
    assert not mark.exists()
