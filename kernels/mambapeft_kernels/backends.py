"""The choice of an implementation: resolved once from the name asked for and from what this machine can run."""

import importlib.util
import os
import warnings
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mambapeft_kernels.derivatives import transformed
from mambapeft_kernels.private_cache import check_caches

# Name → what it is, best first for the devices it supports. `auto` never chooses the last two.
BACKENDS: dict[str, str] = {
    "cuda": "fused kernels, scans in CUDA C++ compiled at run time; CUDA, float32 and bfloat16",
    "triton": "fused kernels in Triton; CUDA, or a CPU under TRITON_INTERPRET=1",
    "numba": "loops that Numba compiles for this CPU; float16 and bfloat16 are computed in float32",
    "torch": "vectorised PyTorch with recomputation; any device",
    "mamba_ssm": "the published kernels of mamba-ssm and causal-conv1d, for comparison; CUDA",
    "naive": "the definition, plain autograd; any device, slow, for checks",
}
# Their kernels round weights to the activations' dtype as they load them.
FUSED = ("cuda", "triton")
# The dtypes of the fused backends; the others take any floating dtype.
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cuda": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "mamba_ssm": (torch.float32, torch.bfloat16, torch.float16),
}
_REMEDY = {
    "cuda": "it needs an NVIDIA GPU of compute capability 8.0 or later, triton, and `pip install cuda-core[cu13]`",
    "triton": "it needs triton and a CUDA GPU (or TRITON_INTERPRET=1 on a CPU, for checks)",
    "numba": "it needs a CPU and `pip install numba`",
    "mamba_ssm": "it needs a CUDA GPU and `pip install mamba-ssm causal-conv1d` (they compile with nvcc)",
}


@cache
def is_installed(module: str) -> bool:
    """Whether a module can be imported; looked up once in a process."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def can_run(name: str, device: torch.device) -> bool:
    """Whether `name` works on `device`, without importing the packages it needs."""
    on_gpu = device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    if name == "triton":
        return is_installed("triton") and (on_gpu or interpreted(device))
    if name == "cuda":
        modern = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
        return modern and all(map(is_installed, ("triton", "cuda.core", "cuda.bindings")))
    if name == "mamba_ssm":
        return on_gpu and is_installed("mamba_ssm") and is_installed("causal_conv1d")
    if name == "numba":
        return device.type == "cpu" and is_installed("numba")
    return True


def interpreted(device: torch.device) -> bool:
    """Whether Triton kernels run in Triton's interpreter: tensors on a CPU and TRITON_INTERPRET=1."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def computes_now(tensors: Iterable[Tensor | None]) -> bool:
    """Whether operations on these tensors compute values in memory, which code outside of PyTorch can read.

    Not while they are traced (torch.compile, torch.export, make_fx, torch.jit.trace) or counted, nor for subclasses of
    tensors (fake, quantised, distributed).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    return all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)


def available_backends(device: torch.device | str) -> list[str]:
    """The backends that can run on `device`, best first."""
    device = torch.device(device)
    return [name for name in BACKENDS if can_run(name, device)]


@torch.compiler.assume_constant_result  # to torch.compile the choice is a constant
def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str:
    """`name` itself if it can run on `device`; for "auto" the best that can (and takes `dtype`, if given).

    On a CPU "auto" is `numba` where it is installed, else `torch`. Triton's interpreter is for checks and runs only
    when asked for by name.
    Raises: ValueError naming what was asked, what can run, and the remedy; also where other users can write to the
        folder of compiled kernels.
    """
    device = torch.device(device)
    resolved = _resolved(name, device, dtype)
    if resolved == "numba" or not interpreted(device):
        check_caches(resolved)
    return resolved


def _resolved(name: str, device: torch.device, dtype: torch.dtype | None) -> str:
    if name == "auto":
        order = ("cuda", "triton", "torch") if device.type == "cuda" else ("numba", "torch")
        return next(choice for choice in order if can_run(choice, device) and _takes(choice, dtype))
    if name not in BACKENDS:
        raise ValueError(f"kernel={name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if not can_run(name, device):
        raise ValueError(
            f"kernel={name} cannot run on {device}: {_REMEDY[name]}. "
            f"Here: auto, {', '.join(available_backends(device))}"
        )
    if not _takes(name, dtype):
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[name])
        raise ValueError(f"kernel={name} takes {known}, got {dtype}; cast the input, or choose auto or torch")
    return name


@torch.compiler.assume_constant_result
def resolve_for(name: str, x: Tensor) -> str:
    """`resolve_backend` for the device and dtype of `x`, which costs each op of a model as little as a look-up.

    What is installed and which devices there are stays as it is while a process runs. Only Triton's interpreter can be
    switched on and off, so that `triton` is not kept.
    """
    return (resolve_backend if name == "triton" else _kept)(name, x.device, x.dtype)


_kept = cache(resolve_backend)


def backend_for(name: str, x: Tensor) -> str:
    """The backend that runs for `x` now: as `resolve_for`, but the definition within transforms of `torch.func`.

    They and forward-mode differentiation (per-sample gradients, ensembles, Jacobians) go through no other backend.
    """
    resolved = resolve_for(name, x)
    if resolved == "naive" or not transformed():
        return resolved
    announce_definition()
    return "naive"


@cache
def announce_definition() -> None:
    """Warns, once in a process."""
    warnings.warn(
        "within transforms of torch.func and forward-mode differentiation every op runs as its definition "
        "(kernel=naive), which is right and slower",
        stacklevel=4,
    )


def _takes(name: str, dtype: torch.dtype | None) -> bool:
    return dtype is None or name not in _DTYPES or dtype in _DTYPES[name]


def describe(name: str, device: torch.device | str) -> str:
    """One line for the log: the name asked for and the backend that runs."""
    device = torch.device(device)
    resolved = resolve_backend(name, device)
    asked = "" if name == resolved else f" (kernel={name})"
    slower = name == "auto" and device.type == "cuda" and resolved != "cuda"
    remedy = f"; kernel=cuda is faster: {_REMEDY['cuda']}" if slower else ""
    return f"kernel {resolved}{asked} on {device}: {BACKENDS[resolved]}{remedy}"
