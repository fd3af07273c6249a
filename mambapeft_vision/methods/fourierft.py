"""FourierFT: discrete Fourier transform fine-tuning (arXiv 2405.03003)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mambapeft_vision.methods.c3a import require_init
from mambapeft_vision.methods.checks import require_positive
from mambapeft_vision.methods.weight_delta import WeightDelta
from mambapeft_vision.utils.errors import UserError


class FourierFT(WeightDelta):
    """W' = W + α Re(ifft2(F)), F [out, in] zero but for n trained coefficients at random places.

    All weights of one shape have their coefficients at the same places, as published; these are saved with the adapter.

    The transform is a fast one. As products with matrices of cosines and sines it would take 4 · out · in · n
    operations, 2.4e9 for in_proj of Vim-S and n = 1000, against 6e7 of the fast transform. It runs in float32.

    Args:
        targets, rows: see `WeightDelta`.
        n_frequency: n; at most the entries of every target.
        scale: α.
        init: "published": coefficients normal with variance 1, so that the model does not start as the base model;
            "zero": it does.
    """

    def __init__(
        self,
        *,
        targets: str | list[str],
        n_frequency: int = 1000,
        scale: float = 150.0,
        init: str = "published",
        rows: str | None = None,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(targets=targets, rows=rows, lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, n_frequency=n_frequency)
        require_init(self, init)
        self.n_frequency, self.scale, self.init = n_frequency, scale, init
        self._entries: dict[str, int] = {}  # buffer of places → entries of the weights that it is for

    @property
    def identity_at_init(self) -> bool:
        return self.init == "zero"

    def share(self, weights: Mapping[str, Tensor]) -> None:
        for parameter, weight in weights.items():
            name, entries = _places_name(weight), weight.shape[-2] * weight.shape[-1]
            if self.n_frequency > entries:
                raise UserError(
                    f"{self.name}: n_frequency={self.n_frequency}, but {parameter} has {entries} entries; lower "
                    f"n_frequency or change targets"
                )
            if name not in self._entries:
                self._entries[name] = entries
                # On shapes alone, no permutation is drawn: a config can name sizes beyond the memory of a machine.
                drawn = torch.arange(self.n_frequency) if weight.is_meta else torch.randperm(entries, device="cpu")
                places = drawn[: self.n_frequency].sort().values
                self.register_buffer(name, places.to(weight.device))

    def start(self, weight: Tensor) -> Mapping[str, Tensor]:
        spectrum = weight.new_zeros(*weight.shape[:-2], self.n_frequency)
        return {"spectrum": spectrum.normal_() if self.init == "published" else spectrum}

    def delta(self, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        spectrum = torch.zeros_like(weight, dtype=own["spectrum"].dtype).flatten(-2)
        spectrum[..., self.get_buffer(_places_name(weight))] = own["spectrum"]
        return self.scale * torch.fft.ifft2(spectrum.view_as(weight)).real

    def index_limits(self) -> dict[str, int]:
        return dict(self._entries)


def _places_name(weight: Tensor) -> str:
    return f"places_{weight.shape[-2]}x{weight.shape[-1]}"
