"""Residual + drop path + RMSNorm against its definition in float64."""

import pytest
import torch
from helpers.kernel_cases import relative_error
from mambapeft_kernels import add_rms_norm

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
GPU = [pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
DEVICES = CPU + GPU
FUSED = [pytest.param("triton", *d.values, id=d.id, marks=d.marks) for d in DEVICES]
FUSED.append(pytest.param("numba", "cpu", id="numba"))


def run(backend, device, dtype, shape, with_residual, with_scale, weights=None):
    """normed, residual', and the gradients of hidden, weight and (if there is one) residual."""
    gen = torch.Generator().manual_seed(3)
    batch, length, width = shape
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*size):
        # Values that bfloat16 holds exactly, so that every dtype starts from the same inputs.
        return torch.randn(*size, generator=gen, dtype=torch.float64).bfloat16().to(device)

    hidden = draw(batch, length, width).to(dtype).requires_grad_()
    residual = draw(batch, length, width).to(wide).requires_grad_() if with_residual else None
    weight = draw(width).to(weights or dtype).requires_grad_()
    scale = torch.where(torch.arange(batch, device=device) % 2 == 0, 1 / 0.9, 0.0) if with_scale else None
    outs = add_rms_norm(hidden, residual, weight, 1e-5, scale, backend=backend)
    grads = [draw(batch, length, width).to(o.dtype) for o in outs]
    leaves = [t for t in (hidden, weight, residual) if t is not None]
    return [*outs, *torch.autograd.grad(outs, leaves, grads)]


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 1, 1), (2, 3, 300)], ids=str)
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_float32(backend, device, shape, with_residual, with_scale):
    expected = run("naive", device, torch.float64, shape, with_residual, with_scale)
    found = run(backend, device, torch.float32, shape, with_residual, with_scale)
    for a, b in zip(found, expected):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("with_residual", [False, True])
def test_bfloat16_is_within_twice_plain_pytorch(with_residual):
    expected = run("naive", "cuda", torch.float64, (4, 197, 384), with_residual, True)
    plain = run("naive", "cuda", torch.bfloat16, (4, 197, 384), with_residual, True)
    found = run("triton", "cuda", torch.bfloat16, (4, 197, 384), with_residual, True)
    for a, b, c in zip(found, plain, expected):
        assert relative_error(a, c) <= 2 * relative_error(b, c)


def test_numba_in_float64():
    shape = (2, 3, 70)
    expected = run("naive", "cpu", torch.float64, shape, True, True)
    for a, b in zip(run("numba", "cpu", torch.float64, shape, True, True), expected):
        assert relative_error(a, b) <= 1e-13


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_dtypes_under_autocast(backend, device):
    """bfloat16 branch, float32 residual and weight: normed is bfloat16, everything float32 stays so."""
    outs = run(backend, device, torch.bfloat16, (2, 4, 16), True, True, weights=torch.float32)
    wanted = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert [t.dtype for t in outs] == wanted


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_the_gradient_of_a_branch_scale_is_that_of_the_definition(backend, device):
    hidden, weight = torch.randn(3, 2, 8, device=device), torch.rand(8, device=device)

    def gradient(backend):
        scale = torch.tensor([0.5, 1.0, 2.0], device=device).requires_grad_()
        normed, total = add_rms_norm(hidden, None, weight, 1e-5, scale, backend=backend)
        return torch.autograd.grad((normed * hidden).sum() + total.sum(), scale)[0]

    torch.testing.assert_close(gradient(backend), gradient("naive"))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_hidden_and_repeats(device):
    hidden = torch.randn(2, 6, 20, device=device)
    weight, residual = torch.randn(20, device=device), torch.randn(2, 6, 20, device=device)
    first = add_rms_norm(hidden, residual, weight, backend="triton")
    strided = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    again = add_rms_norm(strided, residual, weight, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("device", DEVICES)
def test_registered_op_is_consistent(device):
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device)
    add_rms_norm(hidden, None, weight, backend="triton")  # registers the op
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.mambapeft.add_rms_norm, (hidden, hidden.detach(), weight, 1e-5, None), test_utils=tests
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(2, 4)}, r"hidden must be \[B, L, D\]"),
        ({"weight": torch.ones(3)}, "weight has shape"),
        ({"residual": torch.ones(2, 3, 5)}, "residual has shape"),
        ({"branch_scale": torch.ones(3)}, "branch_scale has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    arguments = {"hidden": torch.ones(2, 3, 4), "residual": None, "weight": torch.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments)
