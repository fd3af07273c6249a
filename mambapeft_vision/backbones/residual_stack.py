"""The shared part of Vim, Mamba-Reg and VideoMamba: blocks on a residual sum, drop path and the final norm."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambapeft_vision.backbones.drop_path import BranchScales
from mambapeft_vision.backbones.layers import zero_head, zero_init
from mambapeft_vision.backbones.layout import TokenLayout, select
from mambapeft_vision.backbones.mixer import Block, RMSNorm
from mambapeft_vision.backbones.scan_model import ScanModel
from mambapeft_vision.backbones.timm_model import State, stream


class ResidualStack(ScanModel):
    """residual += drop_path(hidden); hidden = mixer(RMSNorm(residual)) for each block; then a last add and RMSNorm.

    A subclass makes its own parameters and then calls `add_blocks`, so that the names in its state dict stand in the
    order of the official checkpoints. It implements `layout_of` and `embed`.
    """

    def add_blocks(self, depth: int, drop_path_rate: float, norm_eps: float, **mixer: Any) -> None:
        """The head, the blocks and the final norm.

        Args:
            drop_path_rate: block i drops its incoming branch with rate linspace(0, rate, depth)[i - 1] (block 0 never),
                and the last branch, before the final norm, with `drop_path_rate`.
            norm_eps: epsilon of the RMSNorms.
            mixer: sizes of the mixers.
        """
        self.head = zero_head(self.head_hidden_size, self.num_classes)
        self.layers = nn.ModuleList(
            Block(self.embed_dim, name=f"layers.{i}", norm_eps=norm_eps, **mixer) for i in range(depth)
        )
        self.norm_f = RMSNorm(self.embed_dim, norm_eps, name="norm_f")
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        # One rate for the branch entering each block, and one for the branch entering the final norm.
        self.branch_scales = BranchScales([*rates[:depth], drop_path_rate])

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        norms = (*(f"layers.{i}.norm.weight" for i in range(len(self.layers))), "norm_f.weight")
        return {**super().roles, "norm": norms}

    def run_blocks(
        self, tokens: Tensor, layout: TokenLayout, take: Collection[int] = (), stop: int | None = None
    ) -> tuple[State, list[State]]:
        scales = self.branch_scales(tokens.shape[0])
        state, taken = State(tokens, layout), []
        for i, layer in enumerate(self.layers[:stop]):
            arguments = state.hidden, state.residual, state.branch_scale, state.layout
            if self.grad_checkpointing:
                hidden, residual, layout = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden, residual, layout = layer(*arguments)
            state = State(hidden, layout, residual, None if scales is None else scales[i + 1])
            if i in take:
                taken.append(state)
        return state, taken

    def normed(self, state: State, positions: Sequence[int] | None = None) -> Tensor:
        if isinstance(self.norm_f, nn.Identity):  # pruned away
            total = stream(state)
            return total if positions is None else select(total, positions)
        parts = state.hidden, state.residual
        hidden, residual = (t if t is None or positions is None else select(t, positions) for t in parts)
        return self.norm_f(hidden, residual, state.branch_scale)[0]

    def init_blocks(self, further_dt_bias: str = "drawn") -> None:
        """The initialisation of blocks, final norm and head that Vim and Mamba-Reg share; see `Mixer.init_weights`."""
        for block in self.blocks:
            block.mixer.init_weights(len(self.layers), further_dt_bias)
            nn.init.ones_(block.norm.weight)
        nn.init.ones_(self.norm_f.weight)
        zero_init(self.head)
        self.branch_scales.fill()
