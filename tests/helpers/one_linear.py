"""A model that is one linear map with ports, for tests of methods on weights alone."""

import torch
from torch import Tensor, nn

from mambapeft_vision.backbones.layers import PortedLinear
from mambapeft_vision.methods.method import Method


class OneLinear(nn.Module):
    """y = W x + bias with W as the role in_proj, its halves of rows as x and z."""

    def __init__(self, out_features: int, in_features: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = PortedLinear(in_features, out_features, bias, name="proj")
        generator = torch.Generator().manual_seed(5)
        for name, p in self.proj.named_parameters():
            values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            setattr(self.proj, name, nn.Parameter(values, requires_grad=False))
        self.roles = {"in_proj": ("proj.weight",)}

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        half = self.proj.out_features // 2
        return {"x": slice(0, half), "z": slice(half, 2 * half)}

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)

    @property
    def present(self) -> Tensor:
        """The weight as it is read, with all deltas."""
        return self.proj.read("weight")


def attached(method: Method, out_features: int, in_features: int, move: float = 0.3, bias: bool = True) -> OneLinear:
    """The model with the method attached and its tensors moved away from their start, by `move` times normal values."""
    model = OneLinear(out_features, in_features, bias)
    torch.manual_seed(11)
    method.name = "mine"
    method.attach(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in method.owned().values():
            p += move * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def tensors(method: Method) -> dict[str, Tensor]:
    """The method's tensors for the one weight, by their last names."""
    return {name.rpartition(".")[2]: p for name, p in method.owned().items()}
