"""HiRA: Hadamard high-rank adaptation (ICLR 2025, OpenReview TwJrTz9cRS)."""

from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta, uniform


class HiRA(WeightDelta):
    """W' = W ⊙ (1 + up · down): a change of low rank relative to the weight, so of high rank in itself.

    down [r, in] starts as `nn.Linear` does, up [out, r] at zero.

    Args:
        targets, rows: see `WeightDelta`.
        rank: r.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        rank: int,
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        self.rank = rank

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, out_features, in_features = weight.shape
        return {
            "down": uniform(weight, *groups, self.rank, in_features),
            "up": weight.new_zeros(*groups, out_features, self.rank),
        }

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return weight * (own["up"] @ own["down"])
