"""Helpers for the project's own child processes."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def available_cpus() -> int:
    """CPUs this process may use, which in a container can be far fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Lets this process end when its parent process has ended."""
    parent = multiprocessing.parent_process()
    if parent is None:  # this is no child
        return
    sentinel = parent.sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
