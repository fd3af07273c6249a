"""The states that the fused forward keeps for the backward: one in every CHUNK tokens, in the activations' dtype.

The recurrence itself is float32 everywhere; only the states from which the backward starts its chunks are rounded.

Chunks lie on the same grid of tokens for both directions: chunk j covers tokens [j·CHUNK, (j+1)·CHUNK), and its
checkpoint is the state with which its direction enters it.
"""

import torch
from torch import Tensor

CHUNK = 8  # tokens; the backward keeps the states of one chunk in registers


def padded_states(states: int) -> int:
    """States are stored in rows of whole 32-byte sectors."""
    return (states + 7) // 8 * 8


def num_chunks(length: int) -> int:
    """Chunks of a sequence of `length` tokens."""
    return (length + CHUNK - 1) // CHUNK


def checkpoint_shape(groups: int, batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """[G, B, chunks, E, padded N]."""
    return groups, batch, num_chunks(length), channels, padded_states(states)


def empty_checkpoints(like: Tensor, states: int) -> Tensor:
    """Uninitialised checkpoints for a scan over `like` [G, B, L, E]."""
    groups, batch, length, channels = like.shape
    return torch.empty(checkpoint_shape(groups, batch, length, channels, states), dtype=like.dtype, device=like.device)
