"""scripts/convert_checkpoint.py: the reference's files in, official checkpoints and hub folders out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fake_records import fake_record
from helpers.golden_values import load_golden
from helpers.method_cases import pooled

from mambapeft_vision.adapter.load import load_adapter
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.backbones.weights import load_weights
from mambapeft_vision.commands import convert
from mambapeft_vision.integrations.convert import read_reference_config
from mambapeft_vision.integrations.hub import model_card, push_to_hub
from mambapeft_vision.results.record import write_record
from mambapeft_vision.run.exit import run_cli
from mambapeft_vision.utils.errors import UserError

CONFIG = """
_base_ = ["../base.py"]
checkpoint = "weights/vim.pth"
model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="VimPEFTModel",
        {peft},
        module=dict(type="VisionMamba", {module}, init_cfg=dict(type="Pretrained", checkpoint=checkpoint)),
    ),
    head=dict(type="LinearClsHead", num_classes=10),
)
"""


def reference_files(folder: Path, name: str) -> tuple[dict, list[str]]:
    """The three files a user of the reference has: config, trained adapter, official backbone."""
    golden = load_golden(name)
    config = golden["config"]
    write = lambda kwargs: ", ".join(f"{k}={v!r}" for k, v in kwargs.items())  # noqa: E731
    (folder / "config.py").write_text(
        CONFIG.format(peft=write(config["peft_kwargs"]), module=write(config["module_kwargs"]))
    )
    tensors = {k: torch.from_numpy(v).float() for k, v in golden["params"].items()}
    backbone = {k: v for k, v in tensors.items() if not any(w in k for w in ("lora", "learnable", "scan_addi", "head"))}
    adapter = {k: v for k, v in tensors.items() if k not in backbone}
    saved = {("backbone." + k).replace("backbone.head.", "head.layers.head."): v for k, v in adapter.items()}
    torch.save({"state_dict": saved, "meta": {"epoch": 100}}, folder / "adapter.pth")
    torch.save({"model": {k.removeprefix("module."): v for k, v in backbone.items()}}, folder / "vim.pth")
    return golden, [str(folder / f) for f in ("config.py", "adapter.pth", "vim.pth")]


def command(*args) -> None:
    convert.main([str(a) for a in args])


@pytest.mark.parametrize("name", ["lora_X", "addscan_prefix_copy", "lora_in_proj_dora"])
def test_reference_adapter_to_ours_to_a_plain_checkpoint(tmp_path, name):
    golden, (config, adapter, weights) = reference_files(tmp_path, name)
    command("from-reference", config, adapter, "--weights", weights, "--out", tmp_path / "ours")
    images = torch.from_numpy(golden["input"]).float()
    model = load_adapter(tmp_path / "ours", weights).eval()
    assert np.abs(model(images).detach().numpy() - golden["logits"]).max() < 2e-5

    command("merge", tmp_path / "ours", "--weights", weights, "--out", tmp_path / "merged.pth")
    module = golden["config"]["module_kwargs"]
    states = torch.load(tmp_path / "merged.pth", weights_only=True)["model"]["layers.0.mixer.A_log"].shape[1]
    sizes = {k: module[k] for k in ("img_size", "patch_size", "embed_dim", "depth")}
    plain = create_backbone("vim_tiny_patch16_224", "random", d_state=states, **sizes).eval()
    load_weights(plain, tmp_path / "merged.pth")
    feature = pooled(plain, images).detach().numpy()
    assert np.abs(feature - golden["feature"]).max() < 2e-5 * np.abs(golden["feature"]).max()


def test_hub_folder_has_a_card_with_the_results(tmp_path):
    _, (config, adapter, weights) = reference_files(tmp_path, "lora_X")
    command("from-reference", config, adapter, "--weights", weights, "--out", tmp_path / "ours")
    write_record(tmp_path / "ours", fake_record("vtab/cifar", "lora_p_x", 0, 0.625))
    command("to-hub", tmp_path / "ours", "--out", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "# lora_p_x on vtab/cifar" in card
    assert "62.50 %" in card
    assert "vim_tiny_patch16_224" in card
    assert load_adapter(tmp_path / "hub", weights).counts()["trainable"] == 2304


def test_a_card_names_the_classes_and_the_measure_of_several_labels():
    record = fake_record("custom/pets", "lora_p_x", 0, 0.625)
    config = {
        "format_version": 1,
        "methods": {},
        "num_classes": 2,
        "backbone": {"name": "vim_tiny_patch16_224", "sha256": "0", "architecture": {}},
    }
    card = model_card({**config, "class_names": ["red | fox", "<b>"], "multi_label": True}, record)
    assert "| classes | 2: red \\| fox, &lt;b&gt; |" in card
    assert "| test mean average precision | 62.50 % |" in card and "several labels" in card
    assert "test accuracy" not in card
    many = model_card({**config, "num_classes": 50, "class_names": [f"c{k}" for k in range(50)]}, record)
    assert "| classes | 50: c0, c1, " in many and "c19, … |" in many and "c20" not in many
    with pytest.raises(UserError, match="in_chans is '3'"):
        model_card({**config, "backbone": {**config["backbone"], "architecture": {"in_chans": "3"}}}, record)
    assert "| classes | 2 |" in model_card(config, record) and "test accuracy" in model_card(config, record)


def test_a_hub_folder_is_another_one_than_the_adapters(tmp_path):
    _, (config, adapter, weights) = reference_files(tmp_path, "lora_X")
    command("from-reference", config, adapter, "--weights", weights, "--out", tmp_path / "ours")
    with pytest.raises(UserError, match="is the adapter's own folder"):
        command("to-hub", tmp_path / "ours", "--out", tmp_path / "ours")


def test_a_merged_checkpoint_makes_its_folder_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        command("merge", tmp_path / "no adapter", "--weights", "random", "--out", tmp_path / "file" / "m.pth")


def test_pushing_without_a_token_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        push_to_hub(tmp_path, "user/name")


def test_pushing_with_a_token_uploads_the_folder(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repository, exist_ok, private):
            calls.append((repository, exist_ok, private))

        def create_branch(self, repository, branch, exist_ok):
            calls.append((repository, branch, exist_ok))

        def upload_folder(self, repo_id, folder_path, revision):
            calls.append((repo_id, folder_path, revision))
            return "commit"

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_to_hub(tmp_path, "user/name") == "commit"
    assert calls == [("user/name", True, False), ("user/name", str(tmp_path), None)]
    calls.clear()
    push_to_hub(tmp_path, "user/name", private=True, revision="v2")
    assert calls == [("user/name", True, True), ("user/name", "v2", True), ("user/name", str(tmp_path), "v2")]


def test_methods_that_cannot_merge_are_named(tmp_path):
    golden = load_golden("adaptformer")
    from mambapeft_vision.integrations.reference import load_reference

    model, _ = load_reference(golden["config"]["peft_kwargs"], golden["config"]["module_kwargs"], golden["params"], 10)
    model.save(tmp_path / "ours", {})
    torch.save(
        {"model": {k.removeprefix("module."): torch.from_numpy(v) for k, v in golden["params"].items()
                   if "adaptf" not in k and "head" not in k}},
        tmp_path / "vim.pth",
    )  # fmt: skip
    with pytest.raises(UserError, match="cannot become a plain checkpoint"):
        command("merge", tmp_path / "ours", "--weights", tmp_path / "vim.pth", "--out", tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


def test_configs_are_parsed_not_run(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        f"model = dict(backbone=dict(type='VisionMamba', depth=__import__('os').system('touch {tmp_path}/x')))"
    )
    with pytest.raises(UserError, match=r"config.py:1: only literals"):
        read_reference_config(path)
    assert not (tmp_path / "x").exists()
    path.write_text("other = 1")
    with pytest.raises(UserError, match="no config of the reference"):
        read_reference_config(path)
    with pytest.raises(UserError, match="does not exist"):
        read_reference_config(tmp_path / "none.py")


def test_errors_leave_with_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: command("merge", tmp_path, "--out", tmp_path / "x.pth"))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
