"""CUDA C++ compiled at run time with NVRTC through cuda-core: no nvcc, no build step, no headers.

Compiled kernels are kept on the disk, in Triton's cache (~/.triton/cache, or TRITON_CACHE_DIR).
"""

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor
from triton.runtime.cache import get_cache_manager

try:
    from cuda.core import Device, LaunchConfig, ObjectCode, Program, ProgramOptions, launch
except ImportError:  # before cuda-core 1.0 the same names lived here
    from cuda.core.experimental import Device, LaunchConfig, ObjectCode, Program, ProgramOptions, launch

_FOLDER = Path(__file__).parent
_STANDARD = "c++17"
_CUBIN = "kernel.cubin"


@cache
def _kernel(files: tuple[str, ...], name: str, macros: tuple[tuple[str, int | str], ...], device: int, shared: int = 0):
    """The kernel `name` of the `files` for the device, with up to `shared` bytes; loaded once a process."""
    Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    kernel = ObjectCode.from_cubin(machine_code(source_of(files, macros), f"sm_{major}{minor}")).get_kernel(name)
    if shared > 48 << 10:  # more than a block has without asking
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = driver.CUkernel(int(getattr(kernel, "handle", None) or kernel._handle))
        (error,) = driver.cuKernelSetAttribute(attribute, shared, handle, driver.CUdevice(device))
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} asks for {shared:,} bytes of shared memory: {error}")
    return kernel


def source_of(files: tuple[str, ...], macros: tuple[tuple[str, int | str], ...]) -> str:
    """The source of all files below their macros, as NVRTC compiles it."""
    defined = "".join(f"#define {k} {v}\n" for k, v in macros)
    return defined + "\n".join((_FOLDER / f).read_text(encoding="utf-8") for f in files)


def machine_code(source: str, arch: str) -> bytes:
    """The machine code of `source`, from the disk where this NVRTC has compiled it before."""
    decided_by = f"{_STANDARD} {arch} NVRTC {nvrtc.nvrtcVersion()}\n{source}"
    kept = get_cache_manager(hashlib.sha256(decided_by.encode()).hexdigest())
    file = kept.get_file(_CUBIN)
    if file is not None:
        return Path(file).read_bytes()
    cubin = Program(source, "c++", ProgramOptions(std=_STANDARD, arch=arch)).compile("cubin").code
    kept.put(cubin, _CUBIN)
    return cubin


class _TorchStream:
    """Hands torch's current stream to cuda-core."""

    def __init__(self, handle: int):
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@cache
def _stream(device: int, handle: int):
    return Device(device).create_stream(_TorchStream(handle))


def _argument(value: Tensor | int | float | None):
    """Tensors become pointers, None the null pointer, `int` int32 (int64 as ctypes), `float` float32."""
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value if isinstance(value, ctypes._SimpleCData) else ctypes.c_int(value)


def index_type(*tensors: Tensor | None) -> tuple[str, type[ctypes._SimpleCData]]:
    """The type that counts all elements of `tensors`, for a macro and for arguments: 64 bits cost instructions."""
    # The last chunk of tokens, or a block's last channels, are addressed though not read: hence the margin.
    fits = all(t is None or _extent(t) < 2**31 - 2**24 for t in tensors)
    return ("int", ctypes.c_int) if fits else ("i64", ctypes.c_longlong)


def _extent(t: Tensor) -> int:
    """How many elements lie from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))


def run(
    files: tuple[str, ...],
    name: str,
    macros: dict[str, int | str],
    grid: tuple[int, ...],
    threads: int,
    device: torch.device,
    arguments: list,
    shared: int = 0,
) -> None:
    """Launches kernel `name` on torch's current stream of `device` (which must be the current device).

    shared: bytes of dynamic shared memory of a block.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    kernel = _kernel(files, name, tuple(macros.items()), index, shared)
    Device(index).set_current()
    stream = _stream(index, torch.cuda.current_stream(index).cuda_stream)
    config = LaunchConfig(grid=grid, block=threads, shmem_size=shared)
    launch(stream, config, kernel, *(_argument(a) for a in arguments))
