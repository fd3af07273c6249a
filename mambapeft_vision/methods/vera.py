"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454)."""

import math
from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta


class VeRA(WeightDelta):
    """W' = W + diag(b) B diag(d) A; b [out] and d [r] train, A and B are random, frozen and shared by all weights.

    A [r, in] and B [out, r] are as large as the largest target; a smaller one uses their first columns and rows. They
    are Kaiming-uniform, as in peft, and saved with the adapter. b starts at zero, d at `d_initial`.

    Args:
        targets, rows: see `WeightDelta`.
        rank: r.
        d_initial: first value of d.
    """

    random_down: Tensor
    random_up: Tensor

    def __init__(
        self,
        *,
        targets: str | list[str],
        rank: int,
        d_initial: float = 0.1,
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        self.rank, self.d_initial = rank, d_initial

    def share(self, weights: Mapping[str, Tensor]) -> None:
        widest, longest = (max((w.shape[axis] for w in weights.values()), default=0) for axis in (-1, -2))
        like = next(iter(weights.values()))
        for name, rows, columns in (("random_down", self.rank, widest), ("random_up", longest, self.rank)):
            bound = math.sqrt(6 / columns)
            self.register_buffer(name, like.new_empty(rows, columns).uniform_(-bound, bound))

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, out_features, _ = weight.shape
        return {
            "b": weight.new_zeros(*groups, out_features),
            "d": weight.new_full((*groups, self.rank), self.d_initial),
        }

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        up = own["b"][..., None] * self.random_up[: weight.shape[-2]]
        return up @ (own["d"][..., None] * self.random_down[:, : weight.shape[-1]])
