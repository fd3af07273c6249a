"""The low-rank update against its definition in float64, and the linear map that uses it."""

from functools import partial

import pytest
import torch
from helpers.kernel_cases import relative_error
from mambapeft_kernels.low_rank import linear as low_rank
from mambapeft_kernels.low_rank import low_rank_add, low_rank_product, naive
from mambapeft_kernels.low_rank.linear import LowRankFactors, add_low_rank, low_rank_linear

CPU = [pytest.param("cpu", id="interpreter")] if not torch.cuda.is_available() else []
GPU = [pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
DEVICES = CPU + GPU
# Triton's interpreter cuts numbers off to bfloat16, where PyTorch and a GPU round them.
ROUNDING = [pytest.param(*p.values, torch.float16, id=f"{p.id}-float16", marks=p.marks) for p in DEVICES] + [
    pytest.param("cuda", torch.bfloat16, id="gpu-bfloat16", marks=pytest.mark.gpu)
]
# m, n, r: one of everything, ragged, whole tiles of 128 x 64 and beyond, ranks beyond 64.
SHAPES = [(1, 1, 1), (5, 10, 3), (128, 64, 64), (131, 70, 16), (257, 130, 96)]


def drawn(*shape, device, dtype, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def strided(m, n, r, device, dtype):
    """out [m, n] and low [m, r], columns of wider tensors; and the wider out."""
    wide = drawn(m, n + 9, device=device, dtype=dtype, seed=1)
    return wide[:, 4 : 4 + n], drawn(m, r + 5, device=device, dtype=dtype, seed=2)[:, 2 : 2 + r], wide


def exact(out, low, up, scale):
    """In float64, from scale · up as it is rounded."""
    return out.double() + low.double() @ (up.float() * scale).to(low.dtype).double().T


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("up_dtype", [torch.float32, None], ids=["wide up", "narrow up"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), ROUNDING)
def test_values(device, shape, dtype, up_dtype, scale):
    m, n, r = shape
    up = drawn(n, r, device=device, dtype=up_dtype or dtype, seed=3)
    results = {}
    for backend in ("naive", "triton"):
        out, low, wide = strided(m, n, r, device, dtype)
        before, expected = wide.clone(), exact(out, low, up, scale)
        kept = low_rank_add(out, low, up, scale, backend=backend)
        assert kept.dtype == dtype and torch.equal(kept, (up.float() * scale).to(dtype))
        results[backend] = relative_error(out, expected)
        wide[:, 4 : 4 + n] = before[:, 4 : 4 + n]
        assert torch.equal(wide, before)  # nothing beside the columns
    assert results["triton"] <= 2 * results["naive"] < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_small_whole_numbers_are_exact(device, dtype):
    gen = torch.Generator().manual_seed(0)
    out, low, up = (torch.randint(-2, 3, s, generator=gen).to(device, dtype) for s in ((150, 70), (150, 20), (70, 20)))
    expected = out.double() + 0.5 * low.double() @ up.double().T
    low_rank_add(out, low, up.float(), 0.5, backend="triton")
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_low_and_up_with_other_strides(device):
    out = drawn(6, 8, device=device, dtype=torch.bfloat16)
    low, up = drawn(6, 4, device=device, dtype=torch.bfloat16), drawn(8, 4, device=device, dtype=torch.float32)
    again = out.clone()
    low_rank_add(out, low, up, backend="triton")
    low_rank_add(again, low.T.contiguous().T, up.T.contiguous().T, backend="triton")
    assert torch.equal(out, again)


@pytest.mark.parametrize(("dtype", "strides"), [(torch.float32, (8, 1)), (torch.bfloat16, (1, 6))], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_all_else_is_the_definition_bit_for_bit(device, dtype, strides, monkeypatch):
    from mambapeft_kernels.low_rank import triton_kernels as triton

    monkeypatch.setattr(triton, "_add", None)
    low, up = drawn(6, 4, device=device, dtype=dtype), drawn(8, 4, device=device, dtype=torch.float32)
    found = drawn(6, 8, device=device, dtype=dtype).as_strided((6, 8), strides)
    expected = found.clone()
    low_rank_add(found, low, up, 0.3, backend="triton")
    naive.low_rank_add(expected, low, up, 0.3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_add(device):
    for m, n, r in ((0, 4, 2), (3, 4, 0)):
        out = drawn(m, n, device=device, dtype=torch.bfloat16)
        before, low = out.clone(), out.new_ones(m, r)
        kept = low_rank_add(out, low, torch.ones(n, r, device=device), 0.5, backend="triton")
        assert torch.equal(out, before) and torch.equal(kept, low.new_full((n, r), 0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_registered_op_is_consistent(device):
    out, low, _ = strided(5, 4, 3, device, torch.bfloat16)
    up = drawn(4, 3, device=device, dtype=torch.float32)
    low_rank_add(out, low, up, backend="triton")  # registers the op
    torch.library.opcheck(
        torch.ops.mambapeft.low_rank_add, (out, low, up, 0.5), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("out", "low", "up", "message"),
    [
        ((2, 3), (2, 4), (3, 5), r"expected out \[m, n\], low \[m, r\], up \[n, r\], got \(2, 3\), \(2, 4\), \(3, 5\)"),
        ((2, 3), (1, 4), (3, 4), "expected out"),
        ((2, 3), (2, 4), (2, 4), "expected out"),
        ((1, 2, 3), (2, 4), (3, 4), "expected out"),
    ],
)
def test_wrong_shapes_are_named(out, low, up, message):
    with pytest.raises(ValueError, match=message):
        low_rank_add(torch.ones(out), torch.ones(low), torch.ones(up))


def test_out_and_low_have_one_dtype():
    with pytest.raises(ValueError, match="must have one dtype, got torch.float32 and torch.float16; cast low"):
        low_rank_add(torch.ones(2, 3), torch.ones(2, 4).half(), torch.ones(3, 4))


# The linear map


def branch_results(device, dtype, added):
    """Output and all gradients of a linear map with branches of ranks 3 and 16; `added`: with both twice.

    dtype: float64, or that of autocast.
    """

    def draw(*shape, seed):
        # Values that 16 bits hold exactly, so that every dtype starts from the same inputs; parameters are wide.
        wide = torch.promote_types(dtype, torch.float32)
        return drawn(*shape, device=device, dtype=torch.bfloat16, seed=seed).to(wide).requires_grad_()

    x, weight = draw(3, 50, 40, seed=0), draw(70, 40, seed=1)
    factors = [draw(*shape, seed=2 + i) for i, shape in enumerate(((3, 40), (70, 3), (16, 40), (33, 16)))]
    branches = [
        LowRankFactors(*factors[:2], 1.0, 0.0, None),
        LowRankFactors(*factors[2:], 0.3, 0.0, slice(8, 41)),
    ]
    with torch.autocast(device, torch.float16 if dtype == torch.float64 else dtype, enabled=dtype != torch.float64):
        linear = low_rank_linear(x, weight, None, branches)
        out = add_low_rank(linear, x, branches) if added else linear
    assert out.dtype == dtype
    dout = draw(3, 50, 70, seed=9).detach().to(dtype)
    return [out, *torch.autograd.grad(out, (x, weight, *factors), dout)]


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("device", "dtype"), ROUNDING)
def test_the_linear_map_and_its_gradients_are_as_exact_as_with_plain_pytorch(device, dtype, added, monkeypatch):
    launched = []

    def noted(backend, *arguments):
        launched.append(backend)
        return low_rank_add(*arguments, backend=backend)

    expected = branch_results(device, torch.float64, added)
    monkeypatch.setattr(low_rank, "low_rank_add", partial(noted, "naive"))
    plain = branch_results(device, dtype, added)
    monkeypatch.setattr(low_rank, "low_rank_add", partial(noted, "triton"))
    found = branch_results(device, dtype, added)
    calls = 4 if added else 2
    assert launched == ["naive"] * calls + ["triton"] * calls
    for ours, theirs, reference in zip(found, plain, expected):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, reference) <= 1.1 * relative_error(theirs, reference) < 2e-2


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_is_chosen_and_a_recorded_launch_repeats_it(monkeypatch):
    from mambapeft_kernels.low_rank import triton_kernels as triton

    monkeypatch.setattr(triton.naive, "low_rank_add", None)
    out, low, _ = strided(300, 200, 64, "cuda", torch.bfloat16)
    up = drawn(200, 64, device="cuda", dtype=torch.float32)
    expected = out.clone()
    low_rank_add(expected, low, up, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        low_rank_add(out, low, up, 0.5)
    graph.replay()
    assert torch.equal(out, expected)


# The map and its update in one launch


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 33, 10, 3), (131, 96, 70, 16), (257, 64, 130, 96)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), ROUNDING)
def test_a_map_and_its_update(device, shape, dtype):
    """Ragged, whole tiles and beyond, with strides; as exact as the product and the update one after another."""
    m, k, n, r = shape
    x, weight = (drawn(*s, device=device, dtype=dtype, seed=i) for i, s in enumerate(((m, k), (n, k))))
    low, up = strided(m, n, r, device, dtype)[1], drawn(n, r, device=device, dtype=torch.float32, seed=3)
    expected = exact(x.double() @ weight.double().T, low, up, 0.3)
    out, apart = torch.full((m, n), float("nan"), device=device, dtype=dtype), x.new_empty(m, n)
    low_rank_product(apart, x, weight, low, up, 0.3, backend="naive")
    for strides in (weight, weight.T.contiguous().T):
        kept = low_rank_product(out, x, strides, low, up, 0.3, backend="triton")
        assert torch.equal(kept, (up * 0.3).to(dtype))
        assert relative_error(out, expected) <= max(1.1 * relative_error(apart, expected), 1e-4) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_wide_maps_and_float32_are_products_apart(device, monkeypatch):
    from mambapeft_kernels.low_rank import triton_kernels as triton

    monkeypatch.setattr(triton, "_product", None)
    for k, dtype in ((600, torch.bfloat16), (8, torch.float32)):
        shapes = (6, 5), (6, k), (5, k), (6, 4), (5, 4)
        out, x, weight, low, up = (drawn(*s, device=device, dtype=dtype, seed=i) for i, s in enumerate(shapes))
        expected = x @ weight.T
        low_rank_add(expected, low, up, 0.3, backend="triton")
        low_rank_product(out, x, weight, low, up, 0.3, backend="triton")
        assert torch.equal(out, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_registered_product_is_consistent(device):
    shapes = (5, 4), (5, 8), (4, 8), (5, 3), (4, 3)
    tensors = [drawn(*s, device=device, dtype=torch.float16, seed=i) for i, s in enumerate(shapes)]
    low_rank_product(*tensors, backend="triton")  # registers the op
    torch.library.opcheck(
        torch.ops.mambapeft.low_rank_product, (*tensors, 0.5), test_utils=("test_schema", "test_faketensor")
    )
