"""The arithmetic of scripts/bench_kernels.py: floors, and a refusal without a GPU. The timing itself needs a GPU."""

from pathlib import Path

import pytest
import torch
from helpers import crashes

from mambapeft_vision.benchmarks import kernels as bench

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_kernels.py"


def test_floor_of_the_scan_is_its_exponentials():
    """37 µs for both directions of one block of Vim-S at batch 32."""
    time, unit = bench.work(bench.CASES[0])["scan_forward"].floor(bench.Chip())
    assert unit == "exponentials"
    assert time == pytest.approx(37.0, abs=0.1)


def test_floors_grow_with_the_batch():
    small, large = (bench.work(bench.Case("", batch)) for batch in (32, 64))
    for kernel in small:
        chip = bench.Chip()
        assert large[kernel].floor(chip)[0] == pytest.approx(2 * small[kernel].floor(chip)[0])
    assert bench.block_floor(bench.CASES[0], chip)[0] < sum(w.floor(chip)[0] for w in small.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refuses_without_a_gpu(tmp_path):
    code, _, err = crashes.command(tmp_path, "scripts/bench_kernels.py")
    assert code == 1
    assert "got no CUDA GPU" in err
