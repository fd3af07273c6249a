"""NVIDIA's compute-sanitizer over the CUDA C++ kernels: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="NOT RUN: compute-sanitizer (part of the CUDA toolkit) is not here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    script = Path(__file__).parents[1] / "helpers" / "every_cuda_kernel.py"
    # Every tensor its own allocation, so that a step over its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Faults of kernels, not status codes that libraries ask the driver for and handle.
    options = ["--error-exitcode", "9", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    command = [SANITIZER, "--tool", tool, *options, sys.executable, str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    said = "\n".join(line for line in (ended.stdout + ended.stderr).splitlines() if "Host Frame" not in line)
    assert ended.returncode == 0, said[:8000]
    assert "36 runs of the CUDA C++ kernels" in said
    assert ("0 errors" if tool == "memcheck" else "0 hazards displayed (0 errors, 0 warnings)") in said
