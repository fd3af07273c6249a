"""The loops that Numba compiles: their elementary functions, and threads that share a batch."""

import runpy

import numba
import numpy as np
import pytest
import torch
from helpers.kernel_cases import make_directions, make_xz, results
from mambapeft_kernels import numba_loop, numba_math, ssm_mixer
from mambapeft_kernels.numba_lanes import LANES, load, store

# Units in the last place that each function may be off, by dtype.
ULPS = {np.float32: 2, np.float64: 3}


@numba.njit(error_model="numpy")
def _values(x, power, gate, step):
    """2^-|x| and the functions of x; x is [-|x|, x]."""
    for left in range(0, x.shape[1], LANES):
        width = min(LANES, x.shape[1] - left)
        store(power, left, width, numba_math.exp2_not_positive(load(x, (0, left), width)))
        value = load(x, (1, left), width)
        store(gate, left, width, numba_math.sigmoid(value))
        store(step, left, width, numba_math.softplus(value))


@pytest.mark.parametrize("dtype", ULPS)
def test_elementary_functions_are_accurate(dtype):
    random = np.random.default_rng(0)
    x = np.concatenate([random.standard_normal(20_000) * scale for scale in (1e-3, 1, 10, 20)]).astype(dtype)
    x = x[np.abs(x) < 80]  # beyond, float32 has no normal numbers
    found = [np.empty_like(x) for _ in range(3)]
    _values(np.stack([-np.abs(x), x]), *found)
    wide = x.astype(np.longdouble)
    exact = np.exp2(-np.abs(wide)), 1 / (1 + np.exp(-wide)), np.logaddexp(0, wide)
    for values, expected in zip(found, exact):
        assert np.max(np.abs(values - expected) / expected) <= ULPS[dtype] * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ULPS)
def test_limits_of_the_elementary_functions(dtype):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e4, -1e4], dtype)
    power, gate, step = (np.empty_like(x) for _ in range(3))
    _values(np.stack([-np.abs(x), x]), power, gate, step)
    tiny = 2 * np.finfo(dtype).tiny
    assert np.isnan([power[0], gate[0], step[0]]).all()
    np.testing.assert_allclose(power[1:], [0, 0, 1, 1, 0, 0], atol=tiny)
    np.testing.assert_allclose(gate[1:], [1, 0, 0.5, 0.5, 1, 0], atol=tiny)
    np.testing.assert_allclose(step[1:], [np.inf, 0, np.log(2), np.log(2), 1e4, 0], rtol=1e-6, atol=tiny)


def test_threads_change_no_bit():
    """Samples are shared out, and what is summed over them is summed in one order."""
    directions = make_directions(70, 5, 3, device="cpu")
    xz = make_xz(5, 11, 70, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(xz, directions, torch.float32, "numba")
        torch.set_num_threads(3)
        three = results(xz, directions, torch.float32, "numba")
    finally:
        torch.set_num_threads(before)
    # PyTorch's own products may be split otherwise; the loops' results may not.
    for name in ("out", "d conv_bias"):
        for key in (key for key in one if name in key):
            assert torch.allclose(one[key], three[key], rtol=1e-6, atol=0), key


def test_a_gate_of_its_own_and_strided_inputs():
    directions = make_directions(12, 4, 2, device="cpu")
    xz = make_xz(2, 9, 12, "cpu").double()
    directions = [
        d._replace(**{k: v.double() for k, v in d._asdict().items() if isinstance(v, torch.Tensor)}) for d in directions
    ]
    x, z = xz.chunk(2, dim=-1)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = ssm_mixer(xz, directions, backend="naive")
    torch.testing.assert_close(ssm_mixer(strided, directions, backend="numba", z=z), expected, rtol=1e-12, atol=1e-12)


def test_results_do_not_depend_on_where_arrays_lie():
    """LLVM chooses between a vectorised and a plain loop by the arrays' places: both must add in one order."""
    directions = make_directions(64, 16, 2, offsets=False, device="cpu")
    xz = make_xz(16, 17, 64, "cpu")
    first = results(xz, directions, torch.float32, "numba")
    kept = []
    for i in range(6):
        kept.append(torch.empty(1000 + 37 * i))  # moves what is allocated next
        again = results(xz, directions, torch.float32, "numba")
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_kept_loops_are_of_the_present_sources(tmp_path, monkeypatch):
    """Numba looks at a loop's own file alone; what is inlined into it stands in others."""
    file = tmp_path / "kept_loop.py"
    file.write_text("from mambapeft_kernels.numba_loop import loop\n\n@loop\ndef add(x):\n    x[0] += 1\n")

    def compiled_anew() -> bool:
        found = runpy.run_path(str(file))["add"]
        found(np.zeros(1))
        assert sum(found.stats.cache_hits.values()) + sum(found.stats.cache_misses.values()) == 1
        return bool(found.stats.cache_misses)

    assert compiled_anew()
    assert not compiled_anew()
    monkeypatch.setattr(numba_loop, "_SOURCES", "another")
    assert compiled_anew()
