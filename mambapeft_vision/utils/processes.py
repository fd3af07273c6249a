"""What the project's own child processes have in common."""

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
    """Lets this process end when the one that started it is no more: left alone, it would get in the way."""
    parent = multiprocessing.parent_process()
    if parent is None:  # this is no child
        return
    sentinel = parent.sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
