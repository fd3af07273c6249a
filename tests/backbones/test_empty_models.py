"""Models that are built without values and filled afterwards, as loaders of large models do it."""

import pytest
import timm
import torch

import mambapeft_vision.backbones  # noqa: F401 (registers its models with timm)

MODELS = {
    "vim_pico_patch8_32": {},
    "mambareg_pico_patch8_32": {},
    "videomamba_pico_patch8_32": {},
    "arm_pico_patch8_32": {},
    "vmamba_pico_patch4_32": {},
    "ported_vit_pico_patch8_32": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_initialisation_leaves_no_value_as_it_was(name: str) -> None:
    """Memory that nobody has written holds anything; here it holds NaN."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.5, **MODELS[name])
    model.to_empty(device="cpu")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
    model.init_weights()
    assert [path for path, tensor in tensors.items() if not tensor.isfinite().all()] == []


@pytest.mark.parametrize("name", ["vim_pico_patch8_32", "vmamba_pico_patch4_32"])
def test_drop_path_survives_a_model_without_values(name: str) -> None:
    """The rates are no part of a state dict."""
    whole = timm.create_model(name, num_classes=3, drop_path_rate=0.5)
    with torch.device("meta"):
        filled = timm.create_model(name, num_classes=3, drop_path_rate=0.5)
    filled.to_empty(device="cpu").load_state_dict(whole.state_dict())
    x = torch.randn(4, 3, 32, 32)
    for model in (whole, filled):
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (whole, filled):
        torch.manual_seed(1)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)
