"""VideoMamba's image models (arXiv 2403.06977): Vim's blocks with the class token first and a sum that is not halved.

Parameter names and shapes are those of the official checkpoints. They are Vim's too: the architecture alone says which
of both a file is for.
"""

import math
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambapeft_vision.backbones.build import build, cfg
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.residual_stack import ResidualStack


class VideoMamba(ResidualStack):
    """Vim with the class token in front and out_proj reading the sum of both directions.

    The forward scan meets the class token first. So in the last block, where only the class token is read, the forward
    direction's A_log and all but its last convolution tap get zero gradients (with prompts in front of it they do not).

    Args: see `Vim` and `TimmModel`.
    """

    family = "videomamba"

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
        global_pool: str = "token",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(img_size, patch_size, stride, embed_dim, in_chans, num_classes, global_pool, drop_rate)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.layout.length, embed_dim))
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.add_blocks(depth, drop_path_rate, norm_eps, halve_sum=False, **sizes)
        self.init_new()

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """The class token in front of the patches."""
        return TokenLayout(grid[0] * grid[1] + 1, grid, special=(0,), readout=(0,))

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        patches = self.patch_embed(images)
        class_token = self.read("cls_token").to(patches.dtype).expand(patches.shape[0], -1, -1)
        return self.prompt(torch.cat((class_token, patches), dim=1) + self.read("pos_embed"), self.layout)

    def init_weights(self) -> None:
        """The reference's initialisation.

        Every linear map of a mixer starts as a truncated normal 0.02 with zero biases (so Δ starts near softplus(0)),
        then out_proj as Kaiming-uniform over sqrt(depth); the class token is zero.
        """
        self.patch_embed.proj.reset_parameters()
        nn.init.zeros_(self.cls_token)
        trunc_normal_(self.pos_embed, std=0.02)
        self.init_blocks()
        for block in self.blocks:
            for linear in (m for m in block.mixer.children() if isinstance(m, nn.Linear)):
                trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            with torch.no_grad():
                block.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def convert_checkpoint(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Without the distillation student's second head, which the middle size was trained with."""
        return {name: tensor for name, tensor in state.items() if not name.startswith("distill_head.")}, ()


def _hub(file: str, img_size: int = 224) -> dict[str, Any]:
    return cfg(
        img_size,
        crop_pct=0.875,
        hf_hub_id="OpenGVLab/VideoMamba",
        hf_hub_filename=f"videomamba_{file}.pth",
        license="apache-2.0",
        origin_url="https://github.com/OpenGVLab/VideoMamba",
        paper_ids="arXiv:2403.06977",
    )


default_cfgs = generate_default_cfgs(
    {
        "videomamba_tiny_patch16_224": _hub("t16_in1k_res224"),
        "videomamba_tiny_patch16_448": _hub("t16_in1k_res224to448", 448),
        "videomamba_tiny_patch16_576": _hub("t16_in1k_res224to448to576", 576),
        "videomamba_small_patch16_224": _hub("s16_in1k_res224"),
        "videomamba_small_patch16_448": _hub("s16_in1k_res224to448", 448),
        "videomamba_small_patch16_576": _hub("s16_in1k_res224to448to576", 576),
        "videomamba_middle_patch16_224": _hub("m16_in1k_res224"),
        "videomamba_middle_patch16_448": _hub("m16_in1k_res224to448", 448),
        "videomamba_middle_patch16_576": _hub("m16_in1k_res224to448to576", 576),
        "videomamba_pico_patch8_32": cfg(32),
    }
)
_TINY = {"embed_dim": 192}
_SMALL = {"embed_dim": 384}
_MIDDLE = {"embed_dim": 576, "depth": 32}


@register_model
def videomamba_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti, 197 tokens."""
    return build(VideoMamba, "videomamba_tiny_patch16_224", pretrained, _TINY, kwargs)


@register_model
def videomamba_tiny_patch16_448(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti, 785 tokens."""
    return build(VideoMamba, "videomamba_tiny_patch16_448", pretrained, _TINY, kwargs)


@register_model
def videomamba_tiny_patch16_576(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti, 1,297 tokens."""
    return build(VideoMamba, "videomamba_tiny_patch16_576", pretrained, _TINY, kwargs)


@register_model
def videomamba_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S, 197 tokens."""
    return build(VideoMamba, "videomamba_small_patch16_224", pretrained, _SMALL, kwargs)


@register_model
def videomamba_small_patch16_448(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S, 785 tokens."""
    return build(VideoMamba, "videomamba_small_patch16_448", pretrained, _SMALL, kwargs)


@register_model
def videomamba_small_patch16_576(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S, 1,297 tokens."""
    return build(VideoMamba, "videomamba_small_patch16_576", pretrained, _SMALL, kwargs)


@register_model
def videomamba_middle_patch16_224(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M, 197 tokens, 32 blocks."""
    return build(VideoMamba, "videomamba_middle_patch16_224", pretrained, _MIDDLE, kwargs)


@register_model
def videomamba_middle_patch16_448(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M, 785 tokens, 32 blocks."""
    return build(VideoMamba, "videomamba_middle_patch16_448", pretrained, _MIDDLE, kwargs)


@register_model
def videomamba_middle_patch16_576(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M, 1,297 tokens, 32 blocks."""
    return build(VideoMamba, "videomamba_middle_patch16_576", pretrained, _MIDDLE, kwargs)


@register_model
def videomamba_pico_patch8_32(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """A very small VideoMamba (17 tokens) for tests; no pretrained weights."""
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 4}
    return build(VideoMamba, "videomamba_pico_patch8_32", pretrained, sizes, kwargs)
