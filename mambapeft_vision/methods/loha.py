"""LoHa: low-rank Hadamard products (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta, uniform


class LoHa(WeightDelta):
    """W' = W + s (up_1 · down_1) ⊙ (up_2 · down_2): rank up to r² from two products of rank r.

    up_1, down_1 and up_2 start as `nn.Linear` does, down_2 at zero.

    Args:
        targets, rows: see `WeightDelta`.
        rank: r of both products.
        scale: the bare factor s (not alpha / r).
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        rank: int,
        scale: float = 1.0,
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        self.rank, self.scale = rank, scale

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, out_features, in_features = weight.shape
        return {
            "up_1": uniform(weight, *groups, out_features, self.rank),
            "down_1": uniform(weight, *groups, self.rank, in_features),
            "up_2": uniform(weight, *groups, out_features, self.rank),
            "down_2": weight.new_zeros(*groups, self.rank, in_features),
        }

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return self.scale * (own["up_1"] @ own["down_1"]) * (own["up_2"] @ own["down_2"])
