"""The C library's allocator, set up for tensors on a CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed tensors for the next ones, instead of returning it to the kernel.

    A training step frees and takes the same large buffers hundreds of times, and every fresh page costs a fault: a
    fifth of a small model's step. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
