"""AdaptFormer (arXiv 2205.13535) on a vision transformer: a bottleneck beside the whole MLP of every block."""

from torch import nn

from mambapeft_vision.backbones.contract import Backbone, FunctionBranch
from mambapeft_vision.methods.checks import require_dropout, require_positive
from mambapeft_vision.methods.method import Method, site_key
from mambapeft_vision.methods.parallel_adapter import Bottleneck
from mambapeft_vision.methods.targets import like
from mambapeft_vision.utils.errors import UserError


class AdaptFormer(Method):
    """out = MLP(h) + s · up(dropout(ReLU(down(h)))), h the normalised input of the MLP; no biases.

    Args:
        rank: r; down [r, D] starts as `nn.Linear` does, up [D, r] at zero.
        scale: s.
        dropout: between ReLU and up.
    """

    merge_obstacle = "the ReLU between down and up is no function of a weight"

    def __init__(
        self,
        *,
        rank: int,
        scale: float = 0.1,
        dropout: float = 0.1,
        lr_mult: float = 1.0,
        decay_mult: float = 1.0,
    ) -> None:
        super().__init__(lr_mult=lr_mult, decay_mult=decay_mult)
        require_positive(self, rank=rank)
        require_dropout(self, dropout)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.sites = nn.ModuleDict()

    def attach(self, model: Backbone) -> None:
        for block in model.blocks:
            if block.mlp_side is None:
                raise UserError(
                    f"{self.name} works beside the MLP of every block, but {type(model).__name__} has no such place in "
                    f"{block.name}; use backbone=vit_s"
                )
            square = like(model).new_empty(block.embed_dim, block.embed_dim)
            site = Bottleneck(square, self.rank, self.scale, self.dropout)
            self.sites[site_key(f"{block.name}.mlp")] = site
            block.mlp_side.add(FunctionBranch(self.name, site))
