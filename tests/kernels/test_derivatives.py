"""Derivatives of gradients: every op gives those of its definition in plain PyTorch, or says that it cannot."""

from collections.abc import Callable

import pytest
import torch
from mambapeft_kernels import (
    Direction,
    SS2DWeights,
    add_layer_norm,
    add_rms_norm,
    depthwise_conv_silu,
    layer_norm,
    selective_scan,
    ss2d,
    ssm_mixer,
)
from mambapeft_kernels.derivatives import first_order_only
from mambapeft_kernels.low_rank.linear import LowRankFactors, add_low_rank, low_rank_linear
from mambapeft_kernels.selective_scan import naive as naive_scan
from torch import Tensor

BATCH, LENGTH, CHANNELS, STATES, RANK = 2, 5, 4, 3, 2
# Where the fused kernels run here, in float32.
FUSED = [
    pytest.param("triton", "cpu", id="triton-interpreter"),
    *(pytest.param(name, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu) for name in ("triton", "cuda")),
]
if torch.cuda.is_available():
    FUSED = FUSED[1:]  # with a GPU the Triton kernels are compiled, not interpreted


def draw(*shape: int) -> Tensor:
    return (0.5 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def second_derivatives(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of a function of the gradients that mixes all of them, the gradients."""
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
    first = torch.autograd.grad((out * weight).square().sum(), inputs, create_graph=True)
    total = sum((g * torch.linspace(0.3, 1, g.numel()).to(g).view(g.shape)).square().sum() for g in first)
    return list(torch.autograd.grad(total, inputs))


def narrowed(inputs: list[Tensor], device: str) -> list[Tensor]:
    return [t.detach().float().to(device).requires_grad_() for t in inputs]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0, "a case that proves nothing"
        mine = mine.to(theirs)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def direction_inputs() -> list[Tensor]:
    shapes = ((CHANNELS, 3), (CHANNELS,), (RANK + 2 * STATES, CHANNELS), (CHANNELS, RANK), (CHANNELS,))
    offsets = ((CHANNELS, STATES), (CHANNELS,), (CHANNELS, STATES), (CHANNELS,))
    return [draw(*shape) for shape in (*shapes, *offsets)]


def mixer(backend: str) -> Callable[..., Tensor]:
    def run(xz: Tensor, *flat: Tensor) -> Tensor:
        directions = Direction(*flat[:9], reverse=False), Direction(*flat[9:], reverse=True)
        return ssm_mixer(xz, directions, 0.5, backend)

    return run


@pytest.mark.parametrize("related", [False, True])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_mixer_on_a_cpu(backend: str, related: bool) -> None:
    """related: inputs that are computed from each other, whose shared history must not be counted twice."""
    torch.manual_seed(0)
    inputs = [draw(BATCH, LENGTH, 2 * CHANNELS), *direction_inputs(), *direction_inputs()]

    def run(backend: str) -> Callable[..., Tensor]:
        def with_relations(xz: Tensor, *flat: Tensor) -> Tensor:
            changed = list(flat)
            changed[2] = flat[2] * (1 + xz.mean())
            changed[11] = flat[11] + changed[2]
            return mixer(backend)(xz * flat[1].sum(), *changed)

        return with_relations if related else mixer(backend)

    assert_same(second_derivatives(run(backend), inputs), second_derivatives(run("naive"), inputs), 1e-9)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_the_fused_mixer(backend: str, device: str) -> None:
    torch.manual_seed(0)
    inputs = [draw(BATCH, LENGTH, 2 * CHANNELS), *direction_inputs(), *direction_inputs()]
    found = second_derivatives(mixer(backend), narrowed(inputs, device))
    assert_same(found, second_derivatives(mixer("naive"), inputs), 2e-4)


def test_the_scan_alone() -> None:
    torch.manual_seed(0)
    u, delta = draw(BATCH, LENGTH, CHANNELS), draw(BATCH, LENGTH, CHANNELS)
    A, D, offset = draw(CHANNELS, STATES), draw(CHANNELS), draw(CHANNELS, STATES)
    B, C, output = draw(BATCH, LENGTH, STATES), draw(BATCH, LENGTH, STATES), draw(CHANNELS)
    inputs = [u, delta, A, B, C, D, offset, output]

    def definition(u, delta, A, B, C, D, offset, output):
        return naive_scan.selective_scan(u, delta, A, B, C, D, False, offset, output)

    torch.testing.assert_close(selective_scan(*inputs), definition(*inputs), rtol=1e-12, atol=1e-12)
    assert_same(
        list(torch.autograd.grad(selective_scan(*inputs).square().sum(), inputs)),
        list(torch.autograd.grad(definition(*inputs).square().sum(), inputs)),
        1e-10,
    )
    assert_same(second_derivatives(selective_scan, inputs), second_derivatives(definition, inputs), 1e-9)


@pytest.mark.parametrize("rows", [None, slice(1, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_branches(rows: slice | None, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, offset = draw(BATCH, LENGTH, 6), draw(CHANNELS, 6), draw(CHANNELS)
    features = CHANNELS if rows is None else 2
    down, up = draw(RANK, 6), draw(features, RANK)
    inputs = [x, weight, down, up, *([offset] if bias else [])]

    def fused(x, weight, down, up, *bias):
        branch = LowRankFactors(down, up, 0.3, 0.0, rows)
        out = low_rank_linear(x, weight, bias[0] if bias else None, [branch])
        return add_low_rank(out.sin(), x, [branch])

    def plain(x, weight, down, up, *bias):
        def branches() -> Tensor:
            start, stop, _ = (rows or slice(None)).indices(CHANNELS)
            return torch.nn.functional.pad(0.3 * x @ down.T @ up.T, (start, CHANNELS - stop))

        out = x @ weight.T + branches() + (bias[0] if bias else 0)
        return out.sin() + branches()

    assert_same(second_derivatives(fused, inputs), second_derivatives(plain, inputs), 1e-9)


def test_low_rank_branches_with_the_dropout_that_was_drawn() -> None:
    x, weight, down, up = draw(BATCH, LENGTH, 6), draw(CHANNELS, 6), draw(8, 6), draw(CHANNELS, 8)

    def run(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        torch.manual_seed(3)
        return low_rank_linear(x, weight, None, [LowRankFactors(down, up, 0.3, 0.5, None)]).sin()

    assert torch.autograd.gradgradcheck(run, (x, weight, down, up))


def ss2d_inputs() -> list[Tensor]:
    shapes = ((4, RANK + 2 * STATES, CHANNELS), (4, CHANNELS, RANK), (4, CHANNELS), (4 * CHANNELS, STATES))
    more = ((4 * CHANNELS,), (4, CHANNELS, STATES), (4, CHANNELS, STATES))
    return [draw(BATCH, 2, 3, CHANNELS), *(draw(*shape) for shape in (*shapes, *more))]


def scan_of_a_map(backend: str) -> Callable[..., Tensor]:
    return lambda u, *weights: ss2d(u, SS2DWeights(*weights), backend)


def test_the_scan_of_a_map_on_a_cpu() -> None:
    torch.manual_seed(0)
    inputs = ss2d_inputs()
    expected = second_derivatives(scan_of_a_map("naive"), inputs)
    for backend in ("torch", "numba"):
        assert_same(second_derivatives(scan_of_a_map(backend), inputs), expected, 1e-9)


@pytest.mark.parametrize(("backend", "device"), FUSED[:2])
def test_the_fused_scan_of_a_map(backend: str, device: str) -> None:
    torch.manual_seed(0)
    inputs = ss2d_inputs()
    found = second_derivatives(scan_of_a_map(backend), narrowed(inputs, device))
    assert_same(found, second_derivatives(scan_of_a_map("naive"), inputs), 2e-4)


def rms(h: Tensor, r: Tensor, w: Tensor, b: Tensor, scale: Tensor, backend: str) -> Tensor:
    return torch.cat(add_rms_norm(h, r, w, 1e-5, scale, backend=backend)) * b.sum()


def layer(h: Tensor, r: Tensor, w: Tensor, b: Tensor, scale: Tensor, backend: str) -> Tensor:
    return torch.cat(add_layer_norm(h, r, w, b, 1e-5, scale, backend=backend))


def layer_of_strided(h: Tensor, r: Tensor, w: Tensor, b: Tensor, scale: Tensor, backend: str) -> Tensor:
    strided = (h * r).mT.contiguous().mT
    return layer_norm(strided, w, b, 1e-5, backend=backend)


def convolution(h: Tensor, r: Tensor, w: Tensor, b: Tensor, scale: Tensor, backend: str) -> Tensor:
    filters = torch.outer(w, torch.linspace(-1, 1, 9).to(w)).view(-1, 1, 3, 3)
    return depthwise_conv_silu((h * r)[:, :, None], filters, b, backend)


@pytest.mark.parametrize("run", [rms, layer, layer_of_strided, convolution])
@pytest.mark.parametrize(("backend", "device"), FUSED[:2])
def test_norms_and_convolution(backend: str, device: str, run: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    inputs = [draw(BATCH, LENGTH, 16), draw(BATCH, LENGTH, 16), draw(16), draw(16)]
    scale = torch.tensor([0.0, 2.0], dtype=torch.float64)
    expected = second_derivatives(lambda *t: run(*t, scale, "naive"), inputs)
    narrow = scale.float().to(device)
    found = second_derivatives(lambda *t: run(*t, narrow, backend), narrowed(inputs, device))
    assert_same(found, expected, 5e-4)


def test_rms_norm_in_the_loops_of_numba() -> None:
    torch.manual_seed(0)
    inputs = [draw(BATCH, LENGTH, 16), draw(BATCH, LENGTH, 16), draw(16), draw(16)]
    scale = torch.tensor([0.0, 2.0], dtype=torch.float64)
    expected = second_derivatives(lambda *t: rms(*t, scale, "naive"), inputs)
    assert_same(second_derivatives(lambda *t: rms(*t, scale, "numba"), inputs), expected, 1e-10)


def test_published_kernels_say_that_they_cannot() -> None:
    x = draw(3)
    out = first_order_only(x * x, "choose kernel=torch")
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    torch.testing.assert_close(first, 2 * x)
    with pytest.raises(RuntimeError, match=r"second derivatives.*kernel=torch"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("run", [mixer("torch"), mixer("numba"), scan_of_a_map("torch"), scan_of_a_map("numba")])
def test_a_backward_pass_within_autocast(run: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    if run.__qualname__.startswith("mixer"):
        inputs = [draw(BATCH, LENGTH, 2 * CHANNELS), *direction_inputs(), *direction_inputs()]
    else:
        inputs = ss2d_inputs()
    inputs = narrowed(inputs, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out = run(*inputs).sum()
        inside = torch.autograd.grad(out, inputs, retain_graph=True)
    for mine, theirs in zip(inside, torch.autograd.grad(out, inputs), strict=True):
        assert torch.equal(mine, theirs)
