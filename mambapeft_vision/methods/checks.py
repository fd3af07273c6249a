"""Checks of methods' arguments and targets. Each raises a UserError that says what was expected."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from mambapeft_vision.backbones.contract import Backbone, BranchPort, SidePort
from mambapeft_vision.methods.method import Method
from mambapeft_vision.methods.targets import owner_module
from mambapeft_vision.utils.errors import UserError


def require_positive(method: Method, **values: int) -> None:
    """Raises for sizes (ranks, token counts, …) that are not whole numbers >= 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(
                f"{type(method).__name__}: {name}={value!r}; expected a whole number >= 1 "
                f"(to switch the method off, leave it out of method=[...])"
            )


def require_dropout(method: Method, dropout: float) -> None:
    """Raises for a dropout rate outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise UserError(f"{type(method).__name__}: dropout={dropout!r}; expected 0 <= dropout < 1")


def require_matrix(weight: Tensor, parameter: str, who: str) -> None:
    """Raises for a bias, a norm, D, …: a vector has no rank to lower."""
    if weight.ndim < 2:
        raise UserError(
            f"{who}: {parameter} is a vector of {weight.numel()} numbers; expected a weight of two dimensions or more. "
            f"Change targets, or train it with Offset"
        )


def side_port(model: Backbone, parameter: str) -> SidePort | None:
    """The port beside the map whose weight a parameter is; None where there is none."""
    module, attribute = owner_module(model, parameter)
    side = getattr(module, "side", None)
    return side if attribute == "weight" and isinstance(side, SidePort) else None


def require_ported_linear(model: Backbone, parameter: str, who: str) -> tuple[nn.Linear, SidePort]:
    """The linear map whose weight a parameter is, and the port beside it. Raises where there is no such port."""
    module, side = owner_module(model, parameter)[0], side_port(model, parameter)
    if side is None or not isinstance(module, nn.Linear):
        raise UserError(
            f"{who}: {parameter} is no weight of a linear map with a port on activations; change targets to in_proj or "
            f"out_proj (Vim), or to qkv, attn_out, mlp_up or mlp_down (ViT)"
        )
    return module, side


class Branch(NamedTuple):
    """A residual branch of a block. width: width of its tokens."""

    port: BranchPort
    width: int


def branches_of(model: Backbone, who: str, last_only: bool = False) -> list[Branch]:
    """The residual branches of all blocks (token mixer, MLP where there is one), first to last.

    last_only: only the last branch of each block. Raises UserError for a block without such ports.
    """
    found = []
    for block in model.blocks:
        ports = [getattr(block, name, None) for name in ("mixer_branch", "mlp_branch")]
        branches = [Branch(port, block.embed_dim) for port in ports if port is not None]
        if not branches:
            raise UserError(
                f"{who} works on the residual branches of every block, but {type(model).__name__} has no ports there "
                f"in {block.name}; use another backbone"
            )
        found += branches[-1:] if last_only else branches
    return found


def undecayed_biases(method: Method) -> list[dict[str, Any]]:
    """Optimiser groups where tensors of one dimension (biases, scales) have no weight decay."""
    owned = list(method.owned().values())
    return [
        {"params": [p for p in owned if p.ndim > 1], "lr_mult": method.lr_mult, "decay_mult": method.decay_mult},
        {"params": [p for p in owned if p.ndim == 1], "lr_mult": method.lr_mult, "decay_mult": 0.0},
    ]
