"""The definition of the depthwise causal convolution + SiLU of a Mamba mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """u_t = silu(bias + Σ_k weight[:, k] · x_{t - (K-1) + k}), with zeros before the sequence.

    Args:
        x: [B, L, E].
        weight: [E, K], one filter a channel.
        bias: [E].
        reverse: read the tokens from last to first; the result keeps the order of `x`.
    Returns: [B, L, E], in the promoted dtype of the arguments.
    """
    kernel = weight.shape[1]
    length = x.shape[1]
    # Reversed time is the same sum with the filter mirrored and the padding behind the sequence.
    padded = F.pad(x, (0, 0, 0, kernel - 1) if reverse else (0, 0, kernel - 1, 0))
    taps = weight.flip(1) if reverse else weight
    acc = bias.expand(length, -1)
    for k in range(kernel):
        acc = acc + padded[:, k : k + length] * taps[:, k]
    return F.silu(acc) if x.shape[0] else torch.zeros_like(x)
