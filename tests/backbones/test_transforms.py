"""Transforms of `torch.func` and forward-mode derivatives of whole models: right for every backbone and method."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.method_cases import IMAGES, ROWS, move, row_name, specs, tiny_model
from mambapeft_kernels import backends
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from mambapeft_vision.backbones import create_backbone

FAMILIES = {
    "vim_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "mambareg_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "videomamba_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "arm_pico_patch8_32": {"depth": 2, "embed_dim": 32},
    "vmamba_pico_patch4_32": {},
    "ported_vit_pico_patch8_32": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}
# One preset for each kind of method; and the hybrids, which join them.
KINDS = list({tuple(sorted({spec["_target_"] for spec in specs(row).values()})): row for row in ROWS[::-1]}.values())
JOINED = [row for row in ROWS if len(row) > 2]


@pytest.fixture(autouse=True)
def no_warnings_of_the_definition() -> Iterator[None]:
    backends.announce_definition()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def family(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = create_backbone(name, "random", **FAMILIES[name]).double().eval()
    model.reset_classifier(4)
    nn.init.normal_(model.head.weight)
    return model


def with_parameters(model: nn.Module, names: list[str]) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """f(parameters, images) → a loss for each image, and the parameters."""
    values = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}

    def losses(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(model, parameters, (images,)).logsumexp(1)

    return losses, values


def check_transforms(model: nn.Module, names: list[str]) -> None:
    """Against plain backward passes: one gradient, those of each image, and a derivative along a line."""
    parameters = [p for name, p in model.named_parameters() if name in names]
    losses = model(IMAGES).logsumexp(1)
    each = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    expected = [[torch.zeros_like(p) if g is None else g for g, p in zip(one, parameters)] for one in each]

    f, values = with_parameters(model, names)
    along = {name: torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape) for name, v in values.items()}
    apart = vmap(grad(lambda p, image: f(p, image[None]).sum()), (None, 0))(values, IMAGES)
    for i, (name, found) in enumerate(apart.items()):
        torch.testing.assert_close(found, torch.stack([one[i] for one in expected]), rtol=1e-8, atol=1e-10, msg=name)
    _, slopes = jvp(lambda p: f(p, IMAGES), (values,), (along,))
    wanted = [sum((g * along[name]).sum() for g, name in zip(one, values)) for one in expected]
    torch.testing.assert_close(slopes, torch.stack(wanted), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_backbones(name: str) -> None:
    model = family(name)
    check_transforms(model, [n for n, _ in model.named_parameters()])
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(model(forward_ad.make_dual(IMAGES, torch.ones_like(IMAGES))))
    step = 1e-6
    with torch.no_grad():
        slope = (model(IMAGES + step) - model(IMAGES - step)) / (2 * step)
    torch.testing.assert_close(out.tangent, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_many_gradients_in_one_backward_pass(name: str) -> None:
    """`is_grads_batched`, as `torch.autograd.functional.jacobian(vectorize=True)` uses it."""
    model = family(name)
    parameters = [p for n, p in model.named_parameters() if n in ("patch_embed.proj.bias", "head.bias")]
    parameters.append(next(p for n, p in model.named_parameters() if n.endswith(("in_proj.weight", "qkv.weight"))))
    out = model(IMAGES)[0]
    together = torch.autograd.grad(out, parameters, torch.eye(4).double(), retain_graph=True, is_grads_batched=True)
    for k in range(4):
        alone = torch.autograd.grad(out[k], parameters, retain_graph=True)
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[k], theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("row", JOINED, ids=row_name)
def test_methods(row: tuple[str, ...]) -> None:
    model = move(tiny_model(row)).eval()
    trained = {id(p) for p in model.trained().values()}
    check_transforms(model, [name for name, p in model.named_parameters() if id(p) in trained])


@pytest.mark.parametrize("row", KINDS, ids=row_name)
def test_parameters_are_read_where_they_stand(row: tuple[str, ...]) -> None:
    """`functional_call`, offloading and parametrizations put other tensors in a parameter's place for a pass."""
    model = move(tiny_model(row)).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p.mul_(1 + 0.03 * (i % 5))
    values = {name: p.detach() for name, p in other.named_parameters()}
    torch.testing.assert_close(functional_call(model, values, (IMAGES,)), other(IMAGES), rtol=1e-10, atol=1e-12)


def test_the_slower_kernel_is_announced_once() -> None:
    backends.announce_definition.cache_clear()
    model = family("vim_pico_patch8_32")
    with pytest.warns(UserWarning, match=r"torch\.func.*kernel=naive") as told:
        for _ in range(2):
            vmap(lambda image: model(image[None])[0])(IMAGES)
    assert len([warning for warning in told if "kernel=naive" in str(warning.message)]) == 1
