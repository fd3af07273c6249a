"""mambapeft export: whatever is written computes the same logits as the model."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import runs
from helpers.fake_records import fake_record
from helpers.file_size import size_limit
from helpers.hub import hub_with
from helpers.method_cases import CLASSES, methods_of, move, specs
from helpers.stand_ins import no_extension_of_peft
from safetensors.torch import save_file
from torch import Tensor

from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import load_weights
from mambapeft_vision.commands import convert
from mambapeft_vision.commands import export as command
from mambapeft_vision.integrations import program, timm_folder
from mambapeft_vision.integrations.convert import convert_from_peft
from mambapeft_vision.integrations.export import FORMATS, Request, Source, export, notes_of
from mambapeft_vision.integrations.from_peft import from_peft
from mambapeft_vision.integrations.hub import to_hub_folder
from mambapeft_vision.integrations.low_rank import to_lora
from mambapeft_vision.integrations.peft_forms import FORMS
from mambapeft_vision.methods.dora import DoRA
from mambapeft_vision.results.record import write_record
from mambapeft_vision.utils.errors import UserError

SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 32}
BACKBONES: dict[str, dict[str, Any]] = {
    "vim_pico_patch8_32": SMALL,
    "mambareg_pico_patch8_32": SMALL,
    "videomamba_tiny_patch16_224": {**SMALL, "img_size": 32, "patch_size": 8},
    "arm_pico_patch8_32": SMALL,
    "vmamba_pico_patch4_32": {"dims": 16, "depths": (1, 1)},
    "ported_vit_pico_patch8_32": {**SMALL, "num_heads": 2},
}
VIM = "vim_pico_patch8_32"
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def backbone(name: str = VIM) -> Any:
    return create_backbone(name, "random", **BACKBONES[name])


def saved(folder: Path, *presets: str, name: str = VIM) -> Path:
    """An adapter whose tensors are away from their start."""
    move(adapt(backbone(name), methods_of(specs(presets)), CLASSES, 3)).save(folder, {"task": "tiny"})
    return folder


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_adapter(folder, "random")(IMAGES)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-5)


def run(folder: Path, to: str, out: Path, **options: Any) -> str:
    return "\n".join(export(Request(folder, out, "random", **options), to))


def preset_for(name: str) -> str:
    return "lora_qv" if "vit" in name else "lora_out_proj"


# -- programs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the exporter takes seconds
def test_programs_hold_methods_that_stay_attached_and_take_any_batch(tmp_path):
    """One scan operator for each block, and no loop over tokens written out."""
    folder = saved(tmp_path / "run", "prompt", "parallel_adapter", "affix", "lora_out_proj")
    said = run(folder, "torch-export", tmp_path / "model.pt2")
    assert "affix, parallel_adapter, prompt stay operations of their own" in said
    program = torch.export.load(tmp_path / "model.pt2")
    operators = [str(node.target) for node in program.graph.nodes]
    assert operators.count("scan") == BACKBONES[VIM]["depth"] and len(operators) < 500
    expected = logits(folder)
    for batch in (1, 3):
        close(program.module()(IMAGES[:batch]), expected[:batch])


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_program_that_computes_something_else_is_not_written(tmp_path, monkeypatch, factor):
    folder = saved(tmp_path / "run", "lora_out_proj")
    monkeypatch.setattr("mambapeft_vision.integrations.program.trace", lambda model: Scaled(model, factor))
    with pytest.raises(UserError, match="computes other logits than the model"):
        run(folder, "torch-export", tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists()


class Scaled:
    """In the place of a program: the model's logits times a factor."""

    def __init__(self, model: AdaptedModel, factor: float) -> None:
        self.model, self.factor = model, factor

    def module(self) -> Callable[[Tensor], Tensor]:
        return lambda images: self.factor * self.model(images)


@pytest.mark.parametrize(
    ("channels", "mean"), [(1, [0.449]), (3, [0.485, 0.456, 0.406]), (4, [0.485, 0.456, 0.406, 0.485])]
)
def test_cards_and_notes_know_the_channels(tmp_path, channels, mean):
    """Grey and images of more channels, whose statistics are not those of timm's record."""
    small = create_backbone(VIM, "random", in_chans=channels, **SMALL)
    model = move(adapt(small, methods_of(specs(("lora_out_proj",))), CLASSES, 3))
    model.save(tmp_path / "run", {"task": "tiny"})
    result = fake_record("custom/tiny", "lora_out_proj", 0, 0.5, backbone={"weights": "random", "seed": 0})
    to_hub_folder(tmp_path / "run", tmp_path / "hub", result, repository=str(tmp_path / "hub"))
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "hub" / "README.md").read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert found["images"].shape == (1, channels, 32, 32) and found["logits"].shape == (1, CLASSES)
    assert found["mean"].flatten().tolist() == pytest.approx(mean)
    source = Source(Request(tmp_path / "run", tmp_path / "x", "random"))
    assert json.loads(notes_of(source, model)["mean"]) == pytest.approx(mean)


@pytest.mark.slow  # the exporters take six seconds for each
@pytest.mark.parametrize(
    "name",
    [
        # Maps; sequences are below; what the others have of their own, timm's and torch's exports go through.
        pytest.param(name, marks=[] if name == "vmamba_pico_patch4_32" else [pytest.mark.exhaustive])
        for name in BACKBONES
        if name != VIM
    ],
)
def test_onnx_of_every_backbone_takes_any_batch(tmp_path, name):
    folder = saved(tmp_path / "run", preset_for(name), name=name)
    run(folder, "onnx", tmp_path / "model.onnx")
    notes = check_onnx(tmp_path / "model.onnx", folder)
    assert notes["task"] == "tiny" and notes["input_size"] == "[3, 32, 32]" and notes["mean"].startswith("[0.485")


def check_onnx(file: Path, folder: Path) -> dict[str, str]:
    """Asserts that a program computes what the adapter in `folder` does, for several batches. Returns its notes."""
    import onnxruntime as runtime

    session = runtime.InferenceSession(file)
    for batch in (1, 3):
        (found,) = session.run(["logits"], {"images": IMAGES[:batch].numpy()})
        close(torch.from_numpy(np.asarray(found)), logits(folder)[:batch])
    return session.get_modelmeta().custom_metadata_map


@pytest.mark.slow
def test_int8_is_smaller_and_its_accuracy_is_measured_on_the_runs_own_images(tmp_path, monkeypatch):
    """Of a method that is merged and one that stays attached."""
    monkeypatch.chdir(tmp_path)
    task = runs.lay_out_task(tmp_path / "task")
    record = runs.run(runs.overrides(task, tmp_path / "outputs", "trainer.max_epochs=2", "method=[lora_p_x,svp]"))
    folder = runs.only_run_folder(tmp_path / "outputs")
    said = export(Request(folder, tmp_path / "model.onnx", int8=True), "onnx")
    assert check_onnx(tmp_path / "model.onnx", folder)["task"] == "custom/tiny"
    sizes = [(tmp_path / name).stat().st_size for name in ("model.int8.onnx", "model.onnx")]
    assert sizes[0] < 0.9 * sizes[1]
    assert f"accuracy on {runs.TEST_IMAGES} test images" in said[2] and f"{record.accuracy:.2%} in float32" in said[2]
    shutil.rmtree(task)
    with pytest.raises(UserError, match=re.escape(str(task))):  # so the command says that it was not measured
        Source(Request(folder, tmp_path / "other.onnx")).test_images()


# -- plain checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_merged_models_load_in_timm_and_from_official_keys(tmp_path, name):
    folder = saved(tmp_path / "run", preset_for(name), name=name)
    expected = logits(folder)
    run(folder, "timm", tmp_path / "timm")
    with torch.no_grad():
        close(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(IMAGES), expected)
    run(folder, "official", tmp_path / "model.pth")
    plain = backbone(name)
    plain.reset_classifier(CLASSES)
    load_weights(plain, tmp_path / "model.pth", with_head=True)
    with torch.no_grad():
        close(plain.eval()(IMAGES), expected)


def test_a_timm_folder_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    folder = saved(tmp_path / "run", "lora_out_proj")
    other = backbone()
    other.reset_classifier(CLASSES)
    monkeypatch.setattr(timm_folder, "timm", SimpleNamespace(create_model=lambda *_, **__: other))
    with pytest.raises(UserError, match="computes other logits"):
        run(folder, "timm", tmp_path / "timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_timms_config_has_the_states_that_an_additional_scan_added(tmp_path):
    folder = saved(tmp_path / "run", "additional_scan")
    run(folder, "timm", tmp_path / "timm")
    with torch.no_grad():
        close(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(IMAGES), logits(folder))


@pytest.mark.parametrize("to", ["timm", "official"])
def test_what_cannot_be_merged_is_named(tmp_path, to):
    folder = saved(tmp_path / "run", "affix")
    with pytest.raises(UserError, match="affix: its tokens join the sequence"):
        run(folder, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- Hugging Face peft --------------------------------------------------------------------------------------------

# Presets, and the kind of adapter that they are in peft.
IN_PEFT = {
    ("lora_p_x", "lora_out_proj"): "LORA",  # rows of a weight, and two ranks
    ("lora_x_proj",): "LORA",
    ("lora_embed",): "LORA",
    ("rslora",): "LORA",
    ("pissa",): "LORA",
    ("vera",): "VERA",
    ("loha",): "LOHA",
    ("lokr",): "LOKR",
    ("miss",): "MISS",
    ("hira",): "HIRA",
    ("hra",): "HRA",
    ("oft",): "OFT",
    ("boft",): "BOFT",
    ("ia3",): "IA3",
}


@pytest.fixture
def peft(monkeypatch) -> Any:
    import peft

    no_extension_of_peft(monkeypatch)
    return peft


def test_every_form_is_tested():
    assert {kind.removesuffix("Config").upper() for kind in (form.config for form in FORMS.values())} < {
        *IN_PEFT.values()
    }


def through_peft(peft: Any, folder: Path) -> Any:
    """Exports an adapter to peft, whose model computes the same, and converts it back. Returns peft's config."""
    expected = logits(folder)
    there, back = folder.with_name("peft"), folder.with_name("back")
    assert "logits differ" in run(folder, "peft", there)
    theirs = timm.create_model(VIM, num_classes=CLASSES, **SMALL)
    theirs.load_state_dict({**backbone().state_dict(), **theirs.head.state_dict(prefix="head.")})
    with torch.no_grad():
        plain = theirs.eval()(IMAGES)
        loaded = peft.PeftModel.from_pretrained(theirs, str(there)).eval()
        close(loaded(IMAGES), expected)
    assert not torch.allclose(plain, expected, atol=1e-3)
    convert_from_peft(there, VIM, "random", back, **SMALL)
    close(logits(back), expected)
    return loaded.peft_config["default"]


@pytest.mark.parametrize("presets", IN_PEFT, ids="+".join)
def test_adapters_become_those_of_peft_and_come_back(tmp_path, peft, presets):
    assert through_peft(peft, saved(tmp_path / "run", *presets)).peft_type == IN_PEFT[presets]


def test_dora_of_rows_becomes_pefts_and_comes_back(tmp_path, peft):
    """Whole weights, blocks of rows of one weight with a rank each, and a convolution."""
    methods = {
        "x": DoRA(targets="in_proj", rank=2, rows="x", scale=0.7, magnitudes="rows"),
        "z": DoRA(targets="in_proj", rank=3, rows="z", magnitudes="rows"),
        "b": DoRA(targets="x_proj", rank=2, rows="b", magnitudes="rows"),
        "whole": DoRA(targets=["out_proj", "patch_embed"], rank=2, magnitudes="rows"),
    }
    folder = tmp_path / "run"
    move(adapt(backbone(), methods, CLASSES, 3)).save(folder, {"task": "tiny"})
    assert through_peft(peft, folder).use_dora
    assert all(spec["magnitudes"] == "rows" for spec in read_adapter(tmp_path / "back").config["methods"].values())


def test_peft_has_one_dora_for_a_row(tmp_path, peft):
    methods = {name: DoRA(targets="in_proj", rank=2, rows=rows, magnitudes="rows") for name, rows in ROWS.items()}
    move(adapt(backbone(), methods, CLASSES, 3)).save(tmp_path / "run", {"task": "tiny"})
    with pytest.raises(UserError, match="several DoRA methods change the same rows of layers.0.mixer.in_proj"):
        run(tmp_path / "run", "peft", tmp_path / "peft")


ROWS = {"of_x": "x", "of_all": None}


def test_a_folder_that_peft_could_not_complete_is_not_left(tmp_path, peft, monkeypatch):
    """The disk is full when peft has written the tensors and half of its config."""
    whole = peft.LoraConfig.save_pretrained

    def half(self, folder, **options):
        whole(self, folder, **options)
        os.truncate(Path(folder) / "adapter_config.json", 100)
        raise OSError(28, os.strerror(28))

    folder, out = saved(tmp_path / "run", "lora_x_proj"), tmp_path / "peft"
    with monkeypatch.context() as patch:
        patch.setattr(peft.LoraConfig, "save_pretrained", half)
        with pytest.raises(OSError, match="No space left") as error:
            run(folder, "peft", out)
    assert error.value.filename == str(out) and os.listdir(tmp_path) == ["run"]
    run(folder, "peft", out)  # nothing is in the way
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(out))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_lora_that_peft_made_becomes_ours(tmp_path, peft, use_dora):
    """With patterns of ranks and scales, which only peft's own users write."""
    theirs = timm.create_model(VIM, num_classes=CLASSES, **SMALL)
    theirs.load_state_dict({**backbone().state_dict(), **theirs.head.state_dict(prefix="head.")})
    config = peft.LoraConfig(
        use_dora=use_dora,
        target_modules=["in_proj", "out_proj"],
        modules_to_save=["head"],
        r=4,
        lora_alpha=2,
        rank_pattern={"out_proj": 2},
        alpha_pattern={"out_proj": 6},
        use_rslora=True,
    )
    model = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for number, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
        expected = model(IMAGES)
    model.save_pretrained(tmp_path / "peft")
    convert_from_peft(tmp_path / "peft", VIM, "random", tmp_path / "ours", **SMALL)
    close(logits(tmp_path / "ours"), expected)
    with pytest.raises(UserError, match="convert from-peft"):
        load_adapter(tmp_path / "peft", "random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "does not fit its tensors"),  # which have no magnitudes
        ({"peft_type": "HRA", "use_dora": True}, "use_dora=True, which changes what its tensors mean"),
        ({"init_lora_weights": "pissa"}, "changes the backbone's weights too"),
        ({"peft_type": "TRAINABLE_TOKENS"}, "peft_type 'TRAINABLE_TOKENS'; expected one of LoRA"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "is a regular expression"),
        ({"lora_alpha": "much"}, "does not fit its tensors"),
        ({"lora_alpha": float("1e308") * 10}, "no valid JSON"),
        ({"peft_type": "HRA", "apply_GS": True}, "apply_GS=True, which changes"),
        ({"peft_type": "OFT", "block_share": True}, "block_share=True, which changes"),
        ({"peft_type": "LOHA", "alpha_pattern": {"in_proj": 2}}, "alpha_pattern=.*, which changes"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "init_weights='bat', which changes"),
        ({"peft_type": "IA3", "feedforward_modules": "in_proj"}, "'in_proj' .* is a regular expression"),
        ({"peft_type": None}, "is no config of peft"),
    ],
)
def test_what_peft_means_otherwise_is_refused(peft_folder, change, message):
    file = peft_folder / "adapter_config.json"
    file.write_text(json.dumps({**PEFT_CONFIG, **change}))
    with pytest.raises(UserError, match=message):
        from_peft(peft_folder, backbone())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.layers.0.mixer.in_proj.lora_E": torch.zeros(4)}, "holds 'layers.0.mixer.in_proj.lora_E'"),
        ({"base_model.model.layers.7.mixer.in_proj.lora_A.weight": torch.zeros(4, 32)}, "does not fit its tensors"),
        ({"base_model.model.head.weight": None}, "holds no head"),
        ({"base_model.model.head.bias": torch.full((CLASSES,), torch.nan)}, "NaN or infinity in base_model.model.head"),
    ],
)
def test_tensors_of_nothing_are_refused(peft_folder, tensors, message):
    state = {**PEFT_TENSORS, **tensors}
    save_file({k: t for k, t in state.items() if t is not None}, peft_folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        from_peft(peft_folder, backbone())


PEFT_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["in_proj"]}
_IN_PROJ = "base_model.model.layers.0.mixer.in_proj"
PEFT_TENSORS = {
    f"{_IN_PROJ}.lora_A.weight": torch.ones(4, 32),
    f"{_IN_PROJ}.lora_B.weight": torch.ones(128, 4),
    "base_model.model.head.weight": torch.ones(CLASSES, 32),
    "base_model.model.head.bias": torch.ones(CLASSES),
}


@pytest.fixture
def peft_folder(tmp_path) -> Path:
    """A LoRA as peft writes it, without peft."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    save_file(PEFT_TENSORS, tmp_path / "adapter_model.safetensors")
    from_peft(tmp_path, backbone())  # as it is, it is read
    return tmp_path


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        (
            ("dora_p_x",),
            "magnitudes are of input columns, .* and peft's are of output rows; train with magnitudes: rows",
        ),
        (("lora_p_x", "affix"), "methods of kind Affix, LoRA"),
        (("lora_dt_proj", "vera"), "methods of kind LoRA, VeRA"),
    ],
)
def test_what_peft_has_not_is_refused(tmp_path, peft, presets, message):
    with pytest.raises(UserError, match=message):
        run(saved(tmp_path / "run", *presets), "peft", tmp_path / "peft")


def test_peft_has_no_grouped_weights(tmp_path, peft):
    folder = saved(tmp_path / "run", "lora_x_proj", name="vmamba_pico_patch4_32")
    with pytest.raises(UserError, match="neither"):
        run(folder, "peft", tmp_path / "peft")


# -- LoRA ---------------------------------------------------------------------------------------------------------


def test_an_adapter_of_low_rank_becomes_the_same_lora(tmp_path):
    folder = saved(tmp_path / "run", "hra")  # eight reflections: a change of rank eight
    said = run(folder, "lora", tmp_path / "lora", energy=1.0)
    assert "LoRA of rank 8 on 2 weights" in said
    close(logits(tmp_path / "lora"), logits(folder))


@pytest.mark.parametrize("name", [VIM, "vmamba_pico_patch4_32"])
def test_the_errors_are_those_of_the_weights(name):
    def source() -> AdaptedModel:
        return move(adapt(backbone(name), methods_of(specs(("oft", "lora_x_proj"))), CLASSES, 3)).eval()

    named = source()
    named.class_names = tuple("abcde")
    found = to_lora(named, backbone(name), energy=0.9)
    assert found.model.class_names == tuple("abcde")
    coarser = to_lora(source(), backbone(name), rank=2)
    assert coarser.rank == 2 < found.rank and coarser.logits > found.logits > 0
    before, target = dict(backbone(name).named_parameters()), source()
    target.merge()
    found.model.merge()
    after, mine = (dict(m.backbone.named_parameters()) for m in (target, found.model))
    for key, error in found.errors.items():
        missing, change = (mine[key] - after[key]).detach(), (after[key] - before[key]).detach()
        assert error == pytest.approx(float(missing.norm() / change.norm()), rel=1e-3, abs=1e-5)
        assert error <= (1 - 0.9) ** 0.5 + 1e-6
    assert any(error > 0.1 for error in found.errors.values())


def test_logits_of_an_untrained_head_do_not_differ():
    model = adapt(backbone(), methods_of(specs(("lora_x_proj",))), CLASSES, 3).eval()
    assert to_lora(model, backbone()).logits == 0


def test_a_lora_holds_no_biases_and_no_tokens(tmp_path):
    for preset, message in (("bias", "also changes layers.0.mixer.*bias"), ("affix", "affix: its tokens join")):
        with pytest.raises(UserError, match=message):
            run(saved(tmp_path / preset, preset), "lora", tmp_path / "out")
    with pytest.raises(UserError, match="energy=0"):
        run(tmp_path / "bias", "lora", tmp_path / "out", energy=0.0)


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    assert list(FORMATS) == list(command.FORMATS)
    folder = saved(tmp_path / "run", "lora_out_proj")
    command.main([f"run={folder}", "to=official", "--out", str(tmp_path / "a" / "model.pth"), "weights=random"])
    assert "with the keys of the official checkpoints" in capsys.readouterr().out
    for line, message in (
        (["to=coreml", "out=x"], "invalid choice: 'coreml'"),
        (["to=timm", f"out={folder}"], "is no empty folder"),
        (["to=onnx", f"out={folder}"], "is a folder; expected a file"),
        (["to=onnx", f"out={folder / 'adapter_config.json' / 'model.onnx'}"], "is a file; expected a folder"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([f"run={folder}", *line])


@pytest.mark.parametrize(
    ("recorded", "message"),
    [({"weights": "random", "seed": "x"}, "backbone.seed is 'x'"), ({"weights": "random", "seed": None}, None)],
)
def test_the_weights_that_a_result_records(tmp_path, recorded, message):
    folder = saved(tmp_path / "run", "lora_out_proj")
    write_record(folder, fake_record("vtab/cifar", "lora_p_x", 0, 0.625, backbone=recorded))
    request = Request(folder, tmp_path / "model.pth")
    if message is None:
        assert (Source(request).weights, Source(request).seed) == ("random", 0)
        return
    for act in (lambda: Source(request), lambda: convert.main(["to-hub", str(folder), "--out", str(tmp_path / "hub")])):
        with pytest.raises(UserError, match=message):
            act()


# -- the hub ------------------------------------------------------------------------------------------------------


def in_the_hubs_cache(folder: Path, cache: Path) -> Path:
    """The files of a folder as the hub's client keeps them: links to the blobs of their repository."""
    snapshot = cache / "models--USER--NAME" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, snapshot.parents[1] / "blobs")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple[str, str | None]]:
    """The hub and its client's cache. What was downloaded is noted."""
    asked = []
    folder = saved(tmp_path / "run", "lora_p_x")
    write_record(folder, fake_record("vtab/cifar", "lora_p_x", 0, 0.625, backbone={"weights": "random"}))
    convert.main(["to-hub", str(folder), "--out", str(tmp_path / "hub")])
    cache = in_the_hubs_cache(tmp_path / "hub", tmp_path / "cache")

    def snapshot(repository: str, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repository, revision))
        assert local_files_only == (repository != "USER/NAME")
        if repository == "someone/else":
            raise ValueError("not in the cache")
        return str(cache)

    sizes = {
        "USER/NAME": {"adapter.safetensors": 1_000, "x": 10**12},
        "USER/LARGE": {"adapter.safetensors": 10**11},
        "USER/UNKNOWN": {"adapter.safetensors": None},
    }
    hub_with(monkeypatch, sizes)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_links_of_the_hubs_cache_stay_in_their_repository(tmp_path):
    """peft's adapters and ours; a link elsewhere, planted in a shared cache, is refused."""
    folder = saved(tmp_path / "run", "lora_p_x")
    snapshot = in_the_hubs_cache(folder, tmp_path / "cache")
    assert read_adapter(snapshot).config["methods"]
    (snapshot / "adapter.safetensors").unlink()
    (snapshot / "adapter.safetensors").symlink_to(folder / "adapter.safetensors")
    with pytest.raises(UserError, match="adapter.safetensors is a link"):
        read_adapter(snapshot)
    blobs = snapshot.parents[1] / "blobs"
    shutil.rmtree(blobs)
    blobs.symlink_to(folder)
    with pytest.raises(UserError, match="adapter_config.json is a link"):
        read_adapter(snapshot)
    with pytest.raises(UserError, match="adapter_config.json is a link"):
        from_peft(snapshot, create_backbone("vim_pico_patch8_32", "random", **SMALL))


def test_an_adapter_that_is_too_large_is_not_downloaded(hub):
    for name, size in ("USER/LARGE", "100,000,000,000"), ("USER/UNKNOWN", "an unknown number of"):
        with pytest.raises(UserError, match=f"has {size} bytes; expected at most 4,000,000,000. Nothing was"):
            load_adapter(name, "random")
    assert hub == []


def test_the_cards_snippet_works_and_revisions_reach_the_hub(tmp_path, hub):
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| trained parameters |" in card and "| licence of the backbone's weights |" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["logits"].shape == (1, CLASSES)
    load_adapter("USER/NAME", "random", revision="v2")
    assert hub == [("USER/NAME", "commit of None"), ("USER/NAME", "commit of v2")]
    load_adapter("USER/CACHED", "random", revision="v2")  # the hub does not answer
    assert hub.pop() == ("USER/CACHED", "v2")
    with pytest.raises(UserError, match="someone/else at revision v1 is no folder here, and could not be fetched"):
        load_adapter("someone/else", "random", revision="v1")
    with pytest.raises(UserError, match="is a folder; expected user/name on the hub"):
        load_adapter(tmp_path / "hub", "random", revision="v1")


def test_a_full_disk_ends_the_writing_of_int8_weights_with_its_reason(tmp_path: Path) -> None:
    """onnxruntime would read the half of a file that it wrote beside the model."""
    onnx = pytest.importorskip("onnx", reason="NOT RUN: needs onnx")
    pytest.importorskip("onnxruntime", reason="NOT RUN: needs onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = helper.make_tensor("w", kind, [64, 64], np.ones(64 * 64, dtype=np.float32))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [helper.make_tensor_value_info(name, kind, [1, 64]) for name in "xy"]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [weight])
    model = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), model)
    small = tmp_path / "small.onnx"
    with size_limit(64), pytest.raises(OSError, match="File too large") as caught:
        program.quantise(model, small)
    assert caught.value.filename == str(small) and [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert 0 < program.quantise(model, small).stat().st_size < model.stat().st_size
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "small.onnx"}
