"""Vision transformer (DeiT, arXiv 2012.12877), the paper's baseline, with ports in the same places as Vim has them.

Parameter names and arithmetic are those of timm's `deit_small_patch16_224`, whose weights load as they are.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from mambapeft_kernels.derivatives import attention
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambapeft_vision.backbones.build import build, cfg
from mambapeft_vision.backbones.drop_path import drop_path
from mambapeft_vision.backbones.layers import Mlp, PortedLayerNorm, PortedLinear, zero_head, zero_init
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.ports import BranchPort, InputPort, ReplacePort, SidePort, TapPort
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.utils.errors import UserError


class Attention(nn.Module):
    """Multi-head self-attention, [B, L, D] → [B, L, D]."""

    def __init__(self, embed_dim: int, num_heads: int, *, name: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = PortedLinear(embed_dim, 3 * embed_dim, name=f"{name}.qkv")
        self.proj = PortedLinear(embed_dim, embed_dim, name=f"{name}.proj")

    def forward(self, h: Tensor) -> Tensor:
        batch, length, dim = h.shape
        q, k, v = self.qkv(h).view(batch, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """x += drop_path(attn(norm1(x))); x += drop_path(mlp(norm2(x))); and what the port `after` adds. [B, L, D]."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: int, drop_path: float, *, name: str) -> None:
        super().__init__()
        self.name, self.embed_dim = name, embed_dim
        self.drop_path = drop_path
        self.norm1 = PortedLayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads, name=f"{name}.attn")
        self.norm2 = PortedLayerNorm(embed_dim, eps=1e-6)
        self.mlp = Mlp(embed_dim, mlp_ratio * embed_dim, name=f"{name}.mlp")
        self.input = InputPort(f"{name}.input")
        self.replace = ReplacePort(f"{name}.replace")
        self.mixer_branch = BranchPort(f"{name}.mixer_branch")
        self.mlp_branch = BranchPort(f"{name}.mlp_branch")
        self.after = SidePort(f"{name}.after")
        self.tap = TapPort(f"{name}.tap")

    @property
    def mlp_side(self) -> SidePort:
        return self.mlp.side

    def forward(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        x, layout = self.input(x, layout)
        x, _ = self.replace(x, None, layout)
        normed = self.norm1(x)
        x = x + drop_path(self.mixer_branch(normed, self.attn(normed), layout), self.drop_path, self.training)
        normed = self.norm2(x)
        x = x + drop_path(self.mlp_branch(normed, self.mlp(normed), layout), self.drop_path, self.training)
        x = self.after(x, x, self.training)
        self.tap(x, layout)
        return x, layout


class Vit(TimmModel):
    """Vision transformer with the class token first.

    Args:
        img_size: height and width (or one number for both).
        patch_size, embed_dim, depth, num_heads, mlp_ratio: sizes; a head has 64 channels by default.
        num_classes: 0 for features only. The head starts at zero.
        drop_path_rate: drop-path rate of the last block; linear from 0 in the first.
        global_pool, drop_rate: see `TimmModel`.
    """

    family = "vit"
    blocks_name = "blocks"
    norm_name = "norm"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int | None = None,
        mlp_ratio: int = 4,
        num_classes: int = 1000,
        drop_path_rate: float = 0.1,
        global_pool: str = "token",
        drop_rate: float = 0.0,
    ) -> None:
        num_heads = num_heads or max(1, embed_dim // 64)
        if embed_dim % num_heads:
            raise UserError(f"embed_dim={embed_dim} does not divide into num_heads={num_heads}; change one of them")
        super().__init__(img_size, patch_size, None, embed_dim, in_chans, num_classes, global_pool, drop_rate)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.layout.length, embed_dim))
        blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path_rate * i / max(depth - 1, 1), name=f"blocks.{i}")
            for i in range(depth)
        )
        self.blocks = cast(Sequence[Block], blocks)
        self.norm = PortedLayerNorm(embed_dim, eps=1e-6)
        self.head = zero_head(self.head_hidden_size, num_classes)
        self.init_new()

    @property
    def mixers(self) -> tuple[()]:
        """There are no scans."""
        return ()

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Role → names of parameters, block after block."""

        def block(*names: str) -> tuple[str, ...]:
            return tuple(f"blocks.{i}.{name}" for i in range(len(self.blocks)) for name in names)

        norms = block("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
        return {
            "patch_embed": ("patch_embed.proj.weight",),
            "pos_embed": ("pos_embed",),
            "cls_token": ("cls_token",),
            "norm": (*norms, "norm.weight", "norm.bias"),
            "qkv": block("attn.qkv.weight"),
            "attn_out": block("attn.proj.weight"),
            "mlp_up": block("mlp.fc1.weight"),
            "mlp_down": block("mlp.fc2.weight"),
        }

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        """Named blocks of output rows of a weight: q, k, v of "blocks.0.attn.qkv.weight"."""
        if not parameter.endswith(".qkv.weight"):
            return {}
        dim = self.embed_dim
        return {"q": slice(0, dim), "k": slice(dim, 2 * dim), "v": slice(2 * dim, 3 * dim)}

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """One class token in front of the patches."""
        return TokenLayout(grid[0] * grid[1] + 1, grid, special=(0,), readout=(0,))

    def set_kernel(self, kernel: str, device: torch.device | str) -> str:
        """There is no scan to choose a kernel for: attention is PyTorch's own. Returns "torch"."""
        if kernel not in ("auto", "torch"):
            raise UserError(
                f"kernel={kernel!r} chooses how scans run, and a vision transformer has none; leave kernel=auto"
            )
        return "torch"

    def compile_ahead(self, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[()]:
        """PyTorch's kernels are compiled."""
        return ()

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        patches = self.patch_embed(images)
        class_token = self.read("cls_token").to(patches.dtype).expand(patches.shape[0], -1, -1)
        return self.prompt(torch.cat((class_token, patches), dim=1) + self.read("pos_embed"), self.layout)

    def init_weights(self) -> None:
        """timm's initialisation of vision transformers; the head is zero."""
        self.patch_embed.init_weights()
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        zero_init(self.head)


default_cfgs = generate_default_cfgs(
    {
        "ported_deit_small_patch16_224": cfg(
            crop_mode="squash",
            hf_hub_id="timm/deit_small_patch16_224.fb_in1k",
            hf_hub_filename="model.safetensors",
            license="apache-2.0",
            paper_ids="arXiv:2012.12877",
        ),
        "ported_vit_pico_patch8_32": cfg(32),
    }
)


@register_model
def ported_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vit:
    """ViT-S as DeiT trained it on ImageNet-1K (timm's deit_small_patch16_224)."""
    return build(Vit, "ported_deit_small_patch16_224", pretrained, {}, kwargs)


@register_model
def ported_vit_pico_patch8_32(pretrained: bool = False, **kwargs: Any) -> Vit:
    """A very small vision transformer (17 tokens) for tests; no pretrained weights."""
    return build(Vit, "ported_vit_pico_patch8_32", pretrained, {"patch_size": 8, "embed_dim": 64, "depth": 4}, kwargs)
