"""Exported programs: right for every batch, also one that was not traced."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim

import mambapeft_vision.backbones.vim  # noqa: F401 (registers its models with timm)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    vim = timm.create_model("vim_pico_patch8_32", num_classes=3, depth=1, embed_dim=256)
    nn.init.normal_(vim.head.weight)
    return vim.eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def test_a_program_takes_any_batch(model: nn.Module) -> None:
    """Eagerly the scan is cut into chunks whose number depends on the batch."""
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: Dim("batch", min=2, max=256)},)).module()
    for batch in (2, 3, 7, 64, 200):
        torch.testing.assert_close(program(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive  # further sizes: integrations/test_export.py has a model that is adapted
def test_onnx_takes_any_batch(model: nn.Module) -> None:
    import onnxruntime as runtime

    program = torch.onnx.export(
        model, (images(3),), dynamo=True, dynamic_shapes=({0: Dim("batch", min=1, max=256)},), verbose=False
    )
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, 3, 64, 200):
        (found,) = session.run(None, {session.get_inputs()[0].name: images(batch).numpy()})
        np.testing.assert_allclose(found, model(images(batch)).detach().numpy(), rtol=1e-3, atol=1e-4)
