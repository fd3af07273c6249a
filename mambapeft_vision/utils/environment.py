"""The environment of a result: library versions, the code's git state, the device, peak memory."""

import gc
import importlib.metadata
import platform
import resource
import sys
from functools import cache
from pathlib import Path

import torch

from mambapeft_vision.utils.git_checkout import checkout_state

LIBRARIES = (
    "mambapeft-vision",
    "torch",
    "lightning",
    "timm",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pillow",
    "safetensors",
    "triton",
)


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries by distribution name, Python's and CUDA's included."""
    return dict(cached_versions())


@cache
def cached_versions() -> dict[str, str]:
    """As `library_versions`, looked up once in a process; not to be changed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


@cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit of this package's source, and whether tracked files differ from it; None for unknown values.

    Cached at first use, because later runs in the same process still execute the code that was loaded then.
    """
    return checkout_state(Path(__file__).resolve().parents[2])


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the CPU's model where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Starts the count of `peak_memory_bytes` again, where that can be done (on GPUs), and frees what nobody uses."""
    gc.collect()  # an earlier run's model is in reference cycles with its trainer
    if device.type == "cuda":
        torch.cuda.init()  # before that there is nothing to count
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated by PyTorch on a GPU, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
