"""HRA: Householder reflection adaptation (arXiv 2405.17484)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta, uniform


class HRA(WeightDelta):
    """W' = W H_1 H_2 … H_r with reflections H_i = 1 - 2 u_i u_i^T / ‖u_i‖² of the inputs: orthogonal, of low rank.

    The u_i [r, in] are drawn as `nn.Linear` draws, in pairs of equal ones, so that reflections cancel at the start.
    With an odd r they are all different, and the model does not start as the base model.

    The product is computed at once, as 1 - U T U^T with unit columns U [in, r] and upper triangular T, whose inverse
    is the upper triangle of U^T U with a diagonal of 1/2. That is three products with r columns and one small
    triangular system, instead of r products one after the other.

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

    @property
    def identity_at_init(self) -> bool:
        return self.rank % 2 == 0

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, _, in_features = weight.shape
        if self.rank % 2:
            return {"u": uniform(weight, *groups, self.rank, in_features)}
        return {"u": uniform(weight, *groups, self.rank // 2, in_features).repeat_interleave(2, dim=-2)}

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        u = own["u"] / torch.linalg.vector_norm(own["u"], dim=-1, keepdim=True)  # [..., r, in], the rows of U^T
        inner = (u @ u.mT).to(u.dtype)  # in the dtype of autocast, which the solver may not know
        inverse = inner.triu(1) + 0.5 * torch.eye(self.rank, dtype=u.dtype, device=u.device)
        return -(weight @ u.mT) @ torch.linalg.solve_triangular(inverse, u, upper=True)
