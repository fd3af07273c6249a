"""GELU against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_cases import relative_error
from mambapeft_kernels.gelu import gelu, gelu_of_frozen_linear

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
DEVICES = [*CPU, pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16]


def value_and_slope(x: torch.Tensor, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """backend: None for PyTorch's own op."""
    leaf = x.clone().requires_grad_()
    out = F.gelu(leaf) if backend is None else gelu(leaf, backend)
    return out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_input_from_minus_to_plus_twenty(device, dtype):
    """Of all numbers of 16 bits: the formula's error stays below that of rounding a result near one."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.abs() <= 20].to(device)
    half_a_bit = torch.finfo(dtype).eps / 2
    for found, expected in zip(value_and_slope(x, "triton"), value_and_slope(x.double(), None)):
        # Triton's interpreter cuts numbers off to bfloat16, where a GPU rounds them.
        rounding = half_a_bit * (2 if device == "cpu" and dtype == torch.bfloat16 else 1)
        error = (found.double() - expected).abs()
        assert found.dtype == dtype and (error <= 1.01 * rounding * expected.abs() + 2e-6).all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite(device):
    x = torch.tensor([float("inf"), float("nan"), 6e4, -6e4], device=device, dtype=torch.bfloat16)
    found = gelu(x, "triton")
    assert found[0] == float("inf") and found[1].isnan() and found[2] == x[2] and found[3] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_and_gradients(device):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 700, 5, generator=generator).to(device, torch.float16)
    x, grad = (t.transpose(1, 2) for t in (wide, wide.roll(1, 0)))
    leaves = [x.detach().requires_grad_(), x.contiguous().requires_grad_()]
    outs = [gelu(leaf, "triton") for leaf in leaves]
    assert torch.equal(*outs)
    first, second = (torch.autograd.grad(out, leaf, grad)[0] for out, leaf in zip(outs, leaves))
    assert torch.equal(first, second) and relative_error(first, value_and_slope(x.double(), None)[1] * grad) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_all_else_is_pytorchs_op(device, monkeypatch):
    from mambapeft_kernels.gelu import triton_kernels as triton

    monkeypatch.setattr(triton, "_forward", None)
    for x in (torch.randn(5, device=device), torch.ones(0, 3, device=device, dtype=torch.bfloat16)):
        assert torch.equal(gelu(x, "triton"), F.gelu(x))


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives(device):
    x = torch.linspace(-3, 3, 7, device=device, dtype=torch.float16).requires_grad_()
    wanted = x.detach().double().requires_grad_()
    for leaf, function in ((x, lambda t: gelu(t, "triton")), (wanted, F.gelu)):
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        slope.sum().backward()
    assert relative_error(x.grad, wanted.grad) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
def test_registered_op_is_consistent(device):
    x = torch.randn(4, 6, device=device, dtype=torch.float16, requires_grad=True)
    gelu(x, "triton")  # registers the op
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.mambapeft.gelu, (x,), test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
def test_behind_a_frozen_map_the_input_is_kept_and_the_gradient_is_the_same(device):
    """On a GPU the product applies GELU, to what is not rounded: its error is the smaller one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (30, 40, 16), (64, 16), (64,), (30, 40, 64)
    x, weight, bias, grad = (torch.randn(*s, generator=generator).to(device, torch.float16) for s in shapes)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = gelu_of_frozen_linear(x, weight, bias, "triton")
    assert kept == [x.shape, weight.shape, bias.shape]
    expected = gelu(F.linear(x, weight, bias), "triton")
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert torch.equal(found, expected) or relative_error(found, exact) < relative_error(expected, exact)
    assert torch.equal(found, gelu_of_frozen_linear(x, weight, bias, "triton"))
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (found, expected)))


def test_second_derivatives_behind_a_frozen_map():
    x, weight = (torch.linspace(-1, 1, n, dtype=torch.float64).view(-1, 4) for n in (8, 12))
    bias, leaves = weight.sum(1), [x.clone().requires_grad_() for _ in range(2)]
    outs = gelu_of_frozen_linear(leaves[0], weight, bias), F.gelu(F.linear(leaves[1], weight, bias))
    for out, leaf in zip(outs, leaves):
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-12, atol=1e-12)
