"""The one translator of errors that end training: from what the machine raises to messages that users can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mambapeft_vision.utils.errors import UserError, disk_errors_of

_KEPT = "What was written before is whole, and the same command continues from there"


@contextmanager
def readable_errors(work: str, *, place: str, other_place: str, memory_remedy: str) -> Iterator[None]:
    """Translates disk errors, a GPU out of memory, and Lightning's answer to Ctrl-C.

    Args:
        work: names the work in messages.
        place: names the output in messages where the system names no file.
        other_place: how to choose another place, such as paths.outputs=DIR.
        memory_remedy: a sentence with what to lower.

    Raises: DiskError, UserError, KeyboardInterrupt; everything else passes.
    """
    with disk_errors_of(place, other_place, _KEPT):
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". If")[0]  # the rest is advice on PyTorch's allocator
            raise UserError(f"{work} needs more memory than the GPU has: {reason}. {memory_remedy}") from error
        except SystemExit as end:
            if end.code != 1:  # a cluster's, such as Submitit's when it has the job requeued
                raise
            raise KeyboardInterrupt from end  # Lightning turns Ctrl-C into this exit
