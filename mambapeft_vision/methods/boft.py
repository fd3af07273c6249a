"""BOFT: orthogonal fine-tuning with butterfly factors (arXiv 2311.06243)."""

from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.oft import cayley_less_one, right_blocks
from mambapeft_vision.methods.weight_delta import WeightDelta
from mambapeft_vision.utils.errors import UserError


class BOFT(WeightDelta):
    """W' = diag(s) W B_0 B_1 … B_(m-1): sparse orthogonal factors that mix inputs ever farther apart.

    Factor B_i has blocks (1 + S)(1 - S)^-1 of b inputs, S the skew-symmetric part of a trained matrix. In B_0 the
    inputs of a block are neighbours; in B_i they are two runs of b / 2 that lie 2^i runs apart. The matrices start at
    zero, the scales s [out] at one and without weight decay.

    Args:
        targets, rows: see `WeightDelta`.
        block_size: b; the largest size up to it that fits is taken: b · 2^(m-1) divides the inputs, and b is even if
            m > 1.
        factors: m.
    """

    undecayed = ("scale",)

    def __init__(
        self,
        *,
        targets: str | list[str],
        block_size: int = 4,
        factors: int = 1,
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, block_size=block_size, factors=factors)
        self.block_size, self.factors = block_size, factors

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, out_features, in_features = weight.shape
        size = self._fitting_size(in_features)
        return {
            "blocks": weight.new_zeros(*groups, self.factors, in_features // size, size, size),
            "scale": weight.new_ones(*groups, out_features),
        }

    def _fitting_size(self, in_features: int) -> int:
        farthest = 2 ** min(self.factors - 1, in_features.bit_length())  # more than all inputs fits none of them
        for size in range(min(self.block_size, in_features), 1, -1):
            if in_features % (size * farthest) == 0 and (self.factors == 1 or size % 2 == 0):
                return size
        raise UserError(
            f"{self.name}: no block_size from 2 to {self.block_size} fits {in_features} inputs with factors="
            f"{self.factors}; raise block_size, lower factors or change targets"
        )

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        blocks = own["blocks"]
        rotations = cayley_less_one((blocks - blocks.mT) / 2)  # less one, to keep precision where they are small
        change = right_blocks(weight, rotations[..., 0, :, :, :])
        for i in range(1, self.factors):
            parts = (weight + change).unflatten(-1, (-1, 2, 2**i, blocks.shape[-1] // 2)).transpose(-3, -2)
            mixed = right_blocks(parts.flatten(-4), rotations[..., i, :, :, :])
            change = change + mixed.view(parts.shape).transpose(-3, -2).flatten(-4)
        return own["scale"][..., None] * change + (own["scale"] - 1)[..., None] * weight
