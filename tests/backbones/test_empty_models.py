"""Models that are built without values and filled afterwards, as loaders of large models do it."""

import pytest
import timm
import torch

import mambapeft_vision.backbones  # noqa: F401 (registers its models with timm)


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
