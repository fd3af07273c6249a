"""How the commands import PyTorch, timm and Lightning."""

import ctypes
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import ModuleType
from typing import Any

THREAD = "start of CUDA"


@contextmanager
def imports_kept() -> Iterator[None]:
    """Imports made in this context are excluded from garbage collection (first use in a process only).

    During imports, collections take a fifth of the time. Later collections would go through all imported objects, which
    takes 0.3 s before each capture of a CUDA graph.
    """
    if "torch" in sys.modules:  # a second run in this process: objects of the first one must be collected
        yield
        return
    gc.disable()
    try:
        with _without_unused():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _without_unused() -> Iterator[None]:
    """Leaves out what libraries import for features that no run uses; afterwards it can be imported as usual.

    * Lightning imports torchmetrics, to recognise metrics that a module logs, and torchmetrics imports SciPy, pyplot
      and transformers: a quarter of all time. Our modules log none.
    * timm imports W&B where it is installed, for summaries that it does not write here.
    """
    instead: dict[str, Any] = {"torchmetrics": FewMetrics("torchmetrics"), "wandb": None}  # None: not installed
    instead = {name: module for name, module in instead.items() if name not in sys.modules}
    sys.modules.update(instead)
    try:
        yield
    finally:
        for name, module in instead.items():
            if sys.modules.get(name, instead) is module:
                del sys.modules[name]


class FewMetrics(ModuleType):
    """torchmetrics with the names that Lightning uses while it is imported; for any other, the package itself."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            with suppress(PackageNotFoundError):
                return version(self.__name__)
        if name in ("Metric", "MetricCollection"):
            from torch import nn

            value = type(name, (nn.Module,), {"__module__": self.__name__})
            setattr(self, name, value)
            return value
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def begin_cuda(device: str) -> None:
    """Lets a thread start CUDA, which takes a third of a second, while this process imports.

    Args:
        device: as `trainer.device` has it; for others than `auto`, `cuda` and `cuda:N` nothing begins.
    """
    kind, _, number = device.partition(":")
    if kind in ("auto", "cuda") and (number or "0").isdecimal():
        threading.Thread(target=retain_context, args=(int(number or 0),), name=THREAD, daemon=True).start()


def retain_context(device: int) -> None:
    """Makes the context of a GPU that PyTorch uses later. Without a driver, or such a GPU, nothing happens."""
    with suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")  # calls of it let Python's other threads go on
        if driver.cuInit(0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), device)


def drop_unusable_backend() -> None:
    """Removes a choice of matplotlib's backend that this environment lacks.

    Notebooks (Jupyter, Colab, Kaggle) export MPLBACKEND=module://matplotlib_inline.backend_inline to the commands that
    are started from them. Without that module, importing matplotlib fails, and with it Lightning. Files are drawn with
    Agg whatever the variable says.
    """
    chosen = os.environ.get("MPLBACKEND", "")
    kind, _, module = chosen.partition("://")
    if kind == "module":
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
    else:
        found = not chosen or chosen.lower() in _BACKENDS or bool(entry_points(group="matplotlib.backend", name=chosen))
    if not found:
        del os.environ["MPLBACKEND"]


# Matplotlib's own; others are modules or register themselves.
_BACKENDS = {
    *("agg", "cairo", "pdf", "pgf", "ps", "svg", "template", "macosx", "nbagg", "notebook", "webagg"),
    *("gtk3agg", "gtk3cairo", "gtk4agg", "gtk4cairo", "qtagg", "qtcairo", "qt5agg", "qt5cairo"),
    *("tkagg", "tkcairo", "wx", "wxagg", "wxcairo"),
}
