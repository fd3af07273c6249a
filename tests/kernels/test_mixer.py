"""The mixer core against its definition in float64: forward and every gradient, on every backend that runs here."""

import ctypes
import math
from functools import cache

import pytest
import torch
from helpers.kernel_cases import (
    FIELDS,
    cast,
    errors,
    make_directions,
    make_xz,
    plain_mixer,
    relative_error,
    results,
)
from mambapeft_kernels import Direction, ssm_mixer

CPU = [
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param("numba", "cpu", id="numba-cpu"),
    pytest.param("triton", "cpu", id="triton-interpreter"),
]
GPU = [pytest.param(name, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu) for name in ("torch", "triton", "cuda")]
if torch.cuda.is_available():
    CPU = CPU[:2]  # with a GPU the Triton kernels are compiled, not interpreted
FUSED = CPU[2:] + GPU[1:]
FP32_BAR = 1e-5

# batch, length, channels, states, rank. The interpreter is slow: it gets sizes that cross every boundary once.
SMALL = [(2, 11, 12, 16, 3), (1, 1, 5, 17, 1), (1, 17, 34, 5, 2)]
LARGE = [
    (2, 197, 768, 16, 24),
    (5, 1, 64, 16, 2),
    (3, 17, 65, 16, 5),
    (2, 65, 192, 22, 12),
    (1, 203, 384, 32, 12),
    (2, 730, 96, 16, 6),
    (2, 33, 70, 5, 2),
    (1, 9, 1536, 19, 48),
    (70, 8, 77, 17, 3),
    (1024, 3, 64, 16, 2),
]


def worst(found: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.1e}" for k, v in sorted(found.items(), key=lambda kv: -kv[1])[:4])


def check_fp32(backend, device, shape, **options):
    batch, length, channels, states, rank = shape
    directions = make_directions(channels, states, rank, device=device, **options)
    xz = make_xz(batch, length, channels, device)
    reference = results(xz, directions, torch.float64, "naive")
    found = errors(results(xz, directions, torch.float32, backend), reference)
    assert all(v <= FP32_BAR for v in found.values()), worst(found)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize(("backend", "device"), CPU)
def test_float32_small(backend, device, shape):
    check_fp32(backend, device, shape)


@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
@pytest.mark.parametrize(("backend", "device"), GPU)
def test_float32_gpu(backend, device, shape):
    check_fp32(backend, device, shape)


@pytest.mark.parametrize(
    "options",
    [
        {"decay": -14.0},  # A near 0: the state forgets nothing
        {"step": 25.0},  # Δ about 25: beyond softplus' linear branch, the state forgets everything
        {"step": -30.0},  # Δ about e^-30: the state hardly moves
        {"decay": -14.0, "step": 3.0},  # a long sum of large inputs
    ],
    ids=["long-decay", "large-step", "zero-step", "long-sum"],
)
@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_extreme_inputs(backend, device, options):
    shape = (2, 10, 8, 3, 2) if device == "cpu" else (2, 197, 64, 16, 4)
    check_fp32(backend, device, shape, **options)


@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_zero_step_is_exact(backend, device):
    """Δ underflows to zero: the state stays zero, the output is the gated skip, and no gradient is NaN."""
    directions = make_directions(6, 3, 2, offsets=False, step=-150.0, device=device)
    xz = make_xz(1, 10, 6, device)
    found = results(xz, directions, torch.float32, backend)
    assert all(t.isfinite().all() for t in found.values())
    reference = results(xz, directions, torch.float64, "naive")
    assert errors(found, reference)["out"] <= FP32_BAR
    assert not found["d A_log[0]"].any()


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize(("backend", "device"), GPU)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32-weights", "bf16-weights"])
def test_bfloat16_is_within_twice_plain_pytorch(backend, device, shape, weights):
    batch, length, channels, states, rank = shape
    directions = [
        Direction(*(t.bfloat16().double() if isinstance(t, torch.Tensor) else t for t in d))
        for d in make_directions(channels, states, rank, device=device)
    ]
    xz = make_xz(batch, length, channels, device).bfloat16()
    reference = results(xz, directions, torch.float64, "naive")
    plain = errors(results(xz, directions, torch.bfloat16, "plain", weights), reference)
    found = errors(results(xz, directions, torch.bfloat16, backend, weights), reference)
    ratios = {name: found[name] / max(plain[name], 1e-12) for name in found}
    assert all(v <= 2.0 for v in ratios.values()), worst(ratios)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled")
@pytest.mark.parametrize("shape", [*(s for s in LARGE if s[2] % 64 == 0 and s[3] == 16), (3, 17, 128, 16, 4)], ids=str)
@pytest.mark.parametrize("chosen", [slice(0, 2), slice(0, 1), slice(1, 2)], ids=["both", "forwards", "backwards"])
def test_frozen_weights(shape, chosen, poisoned):
    """Where only x and z need gradients, `cuda` has another kernel for the scans, on the tensor cores."""
    batch, length, channels, states, rank = shape
    exact = [
        Direction(*(t.bfloat16().double() if isinstance(t, torch.Tensor) else t for t in d))
        for d in make_directions(channels, states, rank, offsets=False, device="cuda")[chosen]
    ]
    xz = make_xz(batch, length, channels, "cuda").bfloat16()
    dout = torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(2)).cuda().bfloat16()

    def gradient(dtype, backend):
        leaf = xz.to(dtype).requires_grad_()
        directions = cast(exact, dtype, grad=False)
        plain = backend == "plain"
        out = plain_mixer(*leaf.chunk(2, dim=-1), directions) if plain else ssm_mixer(leaf, directions, backend=backend)
        return torch.autograd.grad(out, leaf, dout.to(dtype))[0]

    reference = gradient(torch.float64, "naive")
    plain, found, again = (gradient(torch.bfloat16, backend) for backend in ("plain", "cuda", "cuda"))
    assert torch.equal(found, again)
    for half in (slice(channels), slice(channels, None)):
        bar = 2 * relative_error(plain[..., half], reference[..., half])
        assert relative_error(found[..., half], reference[..., half]) <= bar


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_sixteen_bit_inputs_with_float32_weights(backend, device):
    """As under autocast. Triton's interpreter truncates where a GPU rounds to bfloat16: hence the coarse bar here."""
    directions = make_directions(12, 4, 3, device=device)
    xz = make_xz(2, 9, 12, device).bfloat16()
    reference = results(xz, directions, torch.float64, "naive")
    value = results(xz, directions, torch.bfloat16, backend, torch.float32)
    assert value["out"].dtype == torch.bfloat16
    assert value["d x_proj[0]"].dtype == torch.float32
    found = errors(value, reference)
    assert all(v <= 0.1 for v in found.values()), worst(found)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_direction_layouts(backend, device, groups):
    """One direction, or two that read the same way."""
    directions = [d._replace(reverse=groups == 1) for d in make_directions(10, 4, 2, groups=groups, device=device)]
    xz = make_xz(2, 19, 10, device)
    reference = results(xz, directions, torch.float64, "naive")
    found = errors(results(xz, directions, torch.float32, backend), reference)
    assert all(v <= FP32_BAR for v in found.values()), worst(found)


@pytest.mark.parametrize("reverse", [False, True], ids=["until", "from"])
@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_one_direction_on_a_part_of_the_tokens(backend, device, reverse):
    """As affix tokens between those of the image need them; xz is a view of a longer tensor's rows."""
    directions = cast([make_directions(16, 4, 2, device=device)[reverse]], torch.float32)
    weights = directions[0][:-1]
    long = make_xz(2, 19, 16, device).float().requires_grad_()
    rows = slice(11, None) if reverse else slice(0, 12)
    part = long[:, rows].detach().contiguous().requires_grad_()
    expected, found = (ssm_mixer(t, directions, backend=backend) for t in (part, long[:, rows]))
    dout = torch.zeros_like(expected)
    dout[:, 0 if reverse else -1] = 1.0
    wanted = torch.autograd.grad(expected, [part, *weights], dout)
    dlong, *gradients = torch.autograd.grad(found, [long, *weights], dout)
    # Not bit for bit: other strides are other kernels, which may round a product and sum once or twice.
    for a, b in zip((found, dlong[:, rows], *gradients), (expected, *wanted)):
        assert b.any() and relative_error(a, b) <= 1e-6


def few(device: str) -> tuple[torch.Tensor, list[Direction]]:
    """Very small inputs in float32, without gradients."""
    directions = cast(make_directions(9, 3, 2, device=device), torch.float32, grad=False)
    return make_xz(1, 9, 9, device).float(), directions


@cache
def all_gradients(backend: str, device: str) -> dict[str, torch.Tensor]:
    return results(*few(device), torch.float32, backend)


@pytest.mark.parametrize("name", ["none", "xz", *FIELDS])
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_only_the_gradient_asked_for(backend, device, name):
    """A single leaf gets the gradient that it gets when everything is a leaf; nothing else gets one."""
    xz, directions = few(device)
    expected = all_gradients(backend, device)
    if name == "none":
        out = ssm_mixer(xz, directions, backend=backend)
        assert not out.requires_grad
        # Not bit for bit: what keeps nothing for a backward may be another kernel.
        assert relative_error(out, expected["out"]) <= 1e-6
        return
    leaf = xz if name == "xz" else getattr(directions[1], name)
    leaf.requires_grad_()
    out = ssm_mixer(xz, directions, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    out.backward(dout.float())
    assert torch.equal(leaf.grad, expected["d xz" if name == "xz" else f"d {name}[1]"])
    others = [t for d in directions for t in d[:-1] if t is not leaf]
    assert all(t.grad is None for t in others)


@pytest.mark.parametrize("half", [0, 1], ids=["x", "z"])
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_gradient_of_one_half(backend, device, half):
    xz, directions = few(device)
    halves = [t.clone() for t in xz.chunk(2, -1)]
    expected = all_gradients(backend, device)
    halves[half].requires_grad_()
    out = ssm_mixer(halves[0], directions, backend=backend, z=halves[1])
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    out.backward(dout.float())
    assert torch.equal(halves[half].grad, expected["d xz"].chunk(2, -1)[half])
    assert halves[1 - half].grad is None


@pytest.mark.parametrize(("backend", "device"), CPU + GPU[1:])
def test_a_separate_gate_is_the_same_as_the_second_half(backend, device):
    """Values and gradients; with `z` the second half of xz takes no part."""
    directions = cast(make_directions(8, 3, 2, device=device), torch.float32, grad=False)
    xz = make_xz(1, 9, 8, device).float()
    expected = results(xz, directions, torch.float32, backend)
    x, z = (half.clone().requires_grad_() for half in xz.chunk(2, -1))
    out = ssm_mixer(x, directions, backend=backend, z=z)
    assert relative_error(out, expected["out"]) <= 1e-6
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    gradients = torch.autograd.grad(out, (x, z), dout.float())
    assert relative_error(torch.cat(gradients, dim=-1), expected["d xz"]) <= 1e-6
    assert not ssm_mixer(x.detach(), directions, backend=backend, z=z.detach()).requires_grad


@pytest.fixture
def poisoned():
    """Every uninitialised tensor that torch hands out is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled")
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_writes_every_element_and_repeats_bit_for_bit(backend, device, poisoned):
    shape = (1, 10, 10, 3, 2) if device == "cpu" else (3, 29, 100, 18, 6)
    directions = make_directions(shape[2], shape[3], shape[4], device=device)
    xz = make_xz(*shape[:3], device)
    first = results(xz, directions, torch.float32, backend)
    assert all(t.isfinite().all() for t in first.values())
    if device == "cpu":
        return  # the interpreter runs one program after the other: it cannot but repeat itself
    again = results(xz, directions, torch.float32, backend)
    assert all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_any_strides(backend, device):
    """x transposed, z every other channel, and an expanded output gradient give what contiguous ones give."""
    directions = cast(make_directions(8, 4, 2, device=device), torch.float32)
    base = make_xz(2, 9, 8, device).float()
    x, z = (t.contiguous() for t in base.chunk(2, -1))
    expected = ssm_mixer(x, directions, backend=backend, z=z)
    weights = [t for d in directions for t in d[:-1]]
    wanted = torch.autograd.grad(expected.sum(), weights)
    strided_x = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided_z = torch.repeat_interleave(z, 2, dim=-1)[..., ::2]
    found = ssm_mixer(strided_x, directions, backend=backend, z=strided_z)
    # Not bit for bit: other strides are other kernels, which may round a product and sum once or twice.
    assert relative_error(found, expected) <= 1e-6
    for a, b in zip(torch.autograd.grad(found.sum(), weights), wanted):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no-sample", "no-token"])
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_empty(backend, device, shape):
    x = torch.randn(*shape, 8, device=device, requires_grad=True)
    out = ssm_mixer(x, cast(make_directions(8, 3, 2, device=device), torch.float32), backend=backend, z=x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_gradcheck_of_the_cpu_path():
    directions = make_directions(4, 3, 2)
    leaves = [t for d in directions for t in d[:-1]]
    xz = make_xz(2, 6, 4)

    def run(xz, *flat):
        count = len(FIELDS)
        parts = [Direction(*flat[i * count : (i + 1) * count], reverse=bool(i)) for i in range(2)]
        return ssm_mixer(xz, parts, backend="torch")

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (xz, *leaves)])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_recomputing_the_scan_inputs_changes_nothing(backend, device, recompute, monkeypatch):
    from mambapeft_kernels.ssm_mixer import fused

    directions, xz = make_directions(9, 3, 2, device=device), make_xz(1, 9, 9, device)
    expected = results(xz, directions, torch.float32, backend)
    monkeypatch.setattr(fused, "KEEP_BYTES", 0 if recompute else 1 << 40)
    found = results(xz, directions, torch.float32, backend)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(("backend", "device"), [p for p in GPU if p.values[0] == "cuda"])
@pytest.mark.parametrize("shape", [(2, 17, 64, 16, 4), (1, 25, 70, 19, 2)], ids=str)
def test_indices_of_64_bits_change_nothing(backend, device, shape, monkeypatch):
    from mambapeft_kernels import nvrtc

    batch, length, channels, states, rank = shape
    directions, xz = make_directions(channels, states, rank, device=device), make_xz(batch, length, channels, device)
    expected = results(xz, directions, torch.bfloat16, backend, torch.float32)
    monkeypatch.setattr(nvrtc, "index_type", lambda *_: ("i64", ctypes.c_longlong))
    found = results(xz, directions, torch.bfloat16, backend, torch.float32)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_registered_ops_are_consistent(backend, device):
    """Schema, fake kernels and autograd registration, by torch's own checker."""
    directions = cast(make_directions(8, 3, 2, offsets=False, device=device), torch.float32)
    xz = make_xz(1, 5, 8, device).float()
    x, z = (t.contiguous() for t in xz.chunk(2, -1))
    tensors = [t for d in directions for t in d[:-1] if t is not None]
    present = [t is not None for d in directions for t in d[:-1]]
    plain = [t.detach() for t in tensors]
    need = [i % 2 == 0 for i in range(len(plain))]
    for inputs in ((xz, None), (x, z)):
        leaves = [t if t is None else t.clone().requires_grad_() for t in inputs]
        for save in (False, True):
            torch.library.opcheck(
                torch.ops.mambapeft.mixer_forward,
                (*leaves, tensors, present, [False, True], 0.5, backend, save),
                test_utils=("test_schema", "test_faketensor") + (("test_autograd_registration",) if save else ()),
            )
        _, *kept = torch.ops.mambapeft.mixer_forward(*inputs, plain, present, [False, True], 0.5, backend, True)
        needs = True, inputs[1] is not None, need
        args = (x.clone(), *inputs, *kept, plain, present, [False, True], 0.5, backend, *needs)
        torch.library.opcheck(torch.ops.mambapeft.mixer_backward, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_torch_compile_keeps_the_op_whole(backend, device):
    directions = cast(make_directions(8, 3, 2, device=device), torch.float32)
    xz = make_xz(1, 9, 8, device).float().requires_grad_()

    def run(xz):
        return ssm_mixer(xz, directions, backend=backend).square().sum()

    expected = torch.autograd.grad(run(xz), xz)[0]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(xz), xz)[0], expected)
    torch.compiler.reset()


@pytest.mark.parametrize(("backend", "device"), [p for p in GPU if p.values[0] != "torch"])
def test_cuda_graph(backend, device):
    directions = cast(make_directions(64, 16, 2, device=device), torch.float32)
    xz = make_xz(2, 33, 64, device).bfloat16().requires_grad_()
    leaves = [xz, directions[0].A_log, directions[1].x_proj]

    def step():
        return torch.autograd.grad(ssm_mixer(xz, directions, backend=backend).sum(), leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        xz.copy_(make_xz(2, 33, 64, device, seed=7))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_training_steps_match_the_definition(backend, device):
    steps = 10 if (backend, device) == ("triton", "cpu") else 30  # the interpreter takes a third of a second for each
    losses = {name: _train(name, device, steps) for name in (backend, "naive")}
    for a, b in zip(losses[backend], losses["naive"]):
        assert math.isclose(a, b, rel_tol=1e-5)
    assert losses["naive"][-1] < 0.8 * losses["naive"][0]


def _train(backend: str, device: str, steps: int) -> list[float]:
    """Residual mixers and a linear head on a fixed regression task, all weights trained."""
    batch, length, width, channels, depth = (1, 6, 4, 6, 1) if device == "cpu" else (4, 33, 32, 64, 2)
    gen = torch.Generator().manual_seed(5)
    tokens = torch.randn(batch, length, width, generator=gen).to(device)
    target = torch.randn(batch, 3, generator=gen).to(device)
    groups = 1 if device == "cpu" else 2
    blocks = []
    for i in range(depth):
        into = torch.randn(2 * channels, width, generator=gen) / width**0.5
        back = torch.randn(width, channels, generator=gen) / channels**0.5
        directions = cast(make_directions(channels, 4, 2, groups, offsets=False, device=device, seed=i), torch.float32)
        blocks.append((into.to(device).requires_grad_(), back.to(device).requires_grad_(), directions))
    head = (torch.randn(3, width, generator=gen) / width**0.5).to(device).requires_grad_()
    weights = [head] + [t for a, b, ds in blocks for t in (a, b, *(w for d in ds for w in d[:-1] if w is not None))]
    optimizer = torch.optim.SGD(weights, lr=0.02)
    losses = []
    for _ in range(steps):
        h = tokens
        for into, back, directions in blocks:
            h = h + ssm_mixer(h @ into.T, directions, backend=backend) @ back.T
        loss = (h.mean(1) @ head.T - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
