"""timm's contract for models of tokens, which every backbone here fulfils.

A backbone says how it embeds an image, how tokens pass its blocks and how its special tokens are read out. Heads,
pooling, intermediate features, checkpointing and weight-decay groups follow from that. Names and behaviour are those of
timm's `VisionTransformer`.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambapeft_vision.backbones.layers import PatchEmbed, both_sides, zero_head
from mambapeft_vision.backbones.layout import TokenLayout, select
from mambapeft_vision.backbones.ports import FunctionPort, InputPort, Ported
from mambapeft_vision.utils.errors import UserError

_POOLS = {
    "token": "the special tokens",
    "avg": "the mean over patches",
    "max": "the maximum over patches",
    "avgmax": "the mean of both",
    "": "all tokens as they are",
}


class State(NamedTuple):
    """Tokens between two blocks."""

    hidden: Tensor  # [B, L, D]
    layout: TokenLayout
    residual: Tensor | None = None  # [B, L, D] to which `hidden` is still to be added, where a backbone keeps it apart
    branch_scale: Tensor | None = None  # [B], the drop-path factor of `hidden`


class TimmModel(Ported):
    """Base of backbones: timm's interface of a model.

    A subclass makes its blocks, final norm and `head`, calls `init_new`, and implements `layout_of`, `embed` and
    `init_weights`. Where tokens pass its blocks in another way than one after another, it overrides `run_blocks` and
    `normed`; where its special tokens are not simply joined for the head, `read_special` and `special_width`.

    Args:
        img_size: height and width of the images (or one number for both).
        patch_size, stride: sizes of the patch embedding; stride defaults to patch_size.
        embed_dim: D, of every token.
        in_chans: channels of the images.
        num_classes: 0 for features only. The head starts at zero.
        global_pool: what the head reads: "token" (the special tokens), "avg", "max", "avgmax" (over the patches), or
            "" (all tokens as they are).
        drop_rate: dropout in front of the head.
        patch_embed: another than `PatchEmbed`, with `img_size` and `grid_size`.
    """

    pos_embed: nn.Parameter
    head: nn.Module

    # Set where weights are loaded from a file (see `weights`).
    loaded: Any = None
    not_in_file: tuple[str, ...] = ()  # parameters that the file does not hold

    #: Names of the list of blocks and of the final norm.
    blocks_name = "layers"
    norm_name = "norm_f"
    #: Modules between the final norm and the head that the special tokens pass.
    readout_names: tuple[str, ...] = ()

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        stride: int | None,
        embed_dim: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        patch_embed: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if patch_embed is None:
            patch_embed = PatchEmbed(both_sides(img_size), patch_size, stride or patch_size, in_chans, embed_dim)
        self.patch_embed: Any = patch_embed
        self.embed_dim = self.num_features = embed_dim
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.prompt, self.feature = InputPort("prompt"), FunctionPort("feature")
        self._set_pool(global_pool)
        # The entry point that builds a registered model replaces both: timm's record, and the sizes that make it.
        self.pretrained_cfg: dict[str, Any] = {"architecture": type(self).__name__}
        self.architecture: dict[str, Any] = {}

    # -- what a backbone implements ---------------------------------------------------------------------------

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """The layout of embedded tokens for a grid of patches, its special tokens read out."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        """[B, C, H, W] → the tokens [B, L, D] that enter the first block, prompts included, and their layout."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Draws all parameters anew."""
        raise NotImplementedError

    def init_new(self) -> None:
        """The last step of making a model. One without values (on the meta device) has nothing to draw."""
        if not next(self.parameters()).is_meta:
            self.init_weights()

    @property
    def special_width(self) -> int:
        """Features of an image that `read_special` returns."""
        return len(self.layout.special) * self.embed_dim

    def read_special(self, tokens: Tensor) -> Tensor:
        """The special tokens [B, n, D] → the feature [B, special_width] that the head reads."""
        return tokens.flatten(1)

    def run_blocks(
        self, tokens: Tensor, layout: TokenLayout, take: Collection[int] = (), stop: int | None = None
    ) -> tuple[State, list[State]]:
        """The state after the last block (or after `stop` blocks), and that after each block of `take`.

        Here a block maps tokens and layout to tokens and layout.
        """
        taken = []
        for i, block in enumerate(self.block_list[:stop]):
            if self.grad_checkpointing:
                tokens, layout = checkpoint(block, tokens, layout, use_reentrant=False)
            else:
                tokens, layout = block(tokens, layout)
            if i in take:
                taken.append(State(tokens, layout))
        return State(tokens, layout), taken

    def normed(self, state: State, positions: Sequence[int] | None = None) -> Tensor:
        """[B, L, D] after the final norm; or the tokens at `positions` alone."""
        norm = getattr(self, self.norm_name)
        return norm(state.hidden if positions is None else select(state.hidden, positions))

    # -- features and logits ----------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, num_classes] logits; without classes, what a head would read."""
        state, _ = self.run_blocks(*self.embed(images))
        if self.global_pool != "token":
            return self._head(self.pool(self.normed(state), state.layout))
        # Only the special tokens leave the network, so only they are normalised.
        return self._head(self.read_special(self.normed(state, state.layout.special)))

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → all tokens [B, L, D] after the final norm."""
        state, _ = self.run_blocks(*self.embed(images))
        return self.normed(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The output of `forward_features` → logits; with `pre_logits` the head's input, [B, head_hidden_size]."""
        return self._head(self.pool(x, self.output_layout()), pre_logits)

    def _head(self, feature: Tensor, pre_logits: bool = False) -> Tensor:
        feature = F.dropout(self.feature(feature), self.drop_rate, self.training)
        return feature if pre_logits else self.head(feature)

    def pool(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """[B, L, D] → what the head reads (see `global_pool`)."""
        if tokens.ndim != 3 or tokens.shape[1] != layout.length:
            raise UserError(
                f"tokens to read out have shape {tuple(tokens.shape)}; expected [B, {layout.length}, D]: all tokens "
                f"that forward_features returns"
            )
        if self.global_pool == "":
            return tokens
        if self.global_pool == "token":
            return self.read_special(select(tokens, layout.special))
        patches = select(tokens, layout.patches)
        if self.global_pool == "max":
            return patches.amax(1)
        mean = self.mean_of_patches(patches, layout)
        return mean if self.global_pool == "avg" else 0.5 * (mean + patches.amax(1))

    def mean_of_patches(self, patches: Tensor, layout: TokenLayout) -> Tensor:
        """[B, P, D] → [B, D]."""
        return patches.mean(1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Tokens after chosen blocks, as timm's `VisionTransformer.forward_intermediates` returns them.

        Args:
            x: images [B, C, H, W].
            indices: indices of blocks. A number takes that many last blocks, None all.
            return_prefix_tokens: beside the patches, also the special tokens [B, n, D].
            norm: apply the final norm to each.
            stop_early: leave out blocks behind the last one asked for.
            output_fmt: "NCHW" (maps [B, D, rows, columns]) or "NLC" (patches [B, P, D]).
            intermediates_only: without the final features.
            output_dict: a dict with `image_intermediates`, `image_intermediates_prefix` and `image_features`.
        Returns: (all tokens [B, L, D] after the final norm, the list of intermediates), or as the arguments say.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt={output_fmt!r}; expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.block_list), indices)
        state, taken = self.run_blocks(*self.embed(x), take, last + 1 if stop_early else None)
        tokens = [(self.normed(s) if norm else stream(s), s.layout) for s in taken]
        intermediates: list[Any] = [select(t, layout.patches) for t, layout in tokens]
        if output_fmt == "NCHW":
            intermediates = [
                patches.transpose(1, 2).unflatten(2, layout.grid).contiguous()
                for patches, (_, layout) in zip(intermediates, tokens)
            ]
        special = [select(t, layout.special) for t, layout in tokens if layout.special]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if return_prefix_tokens and special:
                result["image_intermediates_prefix"] = special
            return result if intermediates_only else {**result, "image_features": self.normed(state)}
        if return_prefix_tokens and special:
            intermediates = list(zip(intermediates, special))
        return intermediates if intermediates_only else (self.normed(state), intermediates)

    @property
    def images(self) -> FunctionPort:
        """The images [B, C, H, W], before they are embedded."""
        return self.patch_embed.images

    # -- heads ------------------------------------------------------------------------------------------------

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in _POOLS:
            known = ", ".join(f"{name!r} ({what})" for name, what in _POOLS.items())
            raise UserError(f"global_pool={global_pool!r}; expected one of {known}")
        self.global_pool = global_pool
        layout = self.layout_of(self.patch_embed.grid_size)
        if global_pool == "token" and not layout.special:
            raise UserError(f"global_pool='token', but {type(self).__name__} has no special tokens; choose 'avg'")
        #: Of the embedded tokens, without prompts.
        self.layout = layout if global_pool == "token" else replace(layout, readout="mean")

    @property
    def head_hidden_size(self) -> int:
        """Features that the head reads."""
        return self.special_width if self.global_pool == "token" else self.num_features

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name of `pretrained_cfg`."""
        return self.pretrained_cfg

    @default_cfg.setter
    def default_cfg(self, record: dict[str, Any]) -> None:
        self.pretrained_cfg = record

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new zero head for `num_classes` classes (0: none), on this model's device and in its dtype.

        global_pool: see the class; None: as it is.
        """
        if global_pool is not None:
            if global_pool == "token" and any(getattr(self, name, self) is None for name in self.readout_names):
                raise UserError("global_pool='token' reads what was pruned away; choose 'avg', 'max', 'avgmax' or ''")
            self._set_pool(global_pool)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        like = {"device": parameter.device, "dtype": parameter.dtype}
        self.head = zero_head(self.head_hidden_size, num_classes, **like).train(self.training)

    # -- what timm's tools and methods ask --------------------------------------------------------------------

    @property
    def block_list(self) -> Any:
        """The `nn.ModuleList` of blocks."""
        return getattr(self, self.blocks_name)

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        """Named blocks of output rows of a weight, e.g. {"x": …, "z": …} for "layers.0.mixer.in_proj.weight"."""
        path, _, module = parameter.rpartition(".")[0].rpartition(".")
        owner = self.get_submodule(path)
        return {} if owner is self else getattr(owner, "row_blocks", {}).get(module, {})

    def output_layout(self) -> TokenLayout:
        """The layout of what `forward_features` returns; it is static once methods are attached."""
        return self.layout.through((self.prompt, *(block.input for block in self.block_list)), self.pos_embed)

    @property
    def num_prefix_tokens(self) -> int:
        """How many special tokens there are; they need not stand in front."""
        return len(self.layout.special)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry for each block: its channels, its stride in pixels and its name."""
        stride = self.patch_embed.proj.stride[0]
        return [
            {"num_chs": self.embed_dim, "reduction": stride, "module": f"{self.blocks_name}.{i}"}
            for i in range(len(self.block_list))
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that no optimiser should decay: tokens, positions, and A, of which a scan takes exponentials.

        So are biases; timm knows them by their one axis, but not those of VMamba's four directions.
        """
        tokens, ends = ("cls_token", "pos_embed", "pos_embed_cls"), ("_log", "A_logs", "dt_projs_bias")
        return {name for name, _ in self.named_parameters() if name in tokens or name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of parameter names, from the input to the head, for layer-wise learning rates."""
        last = "|".join(rf"^{name}\." for name in (self.norm_name, *self.readout_names))
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(rf"^{self.blocks_name}\.(\d+)", None), (last, (99999,))],
        }

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks (and norm and head) that these intermediates do not need; returns their indices."""
        take, last = feature_take_indices(len(self.block_list), indices)
        setattr(self, self.blocks_name, self.block_list[: last + 1])
        if prune_norm:
            setattr(self, self.norm_name, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
            for name in self.readout_names:
                setattr(self, name, None)
        return take

    # -- checkpoints -----------------------------------------------------------------------------------------

    #: What `weights` calls models whose checkpoints have these keys.
    family: str

    def convert_checkpoint(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """A published file's tensors as this model has them (positions may still have another grid).

        Returns: the tensors, and the names of the tensors that were added because such a file lacks them.
        """
        return state, ()

    def official_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This model's tensors, head included, under the names that published files have, in their order."""
        return state


def stream(state: State) -> Tensor:
    """[B, L, D]: the tokens that a state stands for."""
    hidden = state.hidden if state.branch_scale is None else state.hidden * state.branch_scale[:, None, None]
    return hidden if state.residual is None else state.residual + hidden
