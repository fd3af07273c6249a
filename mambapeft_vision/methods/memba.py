"""Memba (arXiv 2506.18184): a leaky integrate membrane on the gate of every mixer."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.targets import mixers_of
from mambapeft_vision.utils.errors import UserError

_MOST_CHUNKS = 4096


class Memba(Method):
    """z → concat(u_2 … u_{T+1}), u_{i+1} = reset(τ u_i + X_i), whose silu then gates the scan's output.

    X_1 … X_T are chunks of z along the sequence, padded with zeros to T · ceil(L / T) tokens; the padding is dropped
    again. reset(v) is 0 where v > V_th, else v. u_1 is the mean over the chunks of the previous block's membrane
    (cross-layer transfer; 0 in the first block). It has no trained tensors: the paper trains it beside LoRA on in_proj
    and out_proj. With τ = 0 and without a threshold it changes nothing.

    Args:
        tau: τ, the leak.
        threshold: V_th; None: the membrane is never reset.
        chunks: T.
        transfer: u_1 comes from the previous block; false: 0 in every block.
        reset_first: u_{i+1} = τ reset(u_i) + X_i, so that the gate sees what is above V_th once. The published order
            is false.
    """

    merge_obstacle = "the membrane on the gate depends on the tokens, not on weights alone"

    def __init__(
        self,
        *,
        tau: float = 0.5,
        threshold: float | None = 1.0,
        chunks: int = 4,
        transfer: bool = True,
        reset_first: bool = False,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, chunks=chunks)
        if chunks > _MOST_CHUNKS:  # sequences are padded to them
            raise UserError(f"Memba: chunks={chunks!r}; expected at most {_MOST_CHUNKS:,}")
        if not tau >= 0:
            raise UserError(f"Memba: tau={tau!r}; expected a number >= 0 (0: no memory)")
        if threshold is not None and not 0 < threshold < float("inf"):
            raise UserError(f"Memba: threshold={threshold!r}; expected a number > 0, or null (never reset)")
        self.tau, self.threshold, self.chunks, self.transfer = tau, threshold, chunks, transfer
        self.reset_first = reset_first
        self._means: dict[int, list[Tensor]] = {}  # layer → mean membranes of the present forward

    @property
    def identity_at_init(self) -> bool:
        return self.tau == 0 and (self.threshold is None or self.reset_first)

    def attach(self, model: Backbone) -> None:
        mixers = mixers_of(model, self.name)
        self._last = len(mixers) - 1
        for i, mixer in enumerate(mixers):
            mixer.gate.set(self.name, LayerMembrane(self, i))

    def gate(self, z: Tensor, layer: int) -> Tensor:
        """[B, L, E] → [B, L, E]."""
        length = z.shape[1]
        size = -(-length // self.chunks)
        parts = F.pad(z, (0, 0, 0, size * self.chunks - length)).unflatten(1, (self.chunks, size))
        u = self._start(layer)
        membrane = []
        for part in parts.unbind(1):
            if u is not None and self.reset_first:
                u = self._reset(u)
            v = part if u is None else self.tau * u + part
            u = v if self.reset_first else self._reset(v)
            membrane.append(u)
        self._keep(layer, reduce(torch.add, membrane) / self.chunks)
        return torch.cat(membrane, dim=1)[:, :length]

    def _reset(self, v: Tensor) -> Tensor:
        return v if self.threshold is None else v.masked_fill(v > self.threshold, 0.0)

    def _start(self, layer: int) -> Tensor | None:
        """u_1. A mixer that scans two buffers calls twice; each call continues its own buffer's membrane."""
        if layer == 0 and len(self._means) > 1:
            self._means.clear()  # left over from a forward that was broken off
        calls = self._means.setdefault(layer, [])
        if not self.transfer or layer == 0:
            return None
        if layer - 1 not in self._means:
            raise UserError(
                "Memba: a block was computed without the one before it; a membrane that passes from block to block "
                "cannot be recomputed. Switch gradient checkpointing off, or set transfer: false"
            )
        return self._means[layer - 1][len(calls)]

    def _keep(self, layer: int, mean: Tensor) -> None:
        """Holds the mean membrane for the next block; nothing once the last block has passed."""
        self._means[layer].append(mean)
        if layer == self._last and len(self._means[layer]) == len(self._means.get(layer - 1, [mean])):
            self._means.clear()


class LayerMembrane:
    """The value of one mixer's gate port."""

    def __init__(self, method: Memba, layer: int) -> None:
        self.method, self.layer = method, layer

    def __call__(self, z: Tensor) -> Tensor:
        return self.method.gate(z, self.layer)
