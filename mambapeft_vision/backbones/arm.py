"""ARM (arXiv 2406.07537) for image classification: scans over rows and columns in both directions, SwiGLU MLPs.

Parameter names are those of the official code. Its published files hold weights of the pretraining model, which has one
direction and no class token; `Arm.convert_checkpoint` turns them into this form.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mambapeft_kernels.derivatives import transformed
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from mambapeft_vision.backbones.build import build, cfg
from mambapeft_vision.backbones.drop_path import drop_path
from mambapeft_vision.backbones.layers import PortedLayerNorm, PortedLinear, zero_head, zero_init
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.mixer import Mixer
from mambapeft_vision.backbones.ports import BranchPort, InputPort, Joined, ReplacePort, SidePort, TapPort
from mambapeft_vision.backbones.scan_model import ScanModel
from mambapeft_vision.backbones.timm_model import State
from mambapeft_vision.utils.kept_tensors import kept_tensors


class FourWayMixer(Mixer):
    """[B, L, D] → [B, L, D]: the average of four scans that share in_proj, gate and out_proj.

    Rows: the tokens as they are, and reversed (`_b`). Columns (`_c`, `_c_b`): patches in column-major order among the
    places of the patches, other tokens where they are. The gate of a token is the same in both orders, so two calls of
    the op with scale 1/4 add up.
    """

    suffixes = ("", "_b", "_c", "_c_b")

    def __init__(self, embed_dim: int, *, name: str, **sizes: Any) -> None:
        super().__init__(embed_dim, name=name, **sizes)
        self.scale = 0.25

    def forward(self, h: Tensor, layout: TokenLayout) -> Tensor:
        order, inverse = column_order(layout, h.device)

        def both_orders(tokens: Tensor) -> tuple[Tensor, Tensor]:
            return tokens, _permuted(tokens, order, inverse)

        pairs: list[tuple[list[tuple[Tensor, Tensor | None]], tuple[slice | Tensor, ...]]]
        if self.affix.value is None:
            xz, z = self._project(h)
            gates = (None, None) if z is None else both_orders(z)
            pairs = [([buffer], (slice(None),)) for buffer in zip(both_orders(xz), gates)]
        elif self.affix.inner:
            xz, z = self._project(h)
            joined = self._join(both_orders(xz if z is None else torch.cat((xz, z), dim=-1)), layout)
            pairs = [([(buffer, None) for buffer in pair.buffers], pair.keep) for pair in joined]
        else:
            joined = self._join(both_orders(h), layout)
            pairs = [([self._project(buffer) for buffer in pair.buffers], pair.keep) for pair in joined]
        directions = self.directions(pairs[0][0][0][0].dtype)
        rows, columns = (
            self._scan(*buffers[0], own)[:, keep[0]] if len(buffers) == 1 else self._scan_apart(buffers, own, keep)
            for (buffers, keep), own in zip(pairs, (directions[:2], directions[2:]))
        )
        return self.out_proj(rows + _permuted(columns, inverse, order))

    def _join(self, orders: Sequence[Tensor], layout: TokenLayout) -> list[Joined]:
        """The affix port's tokens beside those of both orders, whose special tokens stand at the same places."""
        return [self.affix.value(tokens, layout, pair=pair) for pair, tokens in enumerate(orders)]


@kept_tensors
def column_order(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each place of the column order, the token that stands there; and the inverse of that permutation."""
    rows, columns = layout.grid
    order = list(range(layout.length))
    for q, place in enumerate(layout.patches):  # the q-th patch of the column order is that of row q mod rows
        order[place] = layout.patches[q % rows * columns + q // rows]
    inverse = sorted(range(layout.length), key=order.__getitem__)
    return torch.tensor(order, device=device), torch.tensor(inverse, device=device)


def _permuted(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """[B, L, C] → tokens in another order."""
    return tokens[:, order] if transformed() else _Permute.apply(tokens, order, inverse)


class _Permute(torch.autograd.Function):
    """Its gradient is a permutation too, where that of indexing would add atomically."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return tokens.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, ctx.inverse), None, None


class LayerNorm(PortedLayerNorm):
    """LayerNorm that reads the residual stream in at least float32 and returns its weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.read("weight"), self.read("bias")
        return F.layer_norm(x, self.normalized_shape, weight.to(x.dtype), bias.to(x.dtype), self.eps).to(weight.dtype)


class SwiGLU(nn.Module):
    """w3(silu(w1 h) · w2 h), with a side port beside the whole of it."""

    def __init__(self, embed_dim: int, hidden: int, *, name: str) -> None:
        super().__init__()
        self.w1 = PortedLinear(embed_dim, hidden, name=f"{name}.w1")
        self.w2 = PortedLinear(embed_dim, hidden, name=f"{name}.w2")
        self.w3 = PortedLinear(hidden, embed_dim, name=f"{name}.w3")
        self.side = SidePort(name)

    def forward(self, h: Tensor) -> Tensor:
        return self.side(h, self.w3(F.silu(self.w1(h)) * self.w2(h)), self.training)

    def init_weights(self) -> None:
        """PyTorch's, with zero biases."""
        for linear in (self.w1, self.w2, self.w3):
            linear.reset_parameters()
            nn.init.zeros_(linear.bias)


class Block(nn.Module):
    """x += drop_path(mixer(norm1(x))); x += drop_path(mlp(norm2(x))). x stays in at least float32."""

    def __init__(
        self, embed_dim: int, mlp_hidden: int, drop_path: float, norm_eps: float, *, name: str, **mixer: Any
    ) -> None:
        super().__init__()
        self.name, self.embed_dim = name, embed_dim
        self.drop_path = drop_path
        self.mixer = FourWayMixer(embed_dim, name=f"{name}.mixer", **mixer)
        self.mlp = SwiGLU(embed_dim, mlp_hidden, name=f"{name}.mlp")
        self.norm1 = LayerNorm(embed_dim, eps=norm_eps)
        self.norm2 = LayerNorm(embed_dim, eps=norm_eps)
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
        x = x + drop_path(self.mixer_branch(normed, self.mixer(normed, layout), layout), self.drop_path, self.training)
        normed = self.norm2(x)
        x = x + drop_path(self.mlp_branch(normed, self.mlp(normed), layout), self.drop_path, self.training)
        x = self.after(x, x, self.training)
        self.tap(x, layout)
        return x, layout


class Arm(ScanModel):
    """ARM with the class token in the middle.

    Args:
        expand: 1 in all published sizes.
        mlp_hidden: width inside the SwiGLU MLPs; None: floor(8 · embed_dim / 3).
        drop_path_rate: drop-path rate of both branches of block i: [0, linspace(0, rate, depth)][i].
        global_pool: "avg" (the published recipe) averages two means, of the patches before the class token and of the
            patches behind it; "token" reads the class token. Others: see `TimmModel`.
        further_dt_bias: how dt_proj.bias of the directions after the first starts; see `Mixer.init_weights`.
        others: see `Vim`.
    """

    family = "arm"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 1,
        dt_rank: int | None = None,
        mlp_hidden: int | None = None,
        num_classes: int = 1000,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-5,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        further_dt_bias: str = "zero",
    ) -> None:
        super().__init__(img_size, patch_size, stride, embed_dim, in_chans, num_classes, global_pool, drop_rate)
        self.further_dt_bias = further_dt_bias
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.layout.length, embed_dim))
        self.head = zero_head(self.head_hidden_size, num_classes)
        hidden = 8 * embed_dim // 3 if mlp_hidden is None else mlp_hidden
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.layers = nn.ModuleList(
            Block(embed_dim, hidden, rates[i], norm_eps, name=f"layers.{i}", **sizes) for i in range(depth)
        )
        self.norm_f = LayerNorm(embed_dim, eps=norm_eps)
        self.init_new()

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """One class token in the middle of the patches."""
        patches = grid[0] * grid[1]
        return TokenLayout(patches + 1, grid, special=(patches // 2,), readout=(patches // 2,))

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """As Vim's, and those of the MLPs: w3(silu(mlp_gate x) · mlp_up x)."""
        layers = [f"layers.{i}" for i in range(len(self.layers))]
        norms = [*(f"{layer}.{norm}" for layer in layers for norm in ("norm1", "norm2")), "norm_f"]
        return {
            **super().roles,
            "norm": tuple(f"{norm}.{part}" for norm in norms for part in ("weight", "bias")),
            "mlp_gate": tuple(f"{layer}.mlp.w1.weight" for layer in layers),
            "mlp_up": tuple(f"{layer}.mlp.w2.weight" for layer in layers),
            "mlp_down": tuple(f"{layer}.mlp.w3.weight" for layer in layers),
        }

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        patches, (middle,) = self.patch_embed(images), self.layout.special
        class_token = self.read("cls_token").to(patches.dtype).expand(patches.shape[0], -1, -1)
        tokens = torch.cat((patches[:, :middle], class_token, patches[:, middle:]), dim=1) + self.read("pos_embed")
        return self.prompt(tokens, self.layout)

    def run_blocks(
        self, tokens: Tensor, layout: TokenLayout, take: Collection[int] = (), stop: int | None = None
    ) -> tuple[State, list[State]]:
        return super().run_blocks(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), layout, take, stop)

    def mean_of_patches(self, patches: Tensor, layout: TokenLayout) -> Tensor:
        (class_token,) = layout.special
        in_front = sum(place < class_token for place in layout.patches)
        return (patches[:, :in_front].mean(1) + patches[:, in_front:].mean(1)) / 2

    def init_weights(self) -> None:
        """The reference's initialisation: Vim's for embeddings and mixers; the class token is drawn too."""
        self.patch_embed.init_weights()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for block in self.blocks:
            block.mixer.init_weights(len(self.layers), self.further_dt_bias)
            block.mlp.init_weights()
            for norm in (block.norm1, block.norm2):
                norm.reset_parameters()
        self.norm_f.reset_parameters()
        zero_init(self.head)

    def convert_checkpoint(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Pretraining weights (one direction, no class token) in the form of this model; others as they are.

        The direction is copied to all four, and the class token gets a zero row among the positions. A pretraining file
        has neither class token nor final norm: they start as zero and as the identity.
        """
        if "cls_token" in state or "layers.0.mixer.A_b_log" in state or "pos_embed" not in state:
            return state, ()
        converted = {}
        for name, tensor in state.items():
            match = _OF_DIRECTION.fullmatch(name)
            if match is not None:
                mixer, part, rest = match.groups()
                for suffix in FourWayMixer.suffixes:
                    own = f"A{suffix}_log" if part == "A_log" else f"{part}{suffix}"
                    converted[f"{mixer}{own}{rest}"] = tensor
            elif not name.startswith(_PRETRAINING_ONLY):
                converted[name] = tensor
        position, like = state["pos_embed"], state["patch_embed.proj.bias"]
        middle, row = position.shape[1] // 2, position.new_zeros(1, 1, position.shape[2])
        converted["pos_embed"] = torch.cat((position[:, :middle], row, position[:, middle:]), dim=1)
        added = {
            "cls_token": torch.zeros_like(like)[None, None],
            "norm_f.weight": torch.ones_like(like),
            "norm_f.bias": torch.zeros_like(like),
        }
        return {**converted, **added}, tuple(added)


# layers.0.mixer. | conv1d | .weight
_OF_DIRECTION = re.compile(r"(layers\.\d+\.mixer\.)(A_log|D|conv1d|x_proj|dt_proj)((?:\..*)?)")
# Keys of the pretraining's decoder.
_PRETRAINING_ONLY = (
    *("ar_token", "dec_pos_embed", "mask", "enc2dec", "dec_block", "ar_norm", "ar_pred"),
    *("norm_1.", "norm_2.", "norm_3.", "norm_4."),
)


def _cfg(img_size: int = 224) -> dict[str, Any]:
    """The published files hold pretraining weights. Their names were not found, nor a licence: a path must be given."""
    return cfg(
        img_size,
        crop_pct=0.875 if img_size <= 224 else 1.0,
        crop_mode="squash",
        license=None,
        origin_url="https://huggingface.co/OliverRen/ARM",
        paper_ids="arXiv:2406.07537",
    )


default_cfgs = generate_default_cfgs(
    {
        "arm_base_patch16_224": _cfg(),
        "arm_large_patch16_224": _cfg(),
        "arm_huge_patch16_224": _cfg(),
        "arm_pico_patch8_32": cfg(32),
    }
)


@register_model
def arm_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Arm:
    """ARM-B: 12 blocks, 197 tokens."""
    return build(Arm, "arm_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def arm_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Arm:
    """ARM-L: 24 blocks, 197 tokens."""
    return build(Arm, "arm_large_patch16_224", pretrained, {"embed_dim": 1024, "depth": 24}, kwargs)


@register_model
def arm_huge_patch16_224(pretrained: bool = False, **kwargs: Any) -> Arm:
    """ARM-H: 24 blocks, 197 tokens."""
    return build(Arm, "arm_huge_patch16_224", pretrained, {"embed_dim": 1536, "depth": 24}, kwargs)


@register_model
def arm_pico_patch8_32(pretrained: bool = False, **kwargs: Any) -> Arm:
    """A very small ARM (17 tokens) for tests; no pretrained weights."""
    return build(Arm, "arm_pico_patch8_32", pretrained, {"patch_size": 8, "embed_dim": 64, "depth": 4}, kwargs)
