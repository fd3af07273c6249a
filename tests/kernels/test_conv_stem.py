"""Convolution + LayerNorm + GELU of a stem against its definition in float64."""

import pytest
import torch
from helpers.kernel_cases import relative_error
from mambapeft_kernels import conv_norm_gelu

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
DEVICES = [*CPU, pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
# Images [B, I, H, W], channels, side of the filters, stride, padding, whether there is a bias.
CASES = [((2, 3, 9, 12), 12, 3, 2, 1, True), ((1, 3, 8, 7), 48, 3, 2, 1, False), ((1, 4, 9, 9), 20, 2, 3, 0, True)]


def inputs(images, channels, side, with_bias, dtype, device):
    generator = torch.Generator().manual_seed(0)
    shapes = (channels, images[1], side, side), (channels,), (channels,), (channels,)
    x, weight, bias, norm_weight, norm_bias = (torch.randn(*s, generator=generator) for s in (images, *shapes))
    tensors = x, weight / 4, bias if with_bias else None, norm_weight, norm_bias
    rounded = [None if t is None else t.to(dtype).to(device) for t in tensors]
    return rounded[0], [None if t is None else t.float() for t in rounded[1:]]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_against_the_definition(device, case):
    images, channels, side, stride, padding, with_bias = case
    # Triton's interpreter cuts numbers off to bfloat16, where a GPU rounds them.
    dtype, bound = (torch.float16, 4e-4) if device == "cpu" else (torch.bfloat16, 2.5e-3)
    x, weights = inputs(images, channels, side, with_bias, dtype, device)
    found = conv_norm_gelu(x, *weights, stride, padding, 1e-5, "triton")
    wide = [None if t is None else t.double() for t in weights]
    expected = conv_norm_gelu(x.double(), *wide, stride, padding, 1e-5, "naive")
    assert found.dtype == dtype and found.is_contiguous() and relative_error(found, expected) < bound
    assert torch.equal(found, conv_norm_gelu(x, *weights, stride, padding, 1e-5, "triton"))


@pytest.mark.gpu
def test_the_stem_of_vmamba_on_a_gpu():
    x, weights = inputs((64, 3, 224, 224), 48, 3, True, torch.bfloat16, "cuda")
    found = conv_norm_gelu(x, *weights, 2, 1, 1e-5, "cuda")
    expected = conv_norm_gelu(x.double(), *(t.double() for t in weights), 2, 1, 1e-5, "naive")
    assert relative_error(found, expected) < 2.5e-3


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_and_float32_come_from_the_definition(device):
    x, (weight, *rest) = inputs((1, 3, 5, 5), 8, 3, True, torch.float16, device)

    def run(x, weight, backend):
        return conv_norm_gelu(x, weight, *rest, 2, 1, backend=backend)

    assert torch.equal(run(x.float(), weight, "triton"), run(x.float(), weight, "naive"))
    weight.requires_grad_()
    out = run(x, weight, "triton")
    assert torch.equal(out, run(x, weight, "naive"))
    (slope,) = torch.autograd.grad(out.sum(), weight)
    assert slope.abs().sum() > 0
    with torch.no_grad():
        assert relative_error(run(x, weight, "triton"), out) < 1e-3


def test_shapes_that_do_not_fit():
    x, (weight, *rest) = inputs((1, 3, 5, 5), 8, 3, True, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"images \[B, I, H, W\] and weight"):
        conv_norm_gelu(x[:, :2], weight, *rest, 2, 1)
    with pytest.raises(ValueError, match=r"norm_bias has shape \(7,\), expected \[8\]"):
        conv_norm_gelu(x, weight, *rest[:2], rest[2][:7], 2, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_registered_op_is_consistent(device):
    x, weights = inputs((1, 3, 5, 6), 8, 3, True, torch.float16, device)
    conv_norm_gelu(x, *weights, 2, 1, backend="triton")  # registers the op
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mambapeft.conv_norm_gelu, (x, *weights, 2, 1, 1e-5), test_utils=tests)
