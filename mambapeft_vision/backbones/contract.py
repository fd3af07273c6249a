"""The contract between backbones and methods: the parts of a backbone that methods may use, and the values of ports.

Methods import this file and no other of the backbones. A backbone is plain PyTorch; it need not import the protocols.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from mambapeft_kernels.derivatives import attention, transformed
from torch import Tensor, nn

from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.ports import (
    AffixPort,
    BranchPort,
    FunctionBranch,
    FunctionPort,
    InputPort,
    Joined,
    LowRankBranch,
    Port,
    Ported,
    PrefixPort,
    ReplacePort,
    SidePort,
    TapPort,
    WeightPort,
    bake_weights,
    frozen_casts,
    taken_ports,
)

__all__ = [
    "ROLES",
    "AffixPort",
    "Backbone",
    "Block",
    "BranchPort",
    "FunctionBranch",
    "FunctionPort",
    "InputPort",
    "Joined",
    "LowRankBranch",
    "Mixer",
    "Port",
    "Ported",
    "PrefixPort",
    "ReplacePort",
    "SidePort",
    "TapPort",
    "TokenLayout",
    "WeightPort",
    "attention",
    "bake_weights",
    "frozen_casts",
    "taken_ports",
    "transformed",
]

#: Role → what has it. Roles of linear maps and convolutions are their weights; biases have roles of their own or none.
ROLES: dict[str, str] = {
    "patch_embed": "weight of the patch embedding",
    "pos_embed": "position embedding",
    "cls_token": "class or register tokens",
    "norm": "weights (and biases) of all norms",
    "in_proj": "linear map into the mixer; its rows: x, z",
    "out_proj": "linear map out of the mixer",
    "x_proj": "linear map to the scan's Δ, B and C; its rows: d, b, c",
    "dt_proj": "linear map from the low-rank Δ to the channels",
    "dt_bias": "bias of Δ",
    "conv": "filters of the mixer's convolution",
    "A_log": "log(-A) of the scan",
    "D": "skip connection of the scan",
    "mlp_up": "first linear map of the MLP",
    "mlp_down": "last linear map of the MLP",
    "mlp_gate": "linear map to the gate of the MLP",
    "qkv": "linear map to queries, keys and values; its rows: q, k, v",
    "attn_out": "linear map out of the attention",
    "neck": "linear map between the last block and the head",
}


class Mixer(Protocol):
    """A mixer of selective scans: [B, L, D] → [B, L, D], with E channels and N states in each direction."""

    name: str  # the module's name within the backbone
    suffixes: tuple[str, ...]  # one for each scan direction: the ending of its parameters' names
    affix: AffixPort | PrefixPort  # tokens beside the image's, or in front of each direction's own sequence
    gate: Port  # z [B, L, E] → the tensor whose silu gates the output
    state_offset: Port  # () → one [E, N] for each direction
    output_offset: Port  # () → one [E] for each direction

    @property
    def d_inner(self) -> int:
        """E."""

    @property
    def d_state(self) -> int:
        """N of the frozen weights."""

    @property
    def states(self) -> int:
        """N as the scan has it, states that methods add included."""


class Block(Protocol):
    """One block of a backbone."""

    name: str
    embed_dim: int  # D of its tokens
    input: InputPort  # tokens that enter the block
    replace: ReplacePort  # tokens that enter the block, where others take their place
    mixer_branch: BranchPort  # on the token mixer (the scans, the attention)
    tap: TapPort  # tokens that leave it

    @property
    def mlp_branch(self) -> BranchPort | None:
        """On the MLP; None: the block has none."""

    @property
    def after(self) -> SidePort | None:
        """Beside the identity on the block's output; None: the block has no such place."""

    @property
    def mlp_side(self) -> SidePort | None:
        """Beside the whole MLP; None: the block has no such place."""


class Backbone(Protocol):
    """A backbone: an `nn.Module` with timm's attributes, roles, a token layout and ports."""

    # timm
    embed_dim: int
    num_features: int
    num_classes: int
    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]  # the same; its "architecture" is the registered name
    head: nn.Module

    # Where it comes from
    architecture: dict[str, Any]  # sizes that make it, besides those of its registered name
    not_in_file: tuple[str, ...]  # parameters that its file of weights did not hold

    # Parts
    layout: TokenLayout  # layout of the embedded tokens, without prompts
    prompt: InputPort  # the embedded tokens, once, before the first block
    feature: FunctionPort  # on the head's input, [B, head_hidden_size]

    @property
    def images(self) -> FunctionPort:
        """The images [B, C, H, W], before they are embedded."""

    @property
    def head_hidden_size(self) -> int:
        """Features that the head gets."""

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """Role (see `ROLES`) → names of parameters, block after block, direction after direction."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks, first to last."""

    @property
    def mixers(self) -> Sequence[Mixer]:
        """The mixers of selective scans, first to last; empty where there are none."""

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        """Named blocks of the rows (axis -2) of a weight; empty where it has none."""

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """The layout of embedded tokens for another grid of patches."""

    def output_layout(self) -> TokenLayout:
        """The layout of what `forward_features` returns; it is static once methods are attached."""

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → all tokens [B, L', D] after the final norm."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L', D] → logits [B, classes], or the features [B, num_features] that the head gets."""

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → logits, or the features where there are no classes."""

    def reset_classifier(self, num_classes: int) -> None:
        """Gives the model a new zero head for `num_classes` classes; 0: none."""

    def get_classifier(self) -> nn.Module:
        """The head."""

    def init_weights(self) -> None:
        """Draws all parameters anew."""

    def set_kernel(self, kernel: str, device: torch.device | str) -> str:
        """Chooses the kernel backend and returns the name of the backend that will run on `device`."""

    def compile_ahead(self, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[Future[Any], ...]:
        """Starts to compile the kernels for activations of `dtype`; returns futures to wait for."""

    # Inherited from nn.Module

    training: bool

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def modules(self) -> Iterator[nn.Module]: ...
