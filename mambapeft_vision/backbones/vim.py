"""Vision Mamba (Vim, arXiv 2401.09417): bidirectional v2, class token in the middle, halved sum of directions.

Plain PyTorch that knows nothing of PEFT. Parameter names are those of the official checkpoints.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambapeft_vision.backbones.build import EMBEDDED_WEIGHTS, build, cfg
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.residual_stack import ResidualStack


class Vim(ResidualStack):
    """Vision Mamba: tokens in, residual += drop_path(hidden), hidden = mixer(RMSNorm(residual)), class token out.

    Args:
        img_size: height and width (or one number for both).
        patch_size, stride: sizes of the patch embedding.
        embed_dim, depth, d_state, d_conv, expand, dt_rank: sizes; dt_rank defaults to ceil(embed_dim / 16).
        num_classes: 0 for features only. The head starts at zero.
        drop_path_rate: see `ResidualStack.add_blocks`.
        norm_eps: epsilon of the RMSNorms.
        halve_sum: average the two directions (the official models do) instead of adding them.
        global_pool, drop_rate: see `TimmModel`.
        further_dt_bias: how the backward direction's dt_proj.bias starts; see `Mixer.init_weights`.
    """

    family = "vim"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        num_classes: int = 1000,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-5,
        halve_sum: bool = True,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        further_dt_bias: str = "drawn",
    ) -> None:
        super().__init__(img_size, patch_size, stride, embed_dim, in_chans, num_classes, global_pool, drop_rate)
        self.further_dt_bias = further_dt_bias
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.layout.length, embed_dim))
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.add_blocks(depth, drop_path_rate, norm_eps, halve_sum=halve_sum, **sizes)
        self.init_new()

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """One class token in the middle of the patches."""
        patches = grid[0] * grid[1]
        return TokenLayout(patches + 1, grid, special=(patches // 2,), readout=(patches // 2,))

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        patches, (middle,) = self.patch_embed(images), self.layout.special
        class_token = self.read("cls_token").to(patches.dtype).expand(patches.shape[0], -1, -1)
        tokens = torch.cat((patches[:, :middle], class_token, patches[:, middle:]), dim=1) + self.read("pos_embed")
        return self.prompt(tokens, self.layout)

    def init_weights(self) -> None:
        """Vim's own initialisation of everything; the head is zero."""
        self.patch_embed.init_weights()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.init_blocks(self.further_dt_bias)


def _hub(repository: str, file: str) -> dict[str, Any]:
    return cfg(
        crop_mode="squash",
        hf_hub_id=f"hustvl/{repository}",
        hf_hub_filename=file,
        license="apache-2.0",
        origin_url="https://github.com/hustvl/Vim",
        paper_ids="arXiv:2401.09417",
    )


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224": _hub("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_small_patch16_224": _hub("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_base_patch16_224": _hub("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
        "vim_tiny_patch16_stride8_224": _hub("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_stride8_224": _hub("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base_patch16_stride8_224": cfg(crop_mode="squash"),
        "vim_pico_patch8_32": cfg(32, crop_mode="squash"),
        "vim_nano_patch8_64": cfg(
            64, crop_mode="squash", file=str(EMBEDDED_WEIGHTS / "vim_nano.safetensors"), license="apache-2.0"
        ),
    }
)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 197 tokens."""
    return build(Vim, "vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 197 tokens."""
    return build(Vim, "vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 197 tokens."""
    return build(Vim, "vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti with overlapping patches, 730 tokens."""
    return build(Vim, "vim_tiny_patch16_stride8_224", pretrained, {"stride": 8, "embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S with overlapping patches, 730 tokens."""
    return build(Vim, "vim_small_patch16_stride8_224", pretrained, {"stride": 8, "embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B with overlapping patches, 730 tokens; no published weights."""
    return build(Vim, "vim_base_patch16_stride8_224", pretrained, {"stride": 8, "embed_dim": 768}, kwargs)


@register_model
def vim_pico_patch8_32(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A very small Vim (17 tokens) for tests and the demo; no pretrained weights."""
    return build(Vim, "vim_pico_patch8_32", pretrained, {"patch_size": 8, "embed_dim": 64, "depth": 4}, kwargs)


@register_model
def vim_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A small Vim (65 tokens) with weights of our own in the package (docs/how-to/pretrain.md), for demos and tests."""
    sizes = {"patch_size": 8, "embed_dim": 192, "depth": 6, "d_state": 8, "expand": 1}
    return build(Vim, "vim_nano_patch8_64", pretrained, sizes, kwargs)
