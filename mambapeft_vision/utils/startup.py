"""How the commands import PyTorch, timm and Lightning."""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points


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
        yield
    finally:
        gc.freeze()
        gc.enable()


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
