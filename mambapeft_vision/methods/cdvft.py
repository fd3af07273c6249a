"""CDVFT: circulant and diagonal vectors (IJCAI 2025, arXiv 2505.00580)."""

import math
from collections.abc import Mapping

from torch import Tensor

from mambapeft_vision.methods.c3a import block_circulant
from mambapeft_vision.methods.weight_delta import WeightDelta


class CDVFT(WeightDelta):
    """W' = W + s diag(a_out) C diag(a_in), C block-circulant: the form of one circulant, which the authors find enough.

    The blocks of C are as large as the greatest common divisor of the sides of W allows, and each has a kernel of its
    own: lcm(out, in) parameters, and out + in for the diagonals.

    The paper states neither the start nor the scale, so these are ours: a_out is zero, a_in is one, and the kernels are
    normal with variance 1 / in, so that C keeps the size of its input.

    Args:
        targets, rows: see `WeightDelta`.
        scale: s.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        scale: float = 1.0,
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        self.scale = scale

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        *groups, out_features, in_features = weight.shape
        size = math.gcd(out_features, in_features)
        kernels = weight.new_empty(*groups, out_features // size, in_features // size, size)
        return {
            "outputs": weight.new_zeros(*groups, out_features),
            "kernels": kernels.normal_(std=in_features**-0.5),
            "inputs": weight.new_ones(*groups, in_features),
        }

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        outputs, inputs = own["outputs"][..., :, None], own["inputs"][..., None, :]
        return self.scale * outputs * block_circulant(own["kernels"]) * inputs
