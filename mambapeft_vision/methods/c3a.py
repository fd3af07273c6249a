"""C3A: circular convolution adaptation (arXiv 2407.19342)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta, divisor_up_to
from mambapeft_vision.utils.errors import UserError


class C3A(WeightDelta):
    """W' = W + C / in, C block-circulant: block (m, n) has the entries C[k, j] = w_mn[(j - k) mod b].

    The published form multiplies by C with FFTs on the activations. Here C is written out, which takes one copy of the
    weight's size, and is added to the weight. At these sizes (b ≤ 384, and 12,608 tokens in a batch of 64) the product
    with the whole matrix, which is taken anyway, is cheaper than transforms of every token. FFTs have no bfloat16 form.

    Args:
        targets, rows: see `WeightDelta`.
        block_size: b; the largest number up to it that divides both sides of a weight is taken.
        init: "published": kernels Xavier-uniform in the sides of the weight, so that the model does not start as the
            base model; "zero": it does.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        block_size: int,
        init: str = "published",
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, block_size=block_size)
        require_init(self, init)
        self.block_size, self.init = block_size, init

    @property
    def identity_at_init(self) -> bool:
        return self.init == "zero"

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, out_features, in_features = weight.shape
        size = divisor_up_to(self.block_size, out_features, in_features)
        kernels = weight.new_zeros(*groups, out_features // size, in_features // size, size)
        if self.init == "published":
            bound = math.sqrt(6 / (out_features + in_features))
            kernels.uniform_(-bound, bound)
        return {"kernels": kernels}

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        return block_circulant(own["kernels"] / weight.shape[-1])


def block_circulant(kernels: Tensor) -> Tensor:
    """Kernels w [..., M, N, b] → the matrix [..., M b, N b] with w[m, n, (j - k) mod b] at (m b + k, n b + j)."""
    size = kernels.shape[-1]
    # The kernel, repeated b - 1 times and cut into rows of b - 1, is C without its last column: every row starts one
    # place earlier in it. Copies only, so the gradient is a sum of slices.
    times = [1] * (kernels.ndim - 1)
    columns = kernels.repeat(*times, size - 1).unflatten(-1, (size, size - 1))
    blocks = torch.cat((columns, kernels.flip(-1)[..., None]), dim=-1)  # [..., m, n, b, b]
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def require_init(method: WeightDelta, init: str) -> None:
    """Raises UserError for a start that is neither the published one nor zero."""
    if init not in ("published", "zero"):
        raise UserError(f"{type(method).__name__}: init={init!r}; expected 'published' or 'zero'")
