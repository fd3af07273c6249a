"""Depthwise convolution + SiLU against its definition in float64."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.kernel_cases import relative_error
from mambapeft_kernels import depthwise_conv_silu

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
DEVICES = [*CPU, pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
# The kernels in CUDA C++ take an even number of channels, and leave gradients of filters to Triton.
BACKENDS = [
    pytest.param("triton", device.values[0], id=f"triton-{device.id}", marks=device.marks) for device in DEVICES
]
BACKENDS += [pytest.param("cuda", "cuda", id="cuda-gpu", marks=pytest.mark.gpu)]
SHAPES = [(2, 3, 4, 5), (1, 1, 1, 3), (1, 7, 5, 9), (1, 7, 5, 10)]


def run(backend, device, dtype, shape, with_bias=True, weights=None):
    """The output and the gradients of x, weight and (if there is one) bias."""
    gen = torch.Generator().manual_seed(3)

    def draw(*size):
        # Values that bfloat16 holds exactly, so that every dtype starts from the same inputs.
        return torch.randn(*size, generator=gen, dtype=torch.float64).bfloat16().to(device)

    x = draw(*shape).to(dtype).requires_grad_()
    weight = (draw(shape[-1], 1, 3, 3) / 2).to(weights or dtype).requires_grad_()
    bias = draw(shape[-1]).to(weights or dtype).requires_grad_() if with_bias else None
    out = depthwise_conv_silu(x, weight, bias, backend=backend)
    leaves = [t for t in (x, weight, bias) if t is not None]
    return [out, *torch.autograd.grad(out, leaves, draw(*shape).to(out.dtype))]


def cases() -> Iterator[Any]:
    """The interpreter takes a second for a shape of several blocks, and odd or even is all the same to Triton."""
    for case, shape, with_bias in itertools.product(BACKENDS, SHAPES, (False, True)):
        further = case.values[1] == "cpu" and (shape == SHAPES[3] or with_bias == (shape == SHAPES[1]))
        marks = [*case.marks, *([pytest.mark.exhaustive] if further else [])]
        yield pytest.param(*case.values, shape, with_bias, id=f"{case.id}-{shape}-{with_bias}", marks=marks)


@pytest.mark.parametrize(("backend", "device", "shape", "with_bias"), list(cases()))
def test_float32(backend, device, shape, with_bias):
    expected = run("naive", device, torch.float64, shape, with_bias)
    for a, b in zip(run(backend, device, torch.float32, shape, with_bias), expected):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(4, 56, 56, 192), (3, 7, 7, 1536), (2, 13, 15, 70), (3, 2, 1, 66)], ids=str)
def test_bfloat16_is_within_twice_plain_pytorch(shape, backend):
    """x, its gradient and the output are rounded once by the definition, and the gradient twice by the kernel."""
    expected, plain, found = (
        run(name, "cuda", dtype, shape)
        for name, dtype in (("naive", torch.float64), ("naive", torch.bfloat16), (backend, torch.bfloat16))
    )
    for a, b, c in zip(found, plain, expected):
        assert relative_error(a, c) <= 2 * relative_error(b, c)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 56, 56, 192), (3, 7, 7, 1536), (2, 13, 15, 70), (3, 2, 1, 66), (1, 1, 1, 2)], ids=str
)
def test_behind_frozen_filters_the_gradient_is_rounded_once(shape, dtype):
    """One kernel in CUDA C++ makes it, whose blocks leave rows and channels over at these shapes' edges."""
    generator = torch.Generator().manual_seed(5)
    x, grad, weight, bias = (
        torch.randn(*size, generator=generator).bfloat16().to("cuda")
        for size in (shape, shape, (shape[-1], 1, 3, 3), shape[-1:])
    )

    def gradient(dtype, backend):
        wide = torch.promote_types(dtype, torch.float32)
        leaf = x.to(dtype).requires_grad_()
        out = depthwise_conv_silu(leaf, weight.to(wide) / 2, bias.to(wide), backend)
        return torch.autograd.grad(out, leaf, grad.to(dtype))[0]

    found, again = gradient(dtype, "cuda"), gradient(dtype, "cuda")
    expected, bound = gradient(torch.float64, "naive"), 1e-5
    if dtype == torch.bfloat16:  # what float32 got wrong by δ lies, rounded, within 2δ of the best rounding's error
        bound = relative_error(expected.to(dtype), expected) + 2 * bound
    assert torch.equal(found, again) and relative_error(found, expected) < bound


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_under_autocast(device):
    found = run("triton", device, torch.bfloat16, (2, 3, 3, 8), weights=torch.float32)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradient_asked_for(device, name):
    tensors = {"x": torch.randn(1, 3, 4, 5), "weight": torch.randn(5, 1, 3, 3), "bias": torch.randn(5)}
    tensors = {k: t.to(device) for k, t in tensors.items()}
    everything = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    depthwise_conv_silu(*everything.values(), backend="triton").square().sum().backward()
    tensors[name].requires_grad_()
    depthwise_conv_silu(*tensors.values(), backend="triton").square().sum().backward()
    assert torch.equal(tensors[name].grad, everything[name].grad)
    assert all(t.grad is None for k, t in tensors.items() if k != name)


@pytest.mark.parametrize("device", DEVICES)
def test_a_channel_first_map_gives_the_same(device):
    x, weight = torch.randn(2, 3, 4, 5, device=device), torch.randn(5, 1, 3, 3, device=device)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    first, second = (depthwise_conv_silu(t, weight, backend="triton") for t in (x, strided))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_registered_ops_are_consistent(backend, device):
    x = torch.randn(1, 2, 3, 4, device=device, requires_grad=True)
    weight, bias = torch.randn(4, 1, 3, 3, device=device), torch.randn(4, device=device)
    depthwise_conv_silu(x, weight, bias, backend=backend)  # registers the ops
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.mambapeft.depthwise_conv_silu, (x, weight, bias, backend), test_utils=tests)
    x = x.detach()
    for need in ((True, True), (True, False), (False, True)):
        args = (x.clone(), x, weight, bias, backend, *need)
        torch.library.opcheck(torch.ops.mambapeft.depthwise_conv_silu_backward, args, test_utils=tests[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, 3)}, r"x must be \[B, H, W, E\]"),
        ({"weight": torch.ones(3, 3, 3)}, "weight has shape"),
        ({"bias": torch.ones(3)}, "bias has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    arguments = {"x": torch.ones(2, 3, 3, 4), "weight": torch.ones(4, 1, 3, 3), "bias": None}
    with pytest.raises(ValueError, match=message):
        depthwise_conv_silu(**(arguments | change))
