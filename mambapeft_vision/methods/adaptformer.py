"""AdaptFormer (arXiv 2205.13535) on a vision transformer: a bottleneck beside the whole MLP of every block."""

from torch import nn

from mambapeft_vision.methods.method import Method, blocks_of, require_dropout, require_positive, site_key
from mambapeft_vision.methods.parallel_adapter import Bottleneck


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

    def attach(self, model: nn.Module) -> None:
        square = model.cls_token.new_empty(model.embed_dim, model.embed_dim)
        for name, block in blocks_of(model, self.name).items():
            site = Bottleneck(square, self.rank, self.scale, self.dropout)
            self.sites[site_key(f"{name}.mlp")] = site
            block.mlp.side.add(self.name, site)
