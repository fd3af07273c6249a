"""LayerNorm, alone and after residual + drop path, against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers.kernel_cases import relative_error
from mambapeft_kernels import add_branch, add_layer_norm, layer_norm

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
DEVICES = [*CPU, pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]


def draw(*size, seed=3):
    """Values that bfloat16 holds exactly, so that every dtype starts from the same inputs."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).bfloat16().double()


def run(backend, device, dtype, shape, with_residual=True, with_scale=True, weights=None, with_sum=True):
    """normed, residual', and the gradients of hidden, weight, bias and (if there is one) residual."""
    wide = torch.promote_types(dtype, torch.float32)
    hidden = draw(*shape, seed=0).to(device, dtype).requires_grad_()
    residual = draw(*shape, seed=1).to(device, wide).requires_grad_() if with_residual else None
    weight, bias = (draw(shape[-1], seed=s).to(device, weights or dtype).requires_grad_() for s in (2, 3))
    scale = torch.where(torch.arange(shape[0], device=device) % 2 == 0, 1 / 0.9, 0.0) if with_scale else None
    outs = add_layer_norm(hidden, residual, weight, bias, 1e-5, scale, backend=backend)
    used = outs if with_sum else outs[:1]
    grads = [draw(*shape, seed=5 + i).to(device, o.dtype) for i, o in enumerate(used)]
    leaves = [t for t in (hidden, weight, bias, residual) if t is not None]
    return [*outs, *torch.autograd.grad(used, leaves, grads)]


@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 2, 24), (1, 1), (2, 3, 300)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_float32(device, shape, with_residual, with_scale, with_sum):
    options = with_residual, with_scale, None, with_sum
    expected = run("naive", device, torch.float64, shape, *options)
    for a, b in zip(run("triton", device, torch.float32, shape, *options), expected):
        assert relative_error(a, b) <= 1e-5 or b.norm() < 1e-9  # one channel: nothing but the bias


@pytest.mark.parametrize("shape", [(2, 3, 4, 96), (5, 1000)], ids=str)
@pytest.mark.parametrize("backend", ["naive", "triton"])
@pytest.mark.parametrize("device", DEVICES)
def test_alone_it_is_pytorchs(device, backend, shape):
    x = (draw(*shape) * 3 + 5).to(device).requires_grad_()
    weight, bias = (draw(shape[-1], seed=s).to(device).requires_grad_() for s in (1, 2))
    dout = draw(*shape, seed=4).to(device)
    expected = F.layer_norm(x, shape[-1:], weight, bias, 1e-5)
    wanted = torch.autograd.grad(expected, (x, weight, bias), dout)
    leaves = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    found = layer_norm(*leaves, 1e-5, backend=backend)
    assert relative_error(found, expected) <= 1e-5
    for a, b in zip(torch.autograd.grad(found, leaves, dout.float()), wanted):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("with_residual", [False, True])
def test_bfloat16_is_within_twice_plain_pytorch(with_residual):
    expected, plain, found = (
        run(backend, "cuda", dtype, (4, 14, 14, 384), with_residual)
        for backend, dtype in (("naive", torch.float64), ("naive", torch.bfloat16), ("triton", torch.bfloat16))
    )
    for a, b, c in zip(found, plain, expected):
        assert relative_error(a, c) <= 2 * max(relative_error(b, c), 1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_under_autocast(device):
    """bfloat16 branch, float32 residual and weights: normed is bfloat16, everything float32 stays so."""
    outs = run("triton", device, torch.bfloat16, (2, 4, 16), weights=torch.float32)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert [t.dtype for t in outs] == [bf16, fp32, bf16, fp32, fp32, fp32]


@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_rows_are_kept_without_their_mean(device):
    """For a frozen weight. The mean is 1,000 deviations here: the sum, rounded with it, would give wrong gradients."""
    hidden, weight, bias = (draw(*s).to(device) for s in ((4, 6, 32), (32,), (32,)))
    residual, dnormed = 1e3 + draw(4, 6, 32, seed=1).to(device), draw(4, 6, 32, seed=2).to(device)
    gradients, kept = [], []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "naive")):
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [t.to(d).requires_grad_() for t, d in ((hidden, dtype), (residual, wide))]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t):
            normed, total = add_layer_norm(*leaves, weight.to(wide), bias.to(wide), backend=backend)
        assert relative_error(total, hidden + residual) < 1e-6
        gradients.append(torch.autograd.grad(normed, leaves, dnormed.to(dtype)))
        if backend == "triton":
            assert kept == [(hidden.shape, torch.bfloat16), (weight.shape, torch.float32)]
    for found, expected in zip(*gradients):
        # Triton's interpreter cuts numbers off to bfloat16, where a GPU rounds them.
        assert relative_error(found, expected) < (1e-2 if device == "cpu" else 2e-3)


@pytest.mark.parametrize(
    ("dtype", "trained"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_a_shift_is_added_first(device, dtype, trained):
    """In inference, for frozen weights in bfloat16, and (then it is a sum of its own) for all others."""
    x, weight, bias, shift, grad = (
        draw(*s, seed=i).to(device, dtype) for i, s in enumerate(((3, 5, 32), (32,), (32,), (32,), (3, 5, 32)))
    )
    found, expected = [], []
    for out, kind, backend in ((found, dtype, "triton"), (expected, torch.float64, "naive")):
        wide = torch.promote_types(kind, torch.float32)
        leaf, vectors = x.to(kind).requires_grad_(), [t.to(wide) for t in (weight, bias, shift)]
        for vector in vectors:
            vector.requires_grad_(trained)
        normed = layer_norm(leaf, *vectors[:2], 1e-5, backend, vectors[2])
        with torch.no_grad():
            again = layer_norm(leaf, *vectors[:2], 1e-5, backend, vectors[2])
        leaves = [leaf, *(vectors if trained else ())]
        out += [normed, again, *torch.autograd.grad(normed, leaves, grad.to(kind))]
    bound = 1e-5 if dtype == torch.float32 else 2e-2 if device == "cpu" else 1e-2
    assert all(relative_error(a, b) < bound for a, b in zip(found, expected))


@pytest.mark.parametrize("backend", ["torch", "triton", "naive"])
@pytest.mark.parametrize("device", DEVICES)
def test_narrow_sums_are_rounded_once_they_are_normed(device, backend):
    hidden = draw(4, 6, 32).to(device, torch.float16)
    residual, weight, bias = (draw(*s, seed=i).to(device).float() for i, s in enumerate(((4, 6, 32), (32,), (32,)), 1))
    scale = torch.arange(4, device=device) / 2
    wide, narrow = (add_layer_norm(hidden, residual, weight, bias, 1e-5, scale, backend, n) for n in (False, True))
    assert torch.equal(wide[0], narrow[0]) and torch.equal(wide[1].half(), narrow[1])
    expected = add_layer_norm(hidden, narrow[1].float(), weight, bias, 1e-5, None, backend)
    found = add_layer_norm(hidden, narrow[1], weight, bias, 1e-5, None, backend, narrow=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1].half())
    sums = [add_branch(hidden, r, scale, torch.float16, backend) for r in (narrow[1], narrow[1].float())]
    assert torch.equal(*sums)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_in_bfloat16(device):
    """The rows that are kept have a history of their own: through it alone comes this derivative of a gradient."""
    found = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "naive")):
        hidden, dnormed = (draw(3, 4, 16, seed=s).to(device, dtype) for s in (0, 1))
        residual = draw(3, 4, 16, seed=2).to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
        ones = torch.ones(16, device=device, dtype=residual.dtype)
        normed, _ = add_layer_norm(hidden, residual, ones, 0 * ones, backend=backend)
        (first,) = torch.autograd.grad(normed, residual, dnormed, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), residual)[0])
    assert relative_error(*found) < 3e-2


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradient_asked_for(device, name):
    tensors = {"x": draw(3, 20), "weight": draw(20, seed=1), "bias": draw(20, seed=2)}
    tensors = {k: t.to(device).float() for k, t in tensors.items()}
    everything = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    layer_norm(*everything.values(), backend="triton").square().sum().backward()
    tensors[name].requires_grad_()
    layer_norm(*tensors.values(), backend="triton").square().sum().backward()
    assert torch.equal(tensors[name].grad, everything[name].grad)
    assert all(t.grad is None for k, t in tensors.items() if k != name)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_input_and_repeats(device):
    x, weight, bias = (torch.randn(*s, device=device) for s in ((2, 6, 20), (20,), (20,)))
    first = layer_norm(x, weight, bias, backend="triton")
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layer_norm(strided, weight, bias, backend="triton"), first)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_registered_op_is_consistent(device, keep):
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    add_layer_norm(hidden, None, weight, bias, backend="triton")  # registers the op
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    args = (
        hidden,
        hidden.detach().clone() if keep else None,
        weight,
        bias,
        1e-5,
        None,
        keep,
        keep,
        False,
        None if keep else bias.clone(),
    )
    torch.library.opcheck(torch.ops.mambapeft.add_layer_norm, args, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(4)}, r"expected at least \[B, D\]"),
        ({"weight": torch.ones(3)}, "weight has shape"),
        ({"bias": torch.ones(3)}, "bias has shape"),
        ({"residual": torch.ones(2, 3, 5)}, "residual has shape"),
        ({"branch_scale": torch.ones(3)}, "branch_scale has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    arguments = {"hidden": torch.ones(2, 3, 4), "residual": None, "weight": torch.ones(4), "bias": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**(arguments | change))


# The sum alone


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_sum_and_its_derivatives_are_the_definitions(device, dtype, with_scale):
    """Bit for bit, also the gradient of a gradient; ragged and more than one tile."""
    hidden = draw(3, 50, 47).to(device, torch.float16)
    residual, grad = draw(3, 50, 47, seed=1).to(device).float(), draw(3, 50, 47, seed=2).to(device, dtype)
    scale = torch.tensor([0, 1 / 0.9, 1], device=device) if with_scale else None
    found = []
    for backend in ("triton", "naive"):
        leaves = [t.clone().requires_grad_() for t in (hidden, residual)]
        out = add_branch(*leaves, scale, dtype, backend)
        first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        again = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=True)
        found.append([out, *first, *torch.autograd.grad([t.float().sum() for t in again], leaves)])
    assert all(a.dtype == b.dtype for a, b in zip(*found))
    (total, *gradients), (twice, *expected) = found
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))
    # The definition rounds scale · hidden before it adds, a GPU's multiply-add does not; float64 has this sum exactly.
    once = add_branch(hidden.double(), residual.double(), scale, torch.float32, "naive").to(dtype)
    assert torch.equal(total, twice) or torch.equal(total, once)


@pytest.mark.parametrize("device", DEVICES)
def test_registered_sum_is_consistent(device):
    hidden = torch.randn(2, 3, 8, device=device, dtype=torch.float16, requires_grad=True)
    args = (hidden, torch.randn(2, 3, 8, device=device), torch.ones(2, device=device), torch.float16)
    add_branch(*args, backend="triton")  # registers the op
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.mambapeft.add_branch, args, test_utils=tests)
