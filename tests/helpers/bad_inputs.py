"""Everything that a user can get wrong, as a table: what is done, and words that the error must have.

Each case is (name, what the user does, words of the message: what was wrong and where, and what to do).
"""

import copy
import functools
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from helpers import runs
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import export_official
from mambapeft_vision.data.prepare.importer import import_task
from mambapeft_vision.integrations.convert import from_reference
from mambapeft_vision.integrations.export import Request, export
from mambapeft_vision.results.record import CHECKSUM
from mambapeft_vision.run.evaluate import evaluate
from mambapeft_vision.run.run import train

FIRST_IMAGE = "images/train800val200/000000.png"
TINY = {"depth": 2, "embed_dim": 32}


@dataclass(frozen=True)
class World:
    """A task and a finished run of one's own to spoil, and a folder for all else.

    task: as runs.lay_out_task makes it; run: a finished run on it, moved; folder: empty.
    """

    task: Path
    run: Path
    folder: Path

    def train(self, *overrides: str) -> None:
        if overrides:
            runs.run(runs.overrides(self.task, self.folder / "outputs", "trainer.max_epochs=1", *overrides))
            return
        config = copy.deepcopy(composed("train"))
        config.dataset.folder, config.paths.outputs = str(self.task), str(self.folder / "outputs")
        train(config)

    def evaluate(self, run: str | None = None) -> None:
        config = copy.deepcopy(composed("evaluate"))
        config.run = str(self.run) if run is None else run
        evaluate(config)

    def edit(self, file: str, change: Callable[[dict], None]) -> None:
        """Changes a JSON or YAML file of the run."""
        path = self.run / file
        if file.endswith(".json"):
            content = json.loads(path.read_text())
            content.pop(CHECKSUM, None)
            change(content)
            path.write_text(json.dumps(content))
            return
        content = OmegaConf.load(path)
        change(content)
        OmegaConf.save(content, path)

    def edit_tensors(self, change: Callable[[dict], None]) -> None:
        path = self.run / "adapter.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    def weights(self, change: Callable[[dict], dict | None], name: str = "weights.pth") -> str:
        """An official checkpoint of the run's backbone after `change`."""
        state = create_backbone("vim_pico_patch8_32", "random", **TINY).state_dict()
        state = change(state) or state
        torch.save({"model": state}, self.folder / name)
        return f"backbone.weights={self.folder / name}"


@functools.cache
def composed(root: str) -> DictConfig:
    """A config whose folders are still to be set: composing it costs more than most cases."""
    if root == "evaluate":
        return runs.compose_root(root, ["run=x", "device=cpu"])
    return runs.compose_train(runs.overrides(Path("x"), Path("x"), "trainer.max_epochs=1"))


Case = tuple[str, Callable[[World], object], list[str]]

# -- images ---------------------------------------------------------------------------------------------------


def first_image(content: bytes | Callable[[Path], object]) -> Callable[[World], None]:
    def do(world: World) -> None:
        path = world.task / FIRST_IMAGE
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        world.train()

    return do


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A png whose header promises many pixels; no data follows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
PNG, JPEG = encoded(NOISE, "png"), encoded(NOISE, "jpeg")
AT_LINE = ["train800val200.txt:1:", FIRST_IMAGE, "Lay the task out"]
IMAGES: list[Case] = [
    ("png cut short", first_image(PNG[: len(PNG) // 2]), [*AT_LINE, "truncated"]),
    ("jpeg cut short", first_image(JPEG[: len(JPEG) // 2]), [*AT_LINE, "truncated"]),
    ("png header only", first_image(PNG[:20]), AT_LINE),
    ("png with a flipped byte", first_image(PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:]), AT_LINE),
    ("empty image file", first_image(b""), [*AT_LINE, "is empty"]),
    ("text as image", first_image(b"not an image at all"), AT_LINE),
    ("html as image", first_image(b"<html><body>404</body></html>"), AT_LINE),
    ("bomb of 400 million pixels", first_image(bomb(20_000, 20_000)), [*AT_LINE, "400000000 pixels"]),
    ("bomb below Pillow's own limit", first_image(bomb(10_000, 10_000)), [*AT_LINE, "100,000,000 pixels"]),
    ("image of a format that runs programs", first_image(encoded(NOISE, "eps")), [*AT_LINE, "PNG"]),
    ("float image", first_image(encoded(NOISE.convert("L").convert("F"), "tiff")), [*AT_LINE, "F"]),
    ("image is a symlink to itself", first_image(looped), AT_LINE),
    ("image is a folder", first_image(folder_instead), AT_LINE),
    ("image is missing", first_image(Path.unlink), [*AT_LINE, "does not exist"]),
]

# -- list files and folders ------------------------------------------------------------------------------------


def list_file(content: bytes, split: str = "train800val200") -> Callable[[World], None]:
    def do(world: World) -> None:
        (world.task / f"{split}.txt").write_bytes(content)
        world.train()

    return do


def train_list(line: str) -> Callable[[World], None]:
    good = "images/train800val200/000001.png 1\n"
    return list_file(f"{good}{line}\n".encode())


def task_folder(do: Callable[[Path], object]) -> Callable[[World], None]:
    def then_train(world: World) -> None:
        do(world.task)
        world.train()

    return then_train


def a_file_instead(task: Path) -> None:
    shutil.rmtree(task)
    task.write_text("a file")


def images_loop(task: Path) -> None:
    shutil.rmtree(task / "images")
    (task / "images").symlink_to("images")


def images_are_a_file(task: Path) -> None:
    shutil.rmtree(task / "images")
    (task / "images").write_text("")


def list_is_a_folder(task: Path) -> None:
    (task / "test.txt").unlink()
    (task / "test.txt").mkdir()


def damaged_manifest(task: Path) -> None:
    (task.parent / "manifest.json").write_text('{"format": 1, "tasks": {"task": 3}}')


LINE_2 = ["train800val200.txt:2:", "Lay the task out"]
LISTS: list[Case] = [
    ("line without label", train_list("images/train800val200/000000.png"), [*LINE_2, "expected `image label`"]),
    ("label is a word", train_list("images/train800val200/000000.png cat"), [*LINE_2, "cat"]),
    ("label is a fraction", train_list("images/train800val200/000000.png 1.5"), LINE_2),
    ("label too large", train_list("images/train800val200/000000.png 3"), [*LINE_2, "label 3", "0 to 2 (3 classes)"]),
    ("label negative", train_list("images/train800val200/000000.png -1"), [*LINE_2, "label -1"]),
    ("label with many digits", train_list(f"images/train800val200/000000.png {'9' * 5000}"), LINE_2),
    ("commas", train_list("images/train800val200/000000.png,1"), LINE_2),
    ("listed twice", train_list("images/train800val200/000001.png 2"), [*LINE_2, "listed before, in line 1"]),
    ("path out of the folder", train_list("../../secret.png 1"), [*LINE_2, "not inside the task's folder"]),
    ("absolute path", train_list("/etc/passwd 1"), [*LINE_2, "not inside the task's folder"]),
    ("windows path", train_list("images\\train\\0.png 1"), [*LINE_2, "relative path with /"]),
    ("image not there", train_list("images/train800val200/missing.png 1"), [*LINE_2, "does not exist", "1 of 2"]),
    ("not utf-8", list_file(b"images/\xff\xfe.png 1\n"), ["train800val200.txt:1:", "is not UTF-8"]),
    ("utf-16", list_file("images/a.png 1\n".encode("utf-16")), ["train800val200.txt:1:", "is not UTF-8"]),
    ("binary list", list_file(bytes(range(256))), ["train800val200.txt:1:", "Lay the task out"]),
    ("empty list", list_file(b""), ["train800val200.txt", "is empty", "expected a line"]),
    ("list of blank lines", list_file(b"\n \n\n", "test"), ["test.txt", "is empty"]),
    ("folder missing", task_folder(shutil.rmtree), ["task is missing", "expected the list file", "dataset.folder"]),
    ("folder is a file", task_folder(a_file_instead), ["task is a file", "dataset.folder"]),
    ("test list missing", task_folder(lambda t: (t / "test.txt").unlink()), ["test.txt is missing", "Lay"]),
    ("list is a folder", task_folder(list_is_a_folder), ["test.txt", "is a folder"]),
    ("images missing", task_folder(lambda t: shutil.rmtree(t / "images")), ["does not exist (40 of 40 do not)"]),
    ("images folder is a symlink to itself", task_folder(images_loop), ["does not exist (40 of 40 do not)"]),
    ("images folder is a file", task_folder(images_are_a_file), ["does not exist (40 of 40 do not)"]),
    ("manifest damaged", task_folder(damaged_manifest), ["manifest.json", "Delete it"]),
    (
        "folder's name is not UTF-8",
        lambda w: w.train(f"dataset.folder='{os.fsdecode(bytes(w.folder) + b'/t%c' % 0xFF)}'"),
        ["is not UTF-8", "dataset.folder"],
    ),
]

# -- configs ---------------------------------------------------------------------------------------------------


def config(name: str, words: list[str], *overrides: str) -> Case:
    return name, lambda world: world.train(*overrides), words


def anew(*overrides: str) -> Callable[[World], None]:
    """A run whose backbone and method are in `overrides` alone."""

    def do(world: World) -> None:
        command = [text for text in runs.overrides(world.task, world.folder) if text not in runs.SMALL_BACKBONE]
        runs.run([*(text for text in command if not text.startswith("method.")), *overrides])

    return do


CONFIGS: list[Case] = [
    config("unknown key", ["sed", "did you mean seed"], "sed=1"),
    config("unknown key past Hydra", ["sed is no key", "did you mean seed"], "+sed=1"),
    config("unknown trainer key", ["max_epoch", "did you mean max_epochs"], "trainer.max_epoch=1"),
    config("unknown method argument", ["lora_p_x.rnak", "did you mean rank"], "+method.lora_p_x.rnak=3"),
    config("unknown dataset argument", ["dataset.batchsize", "batch_size"], "+dataset.batchsize=3"),
    config("unknown size of the backbone", ["dept", "did you mean depth"], "+backbone.dept=3"),
    config("unknown method", ["lora_px", "did you mean lora_p_x"], "method=lora_px"),
    config("method of several presets", ["method/lora", "did you mean", "lora_p_x"], "method=lora"),
    config("task without its group", ["dataset/cifar", "did you mean vtab/cifar"], "dataset=cifar"),
    config("other name of a key", ["trainer.lr", "did you mean learning_rate"], "trainer.lr=1"),
    config("unknown backbone", ["vim_x", "did you mean"], "backbone=vim_x"),
    config("unknown name of a backbone", ["resnet50", "known"], "backbone.name=resnet50"),
    config("unknown task", ["vtab/cifarr", "--help lists"], "dataset=vtab/cifarr"),
    config("unknown optimiser group", ["optimizer"], "optimizer=sgd"),
    config("value missing", ["dataset.folder", "give it: dataset.folder="], "dataset.folder=???"),
    config("text for a number", ["trainer.max_epochs", "abc"], "trainer.max_epochs=abc"),
    config("list for a number", ["learning_rate"], "trainer.learning_rate=[1]"),
    config("number for a folder", ["dataset.folder=5", "expected null or text"], "dataset.folder=5"),
    config("no epochs", ["max_epochs=0", "at least 1"], "trainer.max_epochs=0"),
    config("negative learning rate", ["learning_rate=-1", "at least 0"], "trainer.learning_rate=-1"),
    config("negative min_lr", ["min_lr=-1", "at least 0"], "trainer.min_lr=-1"),
    config("infinite learning rate", ["learning_rate=inf", "finite"], "trainer.learning_rate=inf"),
    config("learning rate that is no number", ["learning_rate=nan", "finite"], "trainer.learning_rate=nan"),
    config(
        "warm-up longer than training",
        ["0 to max_epochs=", "set warmup_epochs too"],
        "trainer.warmup_epochs=5",
    ),
    config("betas of one number", ["betas=[0.9]", "two numbers"], "trainer.betas=[0.9]"),
    config("clipping at 0", ["clip_norm=0", "or null"], "trainer.clip_norm=0"),
    config("no precision of that name", ["precision=int8", "one of auto"], "trainer.precision=int8"),
    config("no images in a pass", ["micro_batch=0", "at least 1"], "trainer.micro_batch=0"),
    config("no images in a batch", ["batch_size=0", "at least 1"], "dataset.batch_size=0"),
    config("negative workers", ["num_workers=-1", "at least 0"], "dataset.num_workers=-1"),
    config("one class", ["num_classes=1", "at least 2"], "dataset.num_classes=1"),
    config("too few classes", ["label 2 is out of range", "(2 classes)"], "dataset.num_classes=2"),
    config("another number of test images", ["lists 20 images", "expected 30"], "dataset.num_test=30"),
    config("classes that the task does not have", ["num_classes=3", "100"], "dataset.name=vtab/cifar"),
    config("unknown split", ["train1000.txt is missing"], "dataset.train_split=train1000"),
    config("split out of the folder", ["train_split", ".."], "dataset.train_split=../x"),
    config("unknown group", ["dataset.group='pets'", "natural"], "dataset.group=pets"),
    config("name out of the outputs", ["dataset.name='../x'", "expected letters"], "dataset.name=../x"),
    config("seed as text", ["seed", "one"], "seed=one"),
    config("seed beyond 64 bits", ["backbone", "seed"], f"backbone.seed={2**70}"),
    ("no method", anew(*runs.SMALL_BACKBONE, "method=[]"), ["names no method", "method=linear_probe"]),
    config("rank 0", ["lora_p_x", "rank=0", ">= 1"], "method.lora_p_x.rank=0"),
    config("negative rank", ["lora_p_x", "rank=-4", ">= 1"], "method.lora_p_x.rank=-4"),
    config("dropout 1", ["lora_p_x", "dropout=1", "< 1"], "method.lora_p_x.dropout=1"),
    config("scale null", ["lora_p_x.scale=None", "a number"], "method.lora_p_x.scale=null"),
    config("unknown rows", ["rows='y'", "x, z"], "method.lora_p_x.rows=y"),
    config("targets that match nothing", ["in_prj", "nearest"], "method.lora_p_x.targets=layers.*.mixer.in_prj.weight"),
    config(
        "targets of a vector",
        ["layers.0.mixer.D is a vector"],
        "method.lora_p_x.targets=layers.*.mixer.D",
        "method.lora_p_x.rows=null",
    ),
    config("method on the wrong backbone", ["lora_qv", "Vim has no 'qkv'", "its roles:"], "method=[lora_p_x,lora_qv]"),
    config(
        "two owners of a port",
        ["both 'affix'", "'affix_wo_proj'", "remove one"],
        "method=[lora_p_x,affix,affix_wo_proj]",
    ),
    config("two owners of a tensor", ["both 'bitfit' and 'full'", "remove one"], "method=[lora_p_x,bitfit,full]"),
    config("method is no mapping", ["method.lora_p_x"], "method.lora_p_x=5"),
    config("code for a method", ["os.system", "mambapeft_vision.methods"], "method.lora_p_x._target_=os.system"),
    config("code for a data set", ["subprocess.run", "mambapeft_vision"], "dataset._target_=subprocess.run"),
    config(
        "a function that is no data set",
        ["dataset._target_"],
        "dataset._target_=mambapeft_vision.utils.atomic.write_json",
    ),
    config("unknown sizes", ["method_sizes", "of_vim_s"], "method_sizes=large"),
    config("unknown kernel", ["kernel", "turbo", "known"], "kernel=turbo"),
    config("kernel of a GPU on the CPU", ["kernel", "triton"], "kernel=triton"),
    config("unknown device", ["device='tpu'", "expected auto"], "trainer.device=tpu"),
    config("GPU that is not there", ["cuda:63", "GPUs; choose"], "trainer.device=cuda:63"),
    config("no devices", ["devices=0", "at least 1"], "trainer.devices=0"),
    ("heads that do not divide", anew(*runs.SMALL_VIT, "+backbone.num_heads=5"), ["num_heads=5", "change one of"]),
    config("depth 0", ["depth=0", "1 to"], "backbone.depth=0"),
    config("negative width", ["embed_dim=-32", "1 to"], "backbone.embed_dim=-32"),
    config("patches larger than the image", ["patch_size=64", "32"], "+backbone.patch_size=64"),
    config("folder of methods missing", ["paths.methods", "no folder"], "paths.methods=nowhere"),
    (
        "outputs folder is a file",
        lambda w: ((w.folder / "outputs").write_text(""), w.train()),
        ["outputs", "paths.outputs"],
    ),
]

# -- weights of backbones ------------------------------------------------------------------------------------------


def weights(name: str, words: list[str], change: Callable[[dict], dict | None]) -> Case:
    return name, lambda w: w.train(w.weights(change)), ["weights.pth", *words]


def weights_file(name: str, words: list[str], content: bytes, file: str = "weights.pth") -> Case:
    def do(world: World) -> None:
        (world.folder / file).write_bytes(content)
        world.train(f"backbone.weights={world.folder / file}")

    return name, do, [file, *words]


def safetensors_cut_short(world: World) -> None:
    export_official(create_backbone("vim_pico_patch8_32", "random", **TINY), world.folder / "w.safetensors")
    content = (world.folder / "w.safetensors").read_bytes()
    (world.folder / "w.safetensors").write_bytes(content[:-100])
    world.train(f"backbone.weights={world.folder / 'w.safetensors'}")


def pth_cut_short(world: World) -> None:
    override = world.weights(lambda state: None)
    content = (world.folder / "weights.pth").read_bytes()
    (world.folder / "weights.pth").write_bytes(content[: len(content) // 2])
    world.train(override)


def not_finite(state: dict) -> None:
    state["norm_f.weight"][3] = float("nan")


WEIGHTS: list[Case] = [
    config("weights missing", ["nowhere.pth", "do not exist", "give a .pth"], "backbone.weights=nowhere.pth"),
    ("weights are a folder", lambda w: w.train(f"backbone.weights={w.folder}"), ["do not exist", "give a .pth"]),
    weights(
        "weights without a key",
        ["missing: norm_f.weight"],
        lambda s: {k: v for k, v in s.items() if k != "norm_f.weight"},
    ),
    weights("weights with another key", ["unknown: extra"], lambda s: {**s, "extra": torch.zeros(2)}),
    weights(
        "weights of another shape",
        ["shape of norm_f.weight: (5,), expected (32,)"],
        lambda s: {**s, "norm_f.weight": torch.zeros(5)},
    ),
    weights(
        "weights of whole numbers",
        ["norm_f.weight", "int64"],
        lambda s: {**s, "norm_f.weight": torch.ones(32, dtype=torch.int64)},
    ),
    weights("weights that are not finite", ["norm_f.weight", "NaN or infinity"], not_finite),
    weights("weights that are no tensors", ["no state dict"], lambda s: {**s, "norm_f.weight": [1.0, 2.0]}),
    (
        "weights with another hash",
        lambda w: w.train(w.weights(lambda state: None), f"+backbone.weights_sha256={'0' * 64}"),
        ["weights.pth has sha256", "backbone.weights_sha256", "Get the file again"],
    ),
    weights_file("weights that are text", ["cannot be read"], b"hello"),
    weights_file("weights of no bytes", ["cannot be read"], b""),
    weights_file("safetensors that are text", ["cannot be read"], b"hello hello hello", "w.safetensors"),
    ("safetensors cut short", safetensors_cut_short, ["w.safetensors", "cannot be read", "download it again"]),
    ("pth cut short", pth_cut_short, ["weights.pth", "cannot be read", "download it again"]),
    config(
        "official weights that are not published",
        ["no published weights", "backbone.weights="],
        "backbone.weights=official",
    ),
]

# -- finished runs and adapters --------------------------------------------------------------------------------------


def adapter_config(name: str, words: list[str], change: Callable[[dict], object]) -> Case:
    def do(world: World) -> None:
        world.edit("adapter_config.json", change)
        world.evaluate()

    return name, do, ["adapter_config.json" if "adapter_config.json" in words else "run", *words]


def adapter_tensors(name: str, words: list[str], change: Callable[[dict], object]) -> Case:
    def do(world: World) -> None:
        world.edit_tensors(change)
        world.evaluate()

    return name, do, ["adapter.safetensors", *words]


def run_file(name: str, file: str, words: list[str], content: bytes | None) -> Case:
    def do(world: World) -> None:
        (world.run / file).unlink() if content is None else (world.run / file).write_bytes(content)
        world.evaluate()

    return name, do, [file, *words]


def cut_short(world: World) -> None:
    path = world.run / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    world.evaluate()


DOWN = "lora_p_x.layers.0.mixer.in_proj.weight.down"


def set_in(*path: str, value: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


LORA = ("methods", "lora_p_x")
RUNS: list[Case] = [
    (
        "run that is not there",
        lambda w: w.evaluate("/nowhere"),
        ["/nowhere", "expected the folder of a finished run"],
    ),
    run_file("run without result", "result.json", ["expected the folder of a finished run"], None),
    run_file("run without config", "config.yaml", ["expected the folder of a finished run"], None),
    run_file("run without adapter config", "adapter_config.json", ["does not exist", "expected the folder"], None),
    run_file("run without adapter", "adapter.safetensors", ["cannot be read", "copy it again"], None),
    run_file("damaged result", "result.json", ["no valid JSON"], b"{"),
    run_file("result of nothing", "result.json", ["schema"], b"[]"),
    run_file("config that is no yaml", "config.yaml", ["config.yaml", "no valid YAML"], b"a: [\n"),
    run_file(
        "config that runs code",
        "config.yaml",
        ["config.yaml", "has the tag"],
        b"seed: !!python/object/apply:os.getcwd []\n",
    ),
    run_file("config that looks up", "config.yaml", ["config.yaml", "is a reference"], b"seed: ${oc.env:HOME}\n"),
    run_file("config that is text", "config.yaml", ["no config of a run"], b"hello\n"),
    run_file("config that is not utf-8", "config.yaml", ["config.yaml", "not UTF-8"], b"seed: \xff\xfe\n"),
    run_file("adapter config that is no JSON", "adapter_config.json", ["no valid JSON"], b"{"),
    run_file("adapter config nested too deep", "adapter_config.json", ["nested too deeply"], b"[" * 100_000),
    run_file("adapter that is text", "adapter.safetensors", ["cannot be read", "copy it again"], b"hello hello hello"),
    run_file("adapter of no bytes", "adapter.safetensors", ["cannot be read", "copy it again"], b""),
    ("adapter cut short", cut_short, ["adapter.safetensors", "cannot be read", "copy it again"]),
    adapter_config(
        "format of the future",
        ["adapter_config.json", "format_version 99", "Update"],
        set_in("format_version", value=99),
    ),
    adapter_config(
        "adapter of another backbone", ["sha256", "backbone.weights"], set_in("backbone", "sha256", value="0" * 64)
    ),
    adapter_config("adapter config without methods", ["adapter_config.json", "methods"], lambda c: c.pop("methods")),
    adapter_config(
        "adapter config without classes", ["adapter_config.json", "num_classes"], lambda c: c.pop("num_classes")
    ),
    adapter_config("classes as text", ["adapter_config.json", "num_classes"], set_in("num_classes", value="3")),
    adapter_config("other classes", ["head.weight", "(7, 32)", "(3, 32)"], set_in("num_classes", value=7)),
    adapter_config("adapter of another task", ["custom/other", "custom/tiny"], set_in("task", value="custom/other")),
    adapter_config("method that is no mapping", ["lora_p_x"], set_in("methods", "lora_p_x", value=3)),
    adapter_config(
        "method that is code", ["os.system", "mambapeft_vision.methods"], set_in(*LORA, "_target_", value="os.system")
    ),
    adapter_config(
        "method that is not there",
        ["Lora", "does not exist"],
        set_in(*LORA, "_target_", value="mambapeft_vision.methods.lora.Lora"),
    ),
    adapter_config(
        "method that is no Method",
        ["no Method"],
        set_in(*LORA, "_target_", value="mambapeft_vision.methods.lora.LowRank"),
    ),
    adapter_config("method with another argument", ["lora_p_x", "alpha"], set_in(*LORA, "alpha", value=3)),
    adapter_config(
        "method with an argument of another type", ["lora_p_x", "scale"], set_in(*LORA, "scale", value={"a": 1})
    ),
    adapter_config("rank of another adapter", ["shape of", "down"], set_in(*LORA, "rank", value=5)),
    adapter_config("rank that fills the memory", ["shape of", "down"], set_in(*LORA, "rank", value=10**9)),
    adapter_config(
        "scale that is no number", ["adapter_config.json", "NaN"], set_in(*LORA, "scale", value=float("nan"))
    ),
    adapter_tensors("adapter without a tensor", ["missing", DOWN], lambda s: s.pop(DOWN)),
    adapter_tensors("adapter with another tensor", ["unknown", "extra"], set_in("extra", value=torch.zeros(3))),
    adapter_tensors("adapter of another shape", ["shape of", DOWN], set_in(DOWN, value=torch.zeros(3, 3))),
    adapter_tensors("adapter of whole numbers", [DOWN, "int64"], lambda s: s.update({DOWN: s[DOWN].long()})),
    adapter_tensors("adapter that is not finite", [DOWN, "NaN or infinity"], lambda s: s[DOWN].fill_(float("inf"))),
]

# -- other ways in -------------------------------------------------------------------------------------------------


def npz(name: str, words: list[str], **changes: object) -> Case:
    """An npz file of two images to import, with other arrays."""

    def do(world: World) -> None:
        arrays = {
            "blob": np.frombuffer(PNG + PNG, dtype=np.uint8),
            "offsets": np.array([0, len(PNG), 2 * len(PNG)]),
            "labels": np.array([0, 1]),
            "class_names": np.array(["a", "b"]),
        }
        np.savez(world.folder / "images.npz", **{**arrays, **changes})
        import_task(world.folder / "images.npz", "imported", world.folder)

    return name, do, ["images.npz", *words]


def import_text(world: World) -> None:
    (world.folder / "images.npz").write_text("text")
    import_task(world.folder / "images.npz", "imported", world.folder)


def class_folders(*names: str) -> Callable[[World], None]:
    def do(world: World) -> None:
        for name in names:
            (world.folder / "tree" / name).mkdir(parents=True)
        import_task(world.folder / "tree", "imported", world.folder)

    return do


def reference_config(text: str) -> Callable[[World], None]:
    def do(world: World) -> None:
        (world.folder / "config.py").write_text(text)
        world.weights(lambda state: None)
        weights = world.folder / "weights.pth"
        from_reference(world.folder / "config.py", weights, weights, world.folder / "out")

    return do


TOOLS: list[Case] = [
    npz("npz without labels", ["labels are"], labels=np.array([])),
    npz(
        "npz with pickled objects", ["cannot be read", "plain arrays"], class_names=np.array(["a", None], dtype=object)
    ),
    npz("npz with offsets that fall", ["offsets do not rise"], offsets=np.array([5, 1, 9])),
    npz("npz with labels out of range", ["labels run from 0 to 9", "expected 0 to 1"], labels=np.array([0, 9])),
    npz("npz with too few images", ["2 images to train on", "expected 1,000"]),
    ("npz that is text", import_text, ["images.npz", "cannot be read"]),
    ("tree with one class", class_folders("a"), ["tree has 1 sub-folders", "at least two"]),
    ("tree without images", class_folders("a", "b"), ["has no image in", "expected files ending in"]),
    ("import of nothing", lambda w: import_task(w.folder / "no", "x", w.folder), ["is missing", "Correct"]),
    (
        "reference config with code",
        reference_config("model = dict(backbone=open('x'))"),
        ["config.py:1", "only literals"],
    ),
    (
        "reference config with an error",
        reference_config("model = ("),
        ["config.py", "SyntaxError", "expected `model"],
    ),
    ("reference config of something else", reference_config("x = 1"), ["config.py", "expected `model ="]),
    (
        "merge of what is no adapter",
        lambda w: export(Request(w.folder, "x.pth", "random"), "official"),
        ["does not exist", "expected"],
    ),
    ("merge with other weights", lambda w: load_adapter(w.run, "random", seed=5), ["sha256", "backbone.weights"]),
]

CASES = [*IMAGES, *LISTS, *CONFIGS, *WEIGHTS, *RUNS, *TOOLS]
