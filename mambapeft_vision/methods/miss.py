"""MiSS: matrix shard sharing, first called Bone (arXiv 2409.15371)."""

from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta
from mambapeft_vision.utils.errors import UserError


class MiSS(WeightDelta):
    """W' = W + [D | D | …]: one block D [out, r] for all groups of r input columns; the last group may be shorter.

    On activations: the input summed over its groups, times D. D starts at zero.

    Args:
        targets, rows: see `WeightDelta`.
        rank: r, columns of D; at most the inputs of every target.
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
        if self.rank > in_features:
            raise UserError(
                f"{self.name}: rank={self.rank} for a weight with {in_features} inputs; expected at most these"
            )
        return {"block": weight.new_zeros(*groups, out_features, self.rank)}

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        in_features = weight.shape[-1]
        times = [1] * (weight.ndim - 1)
        return own["block"].repeat(*times, -(-in_features // self.rank))[..., :in_features]
