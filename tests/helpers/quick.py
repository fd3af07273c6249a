"""What takes tests time and tells them nothing."""

import importlib.metadata
import os
import sys
from functools import cache


def skip_what_costs_time() -> None:
    """For the rest of this process and its forks.

    Files are not forced to the disk: that helps where a machine loses its power, and tests kill processes alone.
    The entry points of what is installed are read once: Lightning asks for them at every run.
    torch.manual_seed notes its calls, with a traceback, for each kind of device that is not there: not so here.
    """
    os.fsync = lambda _: None
    if not hasattr(importlib.metadata.entry_points, "cache_clear"):
        importlib.metadata.entry_points = cache(importlib.metadata.entry_points)
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        for devices in (torch.cuda, torch.xpu, torch.mtia):
            devices._lazy_call = lambda *_, **__: None
