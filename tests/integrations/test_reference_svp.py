"""SVP against values that its published code computed, in float64: logits, loss and every gradient."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden_values import GOLDEN

from mambapeft_vision.integrations.reference import load_reference
from mambapeft_vision.methods.svp import simam
from mambapeft_vision.utils.errors import UserError

TOLERANCE = 1e-10


def load_svp(name: str) -> dict:
    with np.load(GOLDEN / "backbones" / f"{name}.npz") as file:
        values = {key: file[key] for key in file}
    config = json.loads(str(values["config_json"]))
    params = {k.removeprefix("param/"): v.astype(np.float64) for k, v in values.items() if k.startswith("param/")}
    grads = {k.removeprefix("grad/"): v for k, v in values.items() if k.startswith("grad/")}
    return {
        "kwargs": config["module_kwargs"],
        "classes": config["num_classes"],
        "params": params,
        "grads": grads,
        **values,
    }


def built(golden: dict, **options):
    return load_reference(None, golden["kwargs"], golden["params"], golden["classes"], family="svp", **options)


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.detach().numpy() - theirs).max() / (np.abs(theirs).max() or 1.0))


@pytest.mark.parametrize(("name", "published"), [("svp_shared2", True), ("svp_shared2_corrected", False)])
@pytest.mark.parametrize("kernel", ["torch", "naive"])
def test_logits_loss_and_gradients(name, published, kernel):
    golden = load_svp(name)
    model, names = built(golden, reproduce_reference_bugs=published)
    model.backbone.set_kernel(kernel, "cpu")
    logits = model(torch.from_numpy(golden["input"]).double())
    loss = F.cross_entropy(logits, torch.from_numpy(golden["labels"]))
    loss.backward()
    assert relative(logits, golden["logits"]) < TOLERANCE
    assert abs(loss.item() - float(golden["loss"])) < TOLERANCE * float(golden["loss"])
    assert set(names) == set(golden["grads"])
    for key, gradient in golden["grads"].items():
        assert relative(names[key].grad, gradient) < TOLERANCE, key
    assert {id(p) for p in names.values()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_two_forms_differ():
    golden = load_svp("svp_shared2")
    images = torch.from_numpy(golden["input"]).double()
    published, corrected = (built(golden, reproduce_reference_bugs=bugs)[0](images) for bugs in (True, False))
    assert (published - corrected).abs().max() > 1


def with_groups(golden: dict, shared: int) -> dict:
    """The golden parameters for another sharing, the first cross prompt in every group."""
    kept = {k: v for k, v in golden["params"].items() if "shared" not in k}
    groups = golden["kwargs"]["depth"] // shared
    kept["prompt_shared_scale"] = np.repeat(golden["params"]["prompt_shared_scale"][:1], groups, axis=0)
    for i in range(groups):
        for kind in ("weight", "bias"):
            kept[f"prompt_generator_shared.{i}.0.{kind}"] = golden["params"][f"prompt_generator_shared.0.0.{kind}"]
    return {**golden, "kwargs": {**golden["kwargs"], "shared_layers": shared}, "params": kept}


@pytest.mark.parametrize("bugs", [True, False])
def test_other_sharings(bugs):
    """Equal cross prompts in every group are one cross prompt, however many groups there are."""
    golden = load_svp("svp_shared2")
    images = torch.from_numpy(golden["input"]).double()
    outputs = [built(with_groups(golden, s), reproduce_reference_bugs=bugs)[0](images) for s in (1, 2, 4)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-12, atol=1e-12)


def test_two_layer_head():
    golden = load_svp("svp_shared2_corrected")
    dim, generator = golden["kwargs"]["embed_dim"], np.random.default_rng(0)
    head = {"0.weight": (dim // 2, dim), "0.bias": (dim // 2,), "1.weight": (10, dim // 2), "1.bias": (10,)}
    params = {k: v for k, v in golden["params"].items() if not k.startswith("head.")}
    params |= {f"head.{key}": generator.normal(size=shape) for key, shape in head.items()}
    golden = {**golden, "params": params, "kwargs": {**golden["kwargs"], "dataset": "CUB200"}}
    model, names = built(golden)
    logits = model(torch.from_numpy(golden["input"]).double())
    hidden = golden["feature"] @ params["head.0.weight"].T + params["head.0.bias"]
    assert relative(logits, hidden @ params["head.1.weight"].T + params["head.1.bias"]) < TOLERANCE
    logits.sum().backward()
    assert {"head.0.weight", "head.1.bias"} <= set(names) and all(p.grad is not None for p in names.values())
    assert {id(p) for group in model.param_groups(1e-3, 1e-4) for p in group["params"]} == {
        id(p) for p in names.values()
    }


def test_image_attention():
    golden = load_svp("svp_shared2_corrected")
    images = torch.from_numpy(golden["input"]).double()
    weighed = images.clone()
    for image in weighed:
        for channel in image:  # by its formula, one channel at a time
            squares = (channel - channel.mean()) ** 2
            channel *= 1 / (1 + torch.exp(-squares / (4 * (squares.sum() / (channel.numel() - 1) + 1e-3)) - 0.5))
    torch.testing.assert_close(simam(images), weighed, rtol=1e-12, atol=1e-12)
    plain, _ = built(golden)
    model, _ = built({**golden, "kwargs": {**golden["kwargs"], "input_relu": True}})
    torch.testing.assert_close(model(images), plain(weighed), rtol=1e-10, atol=1e-12)
    assert not model.methods["svp"].identity_at_init


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_add_gen": "mlp384*32"}, "sizes do not fit"),
        ({"shared_layers": 3}, "shared_layers=3"),
        ({"depth": 25, "shared_layers": 5}, "depth=25"),
        ({"transfer_type": "none"}, "only 'prompt'"),
        ({"prompt_typ": "addv4"}, "prompt_typ"),
    ],
)
def test_forms_that_do_not_run_are_refused(change, message):
    golden = load_svp("svp_shared2")
    with pytest.raises(UserError, match=message):
        built({**golden, "kwargs": {**golden["kwargs"], **change}})


def test_no_peft_arguments_and_no_other_family():
    golden = load_svp("svp_shared2")
    with pytest.raises(UserError, match="give None"):
        load_reference({}, golden["kwargs"], golden["params"], 10, family="svp")
    with pytest.raises(UserError, match="known: vim, vmamba, svp"):
        load_reference(None, golden["kwargs"], golden["params"], 10, family="vimm")
