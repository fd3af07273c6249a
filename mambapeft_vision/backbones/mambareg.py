"""Mamba-Reg (arXiv 2405.14858): Vim's blocks with n register tokens spread over the sequence, all of them read out.

Parameter names are those of the official checkpoints.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambapeft_vision.backbones.build import EMBEDDED_WEIGHTS, build, cfg
from mambapeft_vision.backbones.layers import PortedLinear, PortedRMSNorm
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.residual_stack import ResidualStack
from mambapeft_vision.utils.errors import UserError


class MambaReg(ResidualStack):
    """Vim with n registers, one behind each of the first n of n + 1 runs of patches.

    The registers leave the final norm with D features each. `neck` (shared by all) reduces them to D / r, and the head
    reads all n · D / r of them after an RMSNorm. With r = 1 there is no neck and no such norm.

    Args:
        num_cls_tokens: n, the registers; fewer than there are patches.
        cls_reduce: r, which divides n and embed_dim.
        further_dt_bias: how the backward direction's dt_proj.bias starts; see `Mixer.init_weights`.
        others: see `Vim` and `TimmModel`.
    """

    family = "mambareg"
    readout_names = ("neck", "norm_neck")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        num_classes: int = 1000,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-5,
        num_cls_tokens: int = 12,
        cls_reduce: int = 2,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        further_dt_bias: str = "zero",
    ) -> None:
        if num_cls_tokens < 1 or cls_reduce < 1 or num_cls_tokens % cls_reduce or embed_dim % cls_reduce:
            raise UserError(
                f"backbone.num_cls_tokens={num_cls_tokens} with cls_reduce={cls_reduce} and embed_dim={embed_dim}; "
                f"expected at least one token, and a cls_reduce that divides both"
            )
        self.num_cls_tokens, self.cls_reduce, self.further_dt_bias = num_cls_tokens, cls_reduce, further_dt_bias
        super().__init__(img_size, patch_size, stride, embed_dim, in_chans, num_classes, global_pool, drop_rate)
        self.cls_token = nn.Parameter(torch.empty(1, num_cls_tokens, embed_dim))
        self.pos_embed_cls = nn.Parameter(torch.empty(1, num_cls_tokens, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
        self.neck: PortedLinear | None = None
        self.norm_neck: PortedRMSNorm | None = None
        if cls_reduce > 1:
            self.neck = PortedLinear(embed_dim, embed_dim // cls_reduce, bias=False, name="neck")
            self.norm_neck = PortedRMSNorm(self.special_width, eps=norm_eps, name="norm_neck")
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.add_blocks(depth, drop_path_rate, norm_eps, **sizes)
        self.init_new()

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """n registers, one behind each run of patches but the last run."""
        n, patches = self.num_cls_tokens, grid[0] * grid[1]
        if patches <= n:
            raise UserError(
                f"backbone.num_cls_tokens={n} for images of {patches} patches; expected fewer tokens than patches. "
                f"Raise backbone.img_size"
            )
        run = patches // (n + 1)
        places = tuple((k + 1) * run + k for k in range(n))
        return TokenLayout(patches + n, grid, special=places, readout=places)

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """As Vim's, and the neck. The role `pos_embed` is that of the patches, not that of the registers."""
        return {**super().roles, **({} if self.neck is None else {"neck": ("neck.weight",)})}

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        patches = self.patch_embed(images) + self.read("pos_embed")
        registers = self.read("cls_token") + self.read("pos_embed_cls")
        registers = registers.to(patches.dtype).expand(patches.shape[0], -1, -1)
        n, count = self.num_cls_tokens, patches.shape[1]
        run = count // (n + 1)
        runs = patches.split([run] * n + [count - n * run], dim=1)
        pieces = [piece for pair in zip(runs, registers.split(1, dim=1)) for piece in pair]
        return self.prompt(torch.cat((*pieces, runs[-1]), dim=1), self.layout)

    @property
    def special_width(self) -> int:
        return self.num_cls_tokens * (self.embed_dim // self.cls_reduce)

    def read_special(self, tokens: Tensor) -> Tensor:
        if self.neck is None or self.norm_neck is None:
            return tokens.flatten(1)
        return self.norm_neck(self.neck(tokens).flatten(1))

    def init_weights(self) -> None:
        """The reference's initialisation: Vim's, and truncated normal 0.02 for tokens, positions and neck."""
        self.patch_embed.init_weights()
        for tensor in (self.cls_token, self.pos_embed_cls, self.pos_embed):
            trunc_normal_(tensor, std=0.02)
        if self.neck is not None and self.norm_neck is not None:
            trunc_normal_(self.neck.weight, std=0.02)
            nn.init.ones_(self.norm_neck.weight)
        self.init_blocks(self.further_dt_bias)


def _hub(size: str) -> dict[str, Any]:
    """Where the published weights are. No licence was found, of the code or of the weights."""
    return cfg(
        hf_hub_id="Wangf3014/Mamba-Reg",
        hf_hub_filename=f"mambar_{size}_patch16_224.pth",
        license=None,
        origin_url="https://github.com/wangf3014/Mamba-Reg",
        paper_ids="arXiv:2405.14858",
    )


default_cfgs = generate_default_cfgs(
    {
        "mambareg_tiny_patch16_224": cfg(),
        "mambareg_small_patch16_224": _hub("small"),
        "mambareg_base_patch16_224": _hub("base"),
        "mambareg_large_patch16_224": _hub("large"),
        "mambareg_pico_patch8_32": cfg(32),
        "mambareg_nano_patch8_64": cfg(
            64, crop_mode="squash", file=str(EMBEDDED_WEIGHTS / "mambareg_nano.safetensors"), license="apache-2.0"
        ),
    }
)


@register_model
def mambareg_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-Ti: 12 registers, no neck; no published weights."""
    sizes = {"embed_dim": 192, "cls_reduce": 1}
    return build(MambaReg, "mambareg_tiny_patch16_224", pretrained, sizes, kwargs)


@register_model
def mambareg_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-S: 12 registers, 208 tokens."""
    return build(MambaReg, "mambareg_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def mambareg_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-B: 12 registers, 208 tokens."""
    sizes = {"embed_dim": 768, "cls_reduce": 4}
    return build(MambaReg, "mambareg_base_patch16_224", pretrained, sizes, kwargs)


@register_model
def mambareg_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-L: 16 registers, 212 tokens, 48 blocks."""
    sizes = {"embed_dim": 1024, "depth": 48, "num_cls_tokens": 16, "cls_reduce": 8}
    return build(MambaReg, "mambareg_large_patch16_224", pretrained, sizes, kwargs)


@register_model
def mambareg_pico_patch8_32(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """A very small Mamba-Reg (4 registers, 20 tokens) for tests; no pretrained weights."""
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_cls_tokens": 4, "cls_reduce": 4}
    return build(MambaReg, "mambareg_pico_patch8_32", pretrained, sizes, kwargs)


@register_model
def mambareg_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """A small Mamba-Reg (4 registers, 68 tokens) of vim_nano's size, with weights of our own in the package."""
    sizes = {"patch_size": 8, "embed_dim": 192, "depth": 6, "d_state": 8, "expand": 1}
    sizes = {**sizes, "num_cls_tokens": 4, "cls_reduce": 4}
    return build(MambaReg, "mambareg_nano_patch8_64", pretrained, sizes, kwargs)
