"""LoKr: low-rank Kronecker products (LyCORIS, arXiv 2309.14859)."""

import math
from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta, divisor_up_to, uniform


class LoKr(WeightDelta):
    """W' = W + s · W_1 ⊗ W_2, with the sides of W cut into factors as equal as they can be.

    out = o_1 · o_2 and in = i_1 · i_2, with o_1 and i_1 the largest divisors up to the square root: W_1 [o_1, i_1] is
    the smaller matrix. W_2 [o_2, i_2] is up · down of rank r where r is below half its longer side, else a whole
    matrix. W_1 starts at zero, W_2 as `nn.Linear` does.

    Args:
        targets, rows: see `WeightDelta`.
        rank: r of W_2.
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
        out_1, in_1 = (divisor_up_to(math.isqrt(size), size) for size in (out_features, in_features))
        out_2, in_2 = out_features // out_1, in_features // in_1
        first = {"first": weight.new_zeros(*groups, out_1, in_1)}
        if self.rank >= max(out_2, in_2) / 2:
            return {**first, "second": uniform(weight, *groups, out_2, in_2)}
        return {
            **first,
            "down": uniform(weight, *groups, self.rank, in_2),
            "up": uniform(weight, *groups, out_2, self.rank),
        }

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        second = own["second"] if "second" in own else own["up"] @ own["down"]
        # [..., o_1, 1, i_1, 1] · [..., 1, o_2, 1, i_2]; torch.kron knows no groups.
        product = (self.scale * own["first"])[..., :, None, :, None] * second[..., None, :, None, :]
        return product.reshape(weight.shape)
