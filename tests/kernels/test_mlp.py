"""The frozen MLP against its definition in float64."""

import pytest
import torch
from helpers.kernel_cases import relative_error
from mambapeft_kernels import frozen_mlp

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
DEVICES = [*CPU, pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
SHAPES = (3, 7, 40, 72), (2, 65, 64, 130)  # B, L, D, H: no multiple of a tile, and D that is one


def draw(*size, seed):
    """Values that bfloat16 holds exactly, so that every dtype starts from the same inputs."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).bfloat16().double()


def inputs(shape, device, dtype):
    batch, length, width, hidden = shape
    sizes = (hidden, width), (hidden,), (width, hidden), (width,)
    weights = [draw(*size, seed=i).to(device, dtype) for i, size in enumerate(sizes)]
    x, dy = (draw(batch, length, width, seed=s).to(device, dtype) for s in (5, 6))
    return x.requires_grad_(), [w / 8 if w.ndim == 2 else w for w in weights], dy


def run(backend, shape, device, dtype):
    """y and the gradient of x."""
    x, weights, dy = inputs(shape, device, dtype)
    y = frozen_mlp(x, *weights, backend=backend)
    return y, *torch.autograd.grad(y, x, dy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_within_twice_plain_pytorch(device, shape):
    expected = run("naive", shape, device, torch.float64)
    plain, found = (run(backend, shape, device, torch.bfloat16) for backend in ("naive", "triton"))
    for a, b, c in zip(found, plain, expected):
        assert relative_error(a, c) <= 2 * relative_error(b, c)


@pytest.mark.parametrize("device", DEVICES)
def test_float32(device):
    expected = run("naive", SHAPES[0], device, torch.float64)
    for a, b in zip(run("triton", SHAPES[0], device, torch.float32), expected):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_and_its_slope_far_out(device):
    """One feature each way, from -9 to 9: the hidden value, and the slope there."""
    h = torch.linspace(-9, 9, 401, dtype=torch.float64, device=device).bfloat16().double()
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    zero = torch.zeros(1, dtype=torch.bfloat16, device=device)
    x = h.bfloat16()[:, None].requires_grad_()
    found = frozen_mlp(x, one, zero, one, zero, backend="triton")
    slope = torch.autograd.grad(found.sum(), x)[0]
    exact = h.clone().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    wanted = torch.autograd.grad(expected.sum(), exact)[0]
    rounding = 2**-8 if device == "cuda" else 2**-7  # the interpreter cuts off the bits that bfloat16 lacks
    for a, b in ((found[:, 0], expected), (slope[:, 0], wanted)):
        assert ((a.double() - b).abs() <= rounding * b.abs() + 1e-6).all()


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_are_equal_and_the_hidden_layer_is_not_kept(device):
    x, weights, dy = inputs(SHAPES[0], device, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_mlp(x, *weights, backend="triton")
    assert sum(t.numel() for t in kept) == x.numel() + sum(w.numel() for w in weights)
    gradients = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients) and torch.equal(frozen_mlp(x, *weights, backend="triton"), y)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives(device):
    x, weights, dy = inputs(SHAPES[0], device, torch.bfloat16)
    second = []
    for dtype, backend in ((torch.float64, "naive"), (torch.bfloat16, "triton")):
        leaf = x.detach().to(dtype).requires_grad_()
        y = frozen_mlp(leaf, *(w.to(dtype) for w in weights), backend=backend)
        (first,) = torch.autograd.grad(y, leaf, dy.to(dtype), create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    assert relative_error(second[1], second[0]) <= 2e-2


@pytest.mark.parametrize("device", DEVICES)
def test_registered_op_is_consistent(device):
    x, weights, _ = inputs(SHAPES[0], device, torch.bfloat16)
    frozen_mlp(x, *weights, backend="triton")  # registers the op
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.mambapeft.frozen_mlp, (x, *weights), test_utils=tests)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda w: w[:, 1:], "up has shape"),
        (1, lambda w: w[1:], "up_bias has shape"),
        (2, lambda w: w.requires_grad_(), "down requires a gradient"),
        (3, lambda w: w[1:], "down_bias has shape"),
    ],
)
def test_wrong_arguments(index, change, message):
    x, weights, _ = inputs(SHAPES[0], "cpu", torch.float32)
    weights[index] = change(weights[index])
    with pytest.raises(ValueError, match=message):
        frozen_mlp(x, *weights, backend="naive")
