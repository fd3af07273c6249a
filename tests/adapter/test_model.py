"""The core of adaptation: ownership, groups, adapters on disk, merging, and what it refuses."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.method_cases import pooled
from safetensors.torch import load_file, save_file

from mambapeft_vision.adapter.build import build_method
from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import apply_adapter, build_methods
from mambapeft_vision.adapter.model import adapt, backbone_sha256
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.methods import add_methods_folder
from mambapeft_vision.methods.linear_probe import LinearProbe
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.offset import Offset
from mambapeft_vision.methods.unfreeze import Unfreeze
from mambapeft_vision.utils.errors import UserError

X_PROJ = ["layers.*.mixer.x_proj.weight", "layers.*.mixer.x_proj_b.weight"]


def backbone(**kwargs):
    sizes = {"depth": 2, "embed_dim": 32, "img_size": 16, "drop_path_rate": 0.0, **kwargs}
    return create_backbone("vim_pico_patch8_32", "random", **sizes)


def methods():
    return {
        "x": LoRA(targets="layers.*.mixer.in_proj.weight", rows="x", rank=4),
        "out": LoRA(targets="layers.*.mixer.out_proj.weight", rank=3),
        "b": LoRA(targets=X_PROJ, rank=2, rows="b", space="weight"),
        "embed": LoRA(targets="patch_embed.proj.weight", rank=2, scale=1.0),
        "a": Offset(targets=["layers.*.mixer.A_log", "layers.*.mixer.A_b_log"], decay_mult=10.0),
        "cls": Offset(targets="cls_token"),
    }


def moved(model):
    """Every trained tensor away from its start, so that nothing passes by being zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.trained().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_starts_as_the_base_model():
    plain = backbone().eval()
    model = adapt(backbone(), methods(), 7).eval()
    assert torch.equal(pooled(model.backbone, IMAGES), pooled(plain, IMAGES))
    assert not model(IMAGES).any()  # the head starts at zero


def test_only_owned_tensors_and_the_head_train():
    model = moved(adapt(backbone(), methods(), 7))
    F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2])).backward()
    trained = {id(p) for p in model.trained().values()}
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in trained), name
        assert p.grad is None or p.grad.abs().max() > 0, name


def test_counts_keep_the_head_apart():
    counts = adapt(backbone(), methods(), 7).counts()
    assert counts["by_method"]["x"] == 2 * (4 * 32 + 64 * 4)
    assert counts["head"] == 32 * 7 + 7
    assert counts["trainable"] == sum(counts["by_method"].values())
    assert counts["frozen"] == sum(p.numel() for p in backbone().parameters())


def test_order_of_methods_does_not_matter():
    forward = adapt(backbone(), methods(), 7, seed=5)
    backward = adapt(backbone(), dict(reversed(methods().items())), 7, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(forward.owned().values(), backward.owned().values()))
    alone = adapt(backbone(), {"x": methods()["x"]}, 7, seed=5)
    for name, p in alone.owned().items():
        assert torch.equal(p, forward.owned()[name])  # a method starts the same, whatever stands beside it


def test_activation_and_weight_space_agree():
    a = LoRA(targets="layers.*.mixer.in_proj.weight", rows="z", rank=4)
    b = LoRA(targets="layers.*.mixer.in_proj.weight", rows="z", rank=4, space="weight")
    outputs = []
    for method in (a, b):
        model = moved(adapt(backbone().double(), {"z": method}, 7)).eval()
        outputs.append(model(IMAGES.double()))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-12 * outputs[0].abs().max()


def test_param_groups_hold_every_tensor_once_with_its_multipliers():
    model = adapt(backbone(), methods(), 7)
    groups = model.param_groups(1e-3, 1e-4, head_lr_mult=2.0, head_decay_mult=3.0)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(found) == {id(p) for p in model.trained().values()}
    expected = {"a": (1e-3, 1e-3), "x": (1e-3, 1e-4)}
    for name, p in model.owned().items():
        if (method := name.split(".")[0]) in expected:
            assert found[id(p)] == pytest.approx(expected[method])
    assert found[id(model.backbone.head.weight)] == pytest.approx((2e-3, 3e-4))
    assert found[id(model.backbone.head.bias)] == pytest.approx((2e-3, 0.0))


def test_full_fine_tuning_groups_follow_the_recipe():
    full = Unfreeze(targets="**", no_decay=["cls_token", "pos_embed", "layers.*.mixer.A_log", "layers.*.mixer.A_b_log"])
    model = adapt(backbone(), {"full": full}, 7)
    decays = {id(p): g["weight_decay"] for g in model.param_groups(1e-3, 1e-4) for p in g["params"]}
    for name, p in model.owned().items():
        free = p.ndim == 1 or "A_" in name or name.endswith(("cls_token", "pos_embed"))
        assert decays[id(p)] == (0.0 if free else 1e-4), name


def test_saved_adapter_is_bit_equal_and_holds_no_backbone(tmp_path):
    model = moved(adapt(backbone(), methods(), 7)).eval()
    model.save(tmp_path, {"task": "some/task"})
    state = load_file(tmp_path / "adapter.safetensors")
    assert set(state) == set(model.owned()) | {"head.weight", "head.bias"}
    again = apply_adapter(read_adapter(tmp_path), backbone()).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task"] == "some/task"
    assert config["methods"]["x"]["_target_"] == "mambapeft_vision.methods.lora.LoRA"


def test_merge_is_exact_and_leaves_a_plain_backbone():
    model = moved(adapt(backbone().double(), methods(), 7)).eval()
    before, copied = model(IMAGES.double()), copy.deepcopy(model)
    assert model.merge() == {}
    assert (model(IMAGES.double()) - before).abs().max() < 1e-12
    assert torch.equal(copied(IMAGES.double()), before)  # a copy made before keeps working
    plain = create_like(model)
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(plain.eval()(IMAGES.double()), model(IMAGES.double()))


def create_like(model):
    plain = backbone().double()
    plain.reset_classifier(model.backbone.num_classes)
    return plain


def test_dropout_acts_in_training_only():
    model = moved(adapt(backbone(), {"x": LoRA(targets="layers.*.mixer.in_proj.weight", rank=4, dropout=0.5)}, 7))
    assert not torch.equal(model.train()(IMAGES), model.train()(IMAGES))
    assert torch.equal(model.eval()(IMAGES), model.eval()(IMAGES))


# -- what is refused ---------------------------------------------------------------------------------------------


def test_pattern_without_a_match_names_the_nearest():
    with pytest.raises(UserError, match=r"inproj.*nearest: layers\.\*\.mixer\.in_proj\.weight"):
        adapt(backbone(), {"x": LoRA(targets="layers.*.mixer.inproj.weight", rank=2)}, 7)


def test_patterns_match_whole_names_only():
    model = adapt(backbone(), {"d": Offset(targets="layers.*.mixer.D")}, 7)
    assert set(model.owned()) == {f"d.layers.{i}.mixer.D.offset" for i in range(2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0; expected a whole number >= 1"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 2, "dropout": 1.0}, "dropout=1.0"),
        ({"rank": 2, "space": "weights"}, "space='weights'"),
        ({"rank": 2, "space": "weight", "dropout": 0.1}, "dropout=0.1 needs space: activation"),
        ({"rank": 2, "lr_mult": -1.0}, "lr_mult=-1.0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        LoRA(targets="layers.*.mixer.in_proj.weight", **arguments)


def test_unknown_rows_and_missing_ports_are_named():
    with pytest.raises(UserError, match="rows='y' is no block of .*blocks of it: x, z"):
        adapt(backbone(), {"y": LoRA(targets="layers.*.mixer.in_proj.weight", rows="y", rank=2)}, 7)
    with pytest.raises(UserError, match="no port on activations; set space: weight"):
        adapt(backbone(), {"d": LoRA(targets=X_PROJ, rank=2)}, 7)


def test_two_owners_of_a_tensor_are_refused():
    both = {"full": Unfreeze(targets="**"), "norm": Unfreeze(targets="layers.*.norm.weight")}
    with pytest.raises(UserError, match="both 'full' and 'norm' want to train layers.0.norm.weight"):
        adapt(backbone(), both, 7)


def saved(tmp_path):
    moved(adapt(backbone(), methods(), 7)).save(tmp_path, {})
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "mambapeft_vision.adapter.model.AdaptedModel",
        "mambapeft_vision.methods.method.json",
        "mambapeft_vision.methods.lora.LowRank",
        "mambapeft_vision.methods..lora.LoRA",
        "mambapeft_vision.methods.method.nn.Linear",
        7,
        None,
    ],
)
def test_adapter_config_names_methods_only(tmp_path, target):
    folder = saved(tmp_path)
    edit_config(folder, methods={"x": {"_target_": target}})
    with pytest.raises(UserError, match="only classes in mambapeft_vision.methods|no Method|does not exist"):
        build_methods(read_adapter(folder))


def test_other_backbone_is_refused(tmp_path):
    other = create_backbone("vim_pico_patch8_32", "random", seed=9, depth=2, embed_dim=32, img_size=16)
    with pytest.raises(UserError, match="load the weights it was trained on"):
        apply_adapter(read_adapter(saved(tmp_path)), other)


def test_future_format_and_damaged_files_are_refused(tmp_path):
    folder = saved(tmp_path)
    edit_config(folder, format_version=99)
    with pytest.raises(UserError, match="format_version 99"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        read_adapter(folder)
    with pytest.raises(UserError, match="does not exist"):
        read_adapter(tmp_path / "nowhere")


def test_truncated_tensors_are_refused(tmp_path):
    folder = saved(tmp_path)
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        read_adapter(folder)


def test_loading_is_strict_and_changes_nothing_on_error(tmp_path):
    folder = saved(tmp_path)
    path = folder / "adapter.safetensors"
    state = load_file(path)
    state["extra"] = torch.zeros(1)
    del state["cls.cls_token.offset"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"missing: cls.cls_token.offset"):
        apply_adapter(read_adapter(folder), backbone())
    model = adapt(backbone(), methods(), 7)
    before = {k: v.clone() for k, v in model.adapter_state().items()}
    with pytest.raises(UserError, match="unknown: extra"):
        model.load_adapter_state(state)
    assert all(torch.equal(v, before[k]) for k, v in model.adapter_state().items())


def test_backbone_hash_follows_values_and_ignores_the_head_and_attached_methods():
    plain = backbone()
    first = backbone_sha256(plain)
    assert backbone_sha256(adapt(plain, methods(), 7).backbone) == first
    with torch.no_grad():
        plain.norm_f.weight[0] += 1
    assert backbone_sha256(plain) != first


def test_method_from_a_folder_outside_the_package(tmp_path):
    (tmp_path / "outside_bias.py").write_text(
        "from mambapeft_vision.methods.offset import Offset\n\n\nclass OutsideBias(Offset):\n    pass\n"
    )
    add_methods_folder(tmp_path)
    spec = {"_target_": "mambapeft_vision.methods.outside_bias.OutsideBias", "targets": "layers.*.mixer.dt_proj.bias"}
    method = build_method("outside", spec, "test")
    assert adapt(backbone(), {"outside": method}, 7).counts()["trainable"] == 2 * 64
    assert method.config() == {**spec, "lr_mult": 1.0, "decay_mult": 1.0}
    with pytest.raises(UserError, match="no folder"):
        add_methods_folder(tmp_path / "none")


def test_linear_probe_trains_the_head_alone():
    model = adapt(backbone(), {"linear_probe": LinearProbe()}, 7)
    assert model.counts()["trainable"] == 0
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.head_parameters().values()}
