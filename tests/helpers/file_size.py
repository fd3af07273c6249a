"""A limit on the size of files, as a full disk or a quota sets it: what is written beyond it fails with EFBIG."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def size_limit(bytes_: int) -> Iterator[None]:
    """No file of this process may become larger, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    limit_for_good(bytes_)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        sys.dont_write_bytecode = before[1]


def limit_for_good(bytes_: int) -> None:
    """The same to the end of this process."""
    sys.dont_write_bytecode = True  # Python keeps what it could write of a module, and fails to read it ever after
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
