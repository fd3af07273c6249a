"""The arithmetic of scripts/bench_ss2d.py: sizes and floors, and a refusal without a GPU."""

from pathlib import Path

import pytest
import torch
from helpers import crashes

from mambapeft_vision.benchmarks.kernels import Chip
from mambapeft_vision.benchmarks.ss2d import Case, work

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_ss2d.py"


def test_sizes_of_vmamba_s_and_b():
    found = [(c.side, c.width, c.channels, c.rank) for c in (Case("s", s, 1) for s in (1, 2, 3, 4))]
    assert found == [(56, 96, 192, 6), (28, 192, 384, 12), (14, 384, 768, 24), (7, 768, 1536, 48)]
    assert (Case("b", 4, 1).channels, Case("t", 1, 1).channels) == (2048, 96)


def test_the_floor_of_a_forward_scan_is_its_special_functions():
    """Over the blocks of VMamba-S: 12 an element and 4.21 M elements an image, at 4.18e12 a second."""
    blocks = {1: 2, 2: 2, 3: 15, 4: 2}
    found = {stage: work(Case("s", stage, 256))["ss2d_forward"].floor(Chip()) for stage in blocks}
    assert {unit for _, unit in found.values()} == {"exponentials"}
    total = sum(count * found[stage][0] for stage, count in blocks.items()) / 256
    assert total == pytest.approx(12.1, abs=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_refuses_without_a_gpu(tmp_path):
    code, _, err = crashes.command(tmp_path, "scripts/bench_ss2d.py")
    assert code == 1
    assert "got no CUDA GPU" in err
