"""OFT: orthogonal fine-tuning (arXiv 2306.07280), with the Cayley-Neumann form of OFTv2 (arXiv 2506.19847)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta, divisor_up_to
from mambapeft_vision.utils.errors import UserError

_MOST_TERMS = 64


class OFT(WeightDelta):
    """W' = W R^T, R block-diagonal and orthogonal: its blocks are (1 + Q)(1 - Q)^-1 of skew-symmetric Q.

    The entries above the diagonal of every Q train; they start at zero.

    Args:
        targets, rows: see `WeightDelta`.
        block_size: side of a block; the largest divisor of the inputs up to it is taken.
        neumann_terms: the inverse as a series, R = 1 + 2 Q + 2 Q² + … + Q^(n - 1) of n terms, which is products only,
            and orthogonal as long as Q is small; null: the exact inverse. At most 64: no tensor's size depends on
            it, so nothing else limits how long an adapter that somebody sent computes.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        block_size: int = 32,
        neumann_terms: int | None = 5,
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, block_size=block_size)
        if neumann_terms is not None and not 3 <= neumann_terms <= _MOST_TERMS:
            raise UserError(
                f"OFT: neumann_terms={neumann_terms}; expected a whole number from 3 to {_MOST_TERMS}, or null for the "
                f"inverse"
            )
        self.block_size, self.neumann_terms = block_size, neumann_terms

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, _, in_features = weight.shape
        size = divisor_up_to(self.block_size, in_features)
        if size == 1:
            raise UserError(
                f"{self.name}: nothing from 2 to block_size={self.block_size} divides the {in_features} inputs of a "
                f"target; raise block_size or change targets"
            )
        return {"skew": weight.new_zeros(*groups, in_features // size, size * (size - 1) // 2)}

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        size = weight.shape[-1] // own["skew"].shape[-2]
        return right_blocks(weight, self._rotation_less_one(skew_matrices(own["skew"], size)).mT)

    def _rotation_less_one(self, q: Tensor) -> Tensor:
        """R - 1, which keeps its precision where it is small."""
        if self.neumann_terms is None:
            return cayley_less_one(q)
        power, total = q, 2 * q
        for _ in range(2, self.neumann_terms - 1):
            power = power @ q
            total = total + 2 * power
        return total + power @ q


def skew_matrices(entries: Tensor, size: int) -> Tensor:
    """Entries above the diagonal [..., size (size - 1) / 2], row by row → skew-symmetric [..., size, size]."""
    row, column = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(*entries.shape[:-1], size, size)
    upper[..., row, column] = entries
    return upper - upper.mT


def cayley_less_one(q: Tensor) -> Tensor:
    """(1 + Q)(1 - Q)^-1 - 1 = 2 Q (1 - Q)^-1 of skew-symmetric Q [..., n, n], of which 1 - Q is never singular."""
    system = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) - q
    return torch.linalg.solve_ex(system, 2 * q, left=False)[0]  # without the check, for which the host would wait


def right_blocks(weight: Tensor, blocks: Tensor) -> Tensor:
    """W · blockdiag(blocks), for W [..., out, n b] and blocks [..., n, b, b]."""
    parts = weight.unflatten(-1, (blocks.shape[-3], blocks.shape[-1]))
    return torch.einsum("...onb,...nbc->...onc", parts, blocks).flatten(-2)
