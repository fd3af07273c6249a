"""The two-dimensional scan against its definition in float64: output and every gradient, on every backend."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from helpers.kernel_cases import errors, relative_error
from mambapeft_kernels import SS2DWeights, layer_norm, prefix_states, ss2d, ss2d_norm

from mambapeft_vision.benchmarks.ss2d_cases import cast, make_map, make_weights, output_gradient, results

CPU = [
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param("numba", "cpu", id="numba"),
    pytest.param("triton", "cpu", id="triton-interpreter"),
]
GPU = [pytest.param(name, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu) for name in ("torch", "triton", "cuda")]
if torch.cuda.is_available():
    CPU = CPU[:2]  # with a GPU the Triton kernels are compiled, not interpreted
FUSED = CPU[2:] + GPU[1:]
FP32_BAR = 1e-5
LOOPED_POSITIONS = 256  # of a map, whose definition is evaluated step by step

# batch, height, width, channels, states, rank. The interpreter is slow: it gets sizes that cross every boundary once.
SMALL = [
    (2, 3, 2, 3, 2, 3),
    (1, 1, 1, 3, 1, 1),
    (1, 1, 3, 1, 17, 2),
    (1, 3, 3, 5, 1, 1),
    (1, 2, 1, 2, 3, 1),
    (1, 1, 2, 1, 16, 1),
]
LARGE = [
    (2, 56, 56, 192, 1, 6),
    (2, 28, 28, 384, 1, 12),
    (3, 14, 14, 768, 1, 24),
    (5, 7, 7, 1536, 1, 48),
    (2, 7, 7, 2048, 2, 64),
    (2, 13, 9, 96, 16, 6),
    (1, 9, 15, 70, 17, 5),
    (2, 5, 1, 16, 3, 1),
    (70, 2, 3, 33, 2, 3),
    (1, 112, 112, 64, 1, 4),
]


def worst(found: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.1e}" for k, v in sorted(found.items(), key=lambda kv: -kv[1])[:4])


def exact(u, weights):
    """The definition in float64; on large maps the vectorised form, which takes seconds instead of a minute."""
    return results(u, weights, torch.float64, "naive" if u.shape[1] * u.shape[2] <= LOOPED_POSITIONS else "torch")


def check_float32(backend, device, shape, **options):
    batch, height, width, channels, states, rank = shape
    weights = make_weights(channels, states, rank, device=device, **options)
    u = make_map(batch, height, width, channels, device)
    reference = exact(u, weights)
    found = errors(results(u, weights, torch.float32, backend), reference)
    assert all(v <= FP32_BAR for v in found.values()), worst(found)


def small_cases() -> Iterator[Any]:
    """The interpreter takes seconds for a shape: those that cross no boundary of their own are for exhaustive runs."""
    for case in CPU:
        for shape in SMALL:
            further = case.values[0] == "triton" and shape not in (SMALL[0], SMALL[2], SMALL[3])
            marks = [pytest.mark.exhaustive] if further else []
            yield pytest.param(*case.values, shape, id=f"{case.id}-{shape}", marks=marks)


@pytest.mark.parametrize(("backend", "device", "shape"), list(small_cases()))
def test_float32_small(backend, device, shape):
    check_float32(backend, device, shape)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(
    "shape", [(2, 7, 5, 16, 1, 2), (1, 12, 20, 24, 16, 2), (2, 9, 4, 10, 17, 3), (2, 4, 3, 70, 2, 3)], ids=str
)
def test_cpu_forms_in_float64(shape, backend):
    batch, height, width, channels, states, rank = shape
    weights, u = make_weights(channels, states, rank), make_map(batch, height, width, channels)
    found = errors(results(u, weights, torch.float64, backend), results(u, weights, torch.float64, "naive"))
    assert all(v <= 1e-13 for v in found.values()), worst(found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 28, 28, 48, 1, 12), (1, 40, 17, 20, 16, 3)], ids=str)
def test_the_vectorised_form_is_the_definition_on_large_maps(shape):
    """What `exact` takes there."""
    batch, height, width, channels, states, rank = shape
    weights, u = make_weights(channels, states, rank, device="cuda"), make_map(batch, height, width, channels, "cuda")
    found = errors(results(u, weights, torch.float64, "torch"), results(u, weights, torch.float64, "naive"))
    assert all(v <= 1e-12 for v in found.values()), worst(found)


def test_chunks_of_the_cpu_form_change_nothing(monkeypatch):
    from mambapeft_kernels.ss2d import vectorised

    weights, u = make_weights(6, 2, 3), make_map(2, 7, 5, 6)
    expected = results(u, weights, torch.float64, "torch")
    monkeypatch.setattr(vectorised, "CHUNK_ELEMENTS", 1)
    found = errors(results(u, weights, torch.float64, "torch"), expected)
    assert all(v <= 1e-14 for v in found.values()), worst(found)


@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
@pytest.mark.parametrize(("backend", "device"), GPU)
def test_float32_gpu(backend, device, shape):
    check_float32(backend, device, shape)


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
    check_float32(backend, device, (1, 2, 3, 3, 1, 2) if device == "cpu" else (2, 14, 14, 64, 2, 4), **options)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["fp32-weights", "bf16-weights"])
@pytest.mark.gpu
def test_bfloat16_is_within_twice_plain_pytorch(backend, shape, weight_dtype):
    batch, height, width, channels, states, rank = shape
    weights = make_weights(channels, states, rank, device="cuda")
    weights = SS2DWeights(*(t.bfloat16().double() for t in weights))
    u = make_map(batch, height, width, channels, "cuda").bfloat16()
    reference = exact(u, weights)
    plain = errors(results(u, weights, torch.bfloat16, "plain", weight_dtype), reference)
    found = errors(results(u, weights, torch.bfloat16, backend, weight_dtype), reference)
    ratios = {name: found[name] / max(plain[name], 1e-12) for name in found}
    assert all(v <= 2.0 for v in ratios.values()), worst(ratios)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 28, 28, 384, 1, 12), (8, 56, 56, 192, 1, 6), (8, 14, 14, 768, 1, 24)], ids=str)
def test_the_last_places_are_right_and_repeat(shape):
    """Blocks are full of samples, and the segments' chunks end behind the sequence: nothing may come from there."""
    from mambapeft_kernels.ss2d.cuda_kernels import Scans, pitch

    weights, u = make_weights(*shape[3:], device="cuda"), make_map(*shape[:4], "cuda").bfloat16()
    scans = Scans(u, u.new_empty(shape[0], shape[1] * shape[2], 4 * pitch(shape[5])), weights)
    assert scans.segments > 1 and scans.segments * scans.chunks * 8 > shape[1] * shape[2]
    reference = exact(u, weights)
    found, again = (results(u, weights, torch.bfloat16, "cuda", torch.float32) for _ in range(2))
    assert all(torch.equal(found[name], again[name]) for name in found)
    for name in ("out", "d u"):
        wrong, right = ((t.double() ** 2).mean((0, 3)) for t in (found[name] - reference[name], reference[name]))
        assert (wrong / right).sqrt().max() <= 0.02, name


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_sixteen_bit_inputs_with_float32_weights(backend, device):
    """As under autocast. Triton's interpreter truncates where a GPU rounds to bfloat16: hence the coarse bar here."""
    weights, u = make_weights(3, 2, 3, device=device), make_map(1, 2, 3, 3, device).bfloat16()
    reference = results(u, weights, torch.float64, "naive")
    value = results(u, weights, torch.bfloat16, backend, torch.float32)
    assert value["out"].dtype == value["d u"].dtype == torch.bfloat16
    assert value["d x_proj_weight"].dtype == torch.float32
    found = errors(value, reference)
    assert all(v <= 0.1 for v in found.values()), worst(found)


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_segments_change_nothing_but_rounding(backend, device, monkeypatch):
    """A sequence that is cut to fill the chip gives what one program gives; the last segment is mostly empty."""
    from mambapeft_kernels.ss2d import triton_kernels

    monkeypatch.setattr(triton_kernels, "WANTED_PROGRAMS", 1 << 30)
    monkeypatch.setattr(triton_kernels, "MIN_CHUNKS", 1)
    shape = (1, 3, 3, 3, 1, 2) if device == "cpu" else (2, 28, 29, 96, 2, 6)
    u = make_map(*shape[:4], device).float()
    segments, chunks = triton_kernels.split(shape[0], shape[1] * shape[2], shape[3], u)
    assert segments > 2
    assert chunks * segments >= -(-shape[1] * shape[2] // 16)
    check_float32(backend, device, shape)


def few(device: str) -> tuple[torch.Tensor, SS2DWeights]:
    """Very small inputs in float32, without gradients."""
    return make_map(1, 1, 3, 2, device).float(), cast(make_weights(2, 1, 2, device=device), torch.float32, grad=False)


@cache
def all_gradients(backend: str, device: str) -> dict[str, torch.Tensor]:
    return results(*few(device), torch.float32, backend)


@pytest.mark.parametrize("name", ["none", "u", *SS2DWeights._fields])
@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_only_the_gradient_asked_for(backend, device, name):
    """A single leaf gets the gradient that it gets when everything is a leaf; nothing else gets one."""
    u, weights = few(device)
    expected = all_gradients(backend, device)
    if name == "none":
        out = ss2d(u, weights, backend=backend)
        assert not out.requires_grad
        # Not bit for bit: what keeps nothing for a backward may be another kernel.
        assert relative_error(out, expected["out"]) <= 1e-6
        return
    leaf = u if name == "u" else getattr(weights, name)
    leaf.requires_grad_()
    out = ss2d(u, weights, backend=backend)
    out.backward(output_gradient(out))
    # On a GPU a kernel that leaves out a gradient is compiled apart, and may round what it shares in another way.
    assert relative_error(leaf.grad, expected[f"d {name}"]) <= (0 if device == "cpu" else 1e-6)
    assert all(t.grad is None for t in (u, *weights) if t is not leaf)


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
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_writes_every_element_and_repeats_bit_for_bit(backend, device, segments, poisoned, monkeypatch):
    from mambapeft_kernels.ss2d import triton_kernels

    if segments:
        monkeypatch.setattr(triton_kernels, "WANTED_PROGRAMS", 1 << 30)
        monkeypatch.setattr(triton_kernels, "MIN_CHUNKS", 1)
    shape = (1, 3, 2, 3, 2, 2) if device == "cpu" else (3, 13, 15, 100, 3, 6)
    weights, u = make_weights(*shape[3:], device=device), make_map(*shape[:4], device)
    first = results(u, weights, torch.float32, backend)
    assert all(t.isfinite().all() for t in first.values())
    if device == "cpu":
        return  # the interpreter runs one program after the other: it cannot but repeat itself
    again = results(u, weights, torch.float32, backend)
    assert all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_any_strides(backend, device):
    """A channel-first u, weights that are views, and an expanded output gradient give what contiguous ones give."""
    weights = cast(make_weights(3, 2, 2, device=device), torch.float32)
    u = make_map(1, 2, 3, 3, device).float()
    expected = ss2d(u, weights, backend=backend)
    wanted = torch.autograd.grad(expected.sum(), [*weights])
    strided = SS2DWeights(*(torch.repeat_interleave(t, 2, dim=-1)[..., ::2] for t in weights))
    channel_first = u.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    found = ss2d(channel_first, strided, backend=backend)
    assert relative_error(found, expected) <= 1e-6
    for a, b in zip(torch.autograd.grad(found.sum(), [*weights]), wanted):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3)], ids=["no-sample", "no-place"])
@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_empty(backend, device, shape):
    u = torch.randn(*shape, 8, device=device, requires_grad=True)
    out = ss2d(u, cast(make_weights(8, 1, 2, device=device), torch.float32), backend=backend)
    assert out.shape == u.shape
    out.sum().backward()
    assert u.grad.shape == u.shape


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_gradcheck_of_the_cpu_paths(backend):
    weights, u = make_weights(3, 2, 2), make_map(1, 2, 3, 3)

    def run(u, *flat):
        return ss2d(u, SS2DWeights(*flat), backend=backend)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (u, *weights)])


@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_initial_states_stand_for_tokens_in_front(backend, device):
    """The outputs at the map's places with tokens before each direction's sequence, and the tokens' gradient."""
    weights = make_weights(3, 2, 2, optional=False, device=device)
    u, tokens = make_map(2, 2, 2, 3, device), make_map(1, 4, 3, 3, device, seed=5)[0]

    def with_states(u, tokens, weights, backend):
        weights = weights._replace(initial_states=prefix_states(tokens, weights))
        return ss2d(u, weights, backend=backend)

    def with_tokens(u, tokens, weights):
        """The definition, on sequences with the tokens in front."""
        from mambapeft_kernels.ss2d import naive

        y = torch.zeros_like(u).flatten(1, 2)
        for k, order in enumerate(naive.reading_orders(2, 2, u.device)):
            sequence = torch.cat([tokens[k].expand(2, -1, -1), u.flatten(1, 2)[:, order]], dim=1)
            y = y.index_add(1, order, naive.scan(sequence, k, weights)[0][:, 3:])
        return y.view_as(u)

    leaves = [u.requires_grad_(), tokens.requires_grad_()]
    expected = with_tokens(u, tokens, weights)
    wanted = torch.autograd.grad(expected, leaves, output_gradient(expected))
    leaves = [t.detach().float().requires_grad_() for t in leaves]
    found = with_states(*leaves, cast(weights, torch.float32, grad=False), backend)
    assert relative_error(found, expected) <= FP32_BAR
    for a, b in zip(torch.autograd.grad(found, leaves, output_gradient(found)), wanted):
        assert relative_error(a, b) <= FP32_BAR


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_registered_ops_are_consistent(backend, device):
    """Schema, fake kernels and autograd registration, by torch's own checker."""
    weights = cast(make_weights(2, 1, 2, device=device), torch.float32)
    u = make_map(1, 1, 2, 2, device).float().requires_grad_()
    for save in (False, True):
        torch.library.opcheck(
            torch.ops.mambapeft.ss2d,
            (u, *weights, backend, save),
            test_utils=("test_schema", "test_faketensor") + (("test_autograd_registration",) if save else ()),
        )
    plain = [t.detach() for t in (u, *weights)]
    _, proj, ckpt = torch.ops.mambapeft.ss2d(*plain, backend, True)
    need = [i % 2 == 0 for i in range(len(plain))]
    args = (plain[0].clone(), *plain, proj, ckpt, backend, need)
    torch.library.opcheck(torch.ops.mambapeft.ss2d_backward, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_torch_compile_keeps_the_op_whole(backend, device):
    weights = cast(make_weights(2, 1, 2, device=device), torch.float32)
    u = make_map(1, 1, 2, 2, device).float().requires_grad_()

    def run(u):
        return ss2d(u, weights, backend=backend).square().sum()

    expected = torch.autograd.grad(run(u), u)[0]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(u), u)[0], expected)
    torch.compiler.reset()


# Maps [B, H, W, E] of VMamba-S and -T at small batches: sequences of a multiple of 8 places, cut into segments whose
# chunks do not add up to them, and (the last two) that do, or that are not cut.
CUT = [(16, 28, 28, 384), (32, 28, 28, 192), (32, 56, 56, 192), (3, 16, 8, 96), (16, 56, 56, 192), (64, 28, 28, 384)]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled")
@pytest.mark.parametrize("shape", CUT, ids=str)
def test_scans_end_with_the_sequence(shape, poisoned):
    """Places at both ends of every direction are as exact as all others, and twenty runs have the same bits."""
    channels = shape[-1]
    weights = cast(make_weights(channels, 1, channels // 32 * 2, False, device="cuda"), torch.float32, grad=False)
    x, grad = (make_map(*shape, "cuda", seed).bfloat16() for seed in (1, 2))

    def run(x, grad, weights, backend, train):
        u = x.detach().requires_grad_(train)
        with torch.set_grad_enabled(train):
            out = ss2d(u, weights, backend=backend)
        return [out.detach(), *(torch.autograd.grad(out, u, grad) if train else ())]

    for train in (False, True):
        first = run(x, grad, weights, "cuda", train)
        assert all(torch.equal(a, b) for _ in range(20) for a, b in zip(run(x, grad, weights, "cuda", train), first))
    wide = weights.each(torch.Tensor.double)
    for found, right in zip(first, run(x[:1].double(), grad[:1].double(), wide, "torch", True)):
        found = found[:1].flatten(1, 2).double()
        right = right.flatten(1, 2)
        for places in (slice(None), slice(0, 1), slice(-1, None)):
            assert relative_error(found[:, places], right[:, places]) < 2e-2


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.gpu
def test_cuda_graph(backend):
    weights = cast(make_weights(64, 1, 2, device="cuda"), torch.float32)
    u = make_map(2, 9, 7, 64, "cuda").bfloat16().requires_grad_()
    leaves = [u, weights.A_logs, weights.x_proj_weight]

    def step():
        return torch.autograd.grad(ss2d(u, weights, backend=backend).sum(), leaves)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        u.copy_(make_map(2, 9, 7, 64, "cuda", seed=7))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.parametrize(("backend", "device"), CPU + GPU)
def test_training_steps_match_the_definition(backend, device):
    losses = {name: _train(name, device) for name in (backend, "naive")}
    for a, b in zip(losses[backend], losses["naive"]):
        assert math.isclose(a, b, rel_tol=1e-5)
    assert losses["naive"][-1] < 0.8 * losses["naive"][0]


def _train(backend: str, device: str) -> list[float]:
    """One scan with all weights trained on a fixed regression task."""
    shape, steps = ((1, 2, 2, 2), 4) if device == "cpu" else ((4, 7, 5, 64), 30)
    u = make_map(*shape, device).float()
    target = make_map(*shape, device, seed=9).float().mean((1, 2))
    weights = cast(make_weights(shape[-1], 2, 2, device=device), torch.float32)
    optimizer = torch.optim.SGD([*weights], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (ss2d(u, weights, backend=backend).mean((1, 2)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(2, 4, 8)}, r"u must be \[B, H, W, E\]"),
        ({"x_proj_weight": torch.ones(4, 5, 8)}, "x_proj_weight has shape"),
        ({"dt_projs_weight": torch.ones(4, 8)}, "expected A_logs"),
        ({"dt_projs_bias": torch.ones(32)}, "dt_projs_bias has shape"),
        ({"A_logs": torch.ones(8, 1)}, "A_logs has shape"),
        ({"Ds": torch.ones(8)}, "Ds has shape"),
        ({"initial_states": torch.ones(8, 1)}, "initial_states has shape"),
        ({"state_offset": torch.ones(4, 1, 8)}, "state_offset has shape"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    weights = cast(make_weights(8, 1, 2, optional=False), torch.float32)
    u = change.pop("u", torch.ones(2, 3, 4, 8))
    with pytest.raises(ValueError, match=message):
        ss2d(u, weights._replace(**change))


def test_what_has_no_such_op_is_refused(monkeypatch):
    from mambapeft_kernels.ss2d import api

    monkeypatch.setattr(api, "backend_for", lambda *_: "mamba_ssm")
    with pytest.raises(ValueError, match="no two-dimensional scan"):
        ss2d(torch.ones(1, 2, 2, 8), cast(make_weights(8, 1, 2), torch.float32), backend="mamba_ssm")
    with pytest.raises(ValueError, match=r"tokens must be \[4, n, 8\]"):
        prefix_states(torch.ones(3, 2, 8), make_weights(8, 1, 2))


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_the_norm_adds_up_what_the_scans_leave_apart(backend, device, save):
    """Rounded once less than by the two ops; with every gradient."""
    channels = 64 if device == "cuda" else 4
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    grad = torch.linspace(-1, 2, 6 * channels, dtype=torch.float64, device=device).view(1, 2, 3, channels)

    def run(function, dtype, backend):
        wide = torch.promote_types(dtype, torch.float32)
        u = make_map(1, 2, 3, channels, device).to(dtype).requires_grad_(save)
        weights = cast(make_weights(channels, 1, 2, device=device), wide, grad=save)
        norm = [torch.linspace(*ends, channels, dtype=wide, device=device) for ends in ((0.5, 2), (-1, 1))]
        norm = [t.requires_grad_(save) for t in norm]
        out = function(u, weights, *norm, 1e-5, backend)
        return [out, *(torch.autograd.grad(out, [u, *weights, *norm], grad.to(dtype)) if save else ())]

    def two_ops(u, weights, norm_weight, norm_bias, eps, backend):
        return layer_norm(ss2d(u, weights, backend), norm_weight, norm_bias, eps, backend)

    expected, apart = run(ss2d_norm, torch.float64, "naive"), run(two_ops, dtype, backend)
    found, again = run(ss2d_norm, dtype, backend), run(ss2d_norm, dtype, backend)
    assert all(map(torch.equal, found, again)) and found[0].dtype == dtype
    for one, other, right in zip(found, apart, expected):
        assert relative_error(one, right) < (FP32_BAR if dtype == torch.float32 else 1.2 * relative_error(other, right))


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(("backend", "device"), FUSED)
def test_the_op_with_the_norm_is_consistent(backend, device, save):
    weights = cast(make_weights(4, 1, 2, device=device), torch.float32, grad=save)
    u, norm = make_map(1, 1, 2, 4, device).float().requires_grad_(save), torch.ones(4, device=device)
    tests = ("test_schema", "test_faketensor") + (("test_autograd_registration",) if save else ())
    args = (u, *weights, norm, norm.clone(), 1e-5, backend, save)
    torch.library.opcheck(torch.ops.mambapeft.ss2d_norm, args, test_utils=tests)

    def curvature(name):
        def loss(x):
            return ss2d_norm(x, weights, norm, norm, 1e-5, name).exp().sum()

        return torch.autograd.functional.hvp(loss, u.detach(), torch.ones_like(u))[1]

    assert relative_error(curvature(backend), curvature("naive")) < 1e-4
