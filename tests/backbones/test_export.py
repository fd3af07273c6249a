"""Exported programs: right for every batch, also one that was not traced."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mambapeft_kernels import SS2DWeights, ss2d
from torch import Tensor, nn
from torch.export import Dim

from mambapeft_vision import adapt
from mambapeft_vision.backbones import create_backbone
from mambapeft_vision.methods.lora import LoRA


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


def test_onnx_of_a_trainable_vmamba_is_right() -> None:
    """Its loops are written out; outputs that are added by index came out wrong, and nobody said so."""
    import onnxruntime as runtime

    torch.manual_seed(0)
    vmamba: Any = create_backbone("vmamba_pico_patch4_32", "random", dims=8, depths=(1,), img_size=16).eval()
    vmamba.set_kernel("torch", "cpu")
    inputs = torch.randn(2, 3, 16, 16)
    program = torch.onnx.export(vmamba, (inputs,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(found, vmamba(inputs).detach().numpy(), rtol=1e-4, atol=1e-5)


def gradients(function: Callable[[Tensor], Tensor], model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by the names of a model's parameters."""
    model.zero_grad()
    function(inputs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Scans(nn.Module):
    """VMamba's scans of a map of 3x2, with offset and initial states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = [(4, 4, 5), (4, 5, 2), (4, 5), (20, 1), (20,), (4, 5, 1), (4, 5, 1)]
        self.weights = nn.ParameterList(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def forward(self, u: Tensor) -> Tensor:
        return ss2d(u, SS2DWeights(*self.weights), "torch")


def test_a_compiled_program_of_vmambas_scans_has_the_gradients() -> None:
    """Indexing gives other strides than the compiler believes."""
    torch._dynamo.reset()
    scans, u = Scans(), torch.randn(2, 3, 2, 5, dtype=torch.float64)
    expected = gradients(scans, scans, u)
    assert len(expected) == 7
    program = torch.compile(scans, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(program, scans, u), expected)


def adapted(name: str, **sizes: Any) -> nn.Module:
    """A model in float64 with branches in activation space, two of them on one map."""
    torch.manual_seed(0)
    methods = {"one": LoRA(targets="in_proj", rank=2), "two": LoRA(targets="in_proj", rank=1)}
    model = adapt(create_backbone(name, "random", **sizes), methods, 3).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vim_pico_patch8_32", {"depth": 1, "embed_dim": 16, "img_size": 16}),
        ("vmamba_vanilla_tiny", {"dims": 8, "depths": (1,), "d_state": 1, "img_size": 16}),
    ],
    ids=["vim", "vmamba"],
)
def test_an_exported_program_of_an_unmerged_lora_trains(name: str, sizes: dict[str, Any]) -> None:
    model, inputs = adapted(name, **sizes), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = gradients(model, model, inputs)
    program = torch.export.export(model, (inputs,)).module()
    torch.testing.assert_close(program(inputs), model(inputs), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(program, program, inputs), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.exhaustive  # 10 s each
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vim_pico_patch8_32", {"depth": 1, "embed_dim": 16, "img_size": 16}),
        ("vmamba_pico_patch4_32", {}),
        ("vmamba_vanilla_tiny", {"dims": 8, "depths": (1, 1), "d_state": 2, "img_size": 32}),
    ],
    ids=["vim", "vmamba", "vanilla"],
)
def test_a_compiled_training_step_is_the_same(name: str, sizes: dict[str, Any]) -> None:
    torch._dynamo.reset()
    side = sizes.get("img_size", 32)
    model, inputs = adapted(name, **sizes), torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = gradients(model, model, inputs)
    found = gradients(torch.compile(model, backend="aot_eager"), model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
