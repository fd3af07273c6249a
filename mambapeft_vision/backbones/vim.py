"""Vision Mamba (Vim, arXiv 2401.09417): bidirectional v2, class token in the middle, halved sum of directions.

Plain PyTorch that reads top to bottom and knows nothing of PEFT. Parameter names are those of the official
checkpoints. Everything between in_proj and out_proj is one op of `mambapeft_kernels`.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

import torch
import torch.nn.functional as F
from mambapeft_kernels import FUSED, BlockSizes, Direction, add_rms_norm, compile_ahead, resolve_backend, ssm_mixer
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from mambapeft_vision.backbones.layers import (
    ConvWeights,
    LinearWeights,
    PatchEmbed,
    PortedLinear,
    both_sides,
    zero_head,
    zero_init,
)
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.ports import AffixPort, InputPort, Joined, Port, Ported, TapPort
from mambapeft_vision.utils.errors import UserError


class Mixer(Ported):
    """The bidirectional selective-scan mixer of one block: [B, L, D] → [B, L, D].

    D embed_dim, E = expand·D channels, N states (read from A_log), R dt_rank, K conv taps. `*_b` is the direction
    that reads the tokens from last to first. conv1d, x_proj and dt_proj only hold weights: the kernel reads them.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        name: str,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        halve_sum: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.d_inner = expand * embed_dim
        self.dt_rank = math.ceil(embed_dim / 16) if dt_rank is None else dt_rank
        self.scale = 0.5 if halve_sum else 1.0
        self.kernel = "auto"

        inner, rank = self.d_inner, self.dt_rank
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        self.D_b = nn.Parameter(torch.empty(inner))
        self.in_proj = PortedLinear(embed_dim, 2 * inner, bias=False, name=f"{name}.in_proj")
        self.conv1d = ConvWeights(inner, inner, d_conv, groups=inner)
        self.x_proj = LinearWeights(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = LinearWeights(rank, inner)
        self.conv1d_b = ConvWeights(inner, inner, d_conv, groups=inner)
        self.x_proj_b = LinearWeights(inner, rank + 2 * d_state, bias=False)
        self.dt_proj_b = LinearWeights(rank, inner)
        self.out_proj = PortedLinear(inner, embed_dim, bias=False, name=f"{name}.out_proj")
        # The fused kernels round these to the activations' dtype as they load them: a cast is half of the bytes.
        self.x_proj.cast_weights = self.x_proj_b.cast_weights = ("weight",)

        self.affix = AffixPort(f"{name}.affix")  # tokens, layout → Joined
        self.gate = Port(f"{name}.gate")  # z [B, L, E] → the tensor whose silu gates the output
        self.state_offset = Port(f"{name}.state_offset")  # () → ([E, N], [E, N])
        self.output_offset = Port(f"{name}.output_offset")  # () → ([E], [E])

    @property
    def d_state(self) -> int:
        """N of the frozen weights."""
        return self.A_log.shape[1]

    @property
    def states(self) -> int:
        """N as the scan has it."""
        return self.read("A_log").shape[1]

    @property
    def row_blocks(self) -> dict[str, dict[str, slice]]:
        """Named blocks of output rows of the weights, by submodule name."""
        inner, rank, states = self.d_inner, self.dt_rank, self.d_state
        x_proj = {
            "d": slice(0, rank),
            "b": slice(rank, rank + states),
            "c": slice(rank + states, rank + 2 * states),
        }
        return {
            "in_proj": {"x": slice(0, inner), "z": slice(inner, 2 * inner)},
            "x_proj": x_proj,
            "x_proj_b": x_proj,
        }

    def directions(self, dtype: torch.dtype) -> tuple[Direction, Direction]:
        """The weights of the two scan directions, each read once (they may be computed when read).

        dtype: of the activations.
        """
        offsets = [(None, None) if p.value is None else p.value() for p in (self.state_offset, self.output_offset)]
        narrow = dtype if self.kernel in FUSED else None
        parts = (
            (self.conv1d, self.x_proj, self.dt_proj, "A_log", "D"),
            (self.conv1d_b, self.x_proj_b, self.dt_proj_b, "A_b_log", "D_b"),
        )
        forward, backward = (
            Direction(
                conv_weight=conv1d.read("weight").squeeze(1),
                conv_bias=conv1d.read("bias"),
                x_proj=x_proj.read("weight", narrow),
                dt_proj=dt_proj.read("weight"),
                dt_bias=dt_proj.read("bias"),
                A_log=self.read(A_log),
                D=self.read(D),
                state_offset=state_offset,
                output_offset=output_offset,
                reverse=reverse,
            )
            for (conv1d, x_proj, dt_proj, A_log, D), state_offset, output_offset, reverse in zip(
                parts, *offsets, (False, True)
            )
        )
        return forward, backward

    def forward(self, h: Tensor, layout: TokenLayout) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        if self.affix.value is not None:
            return self._forward_with_affix(h, layout)
        xz, z = self._project(h)
        return self.out_proj(self._scan(xz, z, self.directions(xz.dtype)))

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """x and z side by side [B, L, 2E], and None; or, where the gate has an owner, x and z [B, L, E] each."""
        xz = self.in_proj(h)
        if self.gate.value is None:
            return xz, None
        x, z = xz.chunk(2, dim=-1)
        return x, self.gate.value(z)

    def _scan(self, xz: Tensor, z: Tensor | None, directions: Sequence[Direction]) -> Tensor:
        """[B, L, E]; arguments as `_project` returns them."""
        return ssm_mixer(xz, directions, self.scale, self.kernel, z=z)

    def _forward_with_affix(self, h: Tensor, layout: TokenLayout) -> Tensor:
        """As `forward`, with other tokens joined in before the scan and dropped after it."""
        inputs: list[tuple[Tensor, Tensor | None]]
        if self.affix.inner:
            joined = self._join_inside(h, layout)
            inputs = [(buffer, None) for buffer in joined.buffers]
        else:
            joined = self.affix.value(h, layout)
            inputs = [self._project(buffer) for buffer in joined.buffers]
        directions = self.directions(inputs[0][0].dtype)
        if len(inputs) == 1:
            out = self.out_proj(self._scan(*inputs[0], directions))
            return out[:, joined.keep[0]]  # here a token has half the channels that it has before out_proj
        # Each direction reads a buffer of its own. The gate of a kept token is the same in both, so outputs add up.
        forward, backward = (
            self._scan(*buffer, (direction,))[:, keep]
            for buffer, direction, keep in zip(inputs, directions, joined.keep)
        )
        return self.out_proj(forward + backward)

    def _join_inside(self, h: Tensor, layout: TokenLayout) -> Joined:
        """The affix port's tokens beside in_proj's output, [B, L', 2E]."""
        if self.gate.value is None and self.affix.ends is not None and self.in_proj.keeps_zeros:
            # in_proj leaves room at the ends, so that its output need not be copied: it is four times as wide as h.
            return self.affix.value(self.in_proj(F.pad(h, (0, 0, *self.affix.ends))), layout, has_room=True)
        xz, z = self._project(h)
        return self.affix.value(xz if z is None else torch.cat((xz, z), dim=-1), layout)

    def init_weights(self, depth: int) -> None:
        """Vim's initialisation: S4D-real A, D = 1, Δ log-uniform in [1e-3, 0.1], out_proj scaled by depth."""
        for module in (self.in_proj, self.x_proj, self.x_proj_b, self.conv1d, self.conv1d_b, self.out_proj):
            module.reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)
            states = torch.arange(1, self.A_log.shape[1] + 1, dtype=self.A_log.dtype)
            for A_log, D, dt_proj in (
                (self.A_log, self.D, self.dt_proj),
                (self.A_b_log, self.D_b, self.dt_proj_b),
            ):
                A_log.copy_(states.log().expand_as(A_log))
                D.fill_(1.0)
                bound = self.dt_rank**-0.5
                nn.init.uniform_(dt_proj.weight, -bound, bound)
                dt = torch.exp(torch.empty_like(dt_proj.bias).uniform_(math.log(1e-3), math.log(0.1)))
                dt = dt.clamp(min=1e-4)
                dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of the bias is dt


class RMSNorm(Ported):
    """Holds the weight of residual add + RMSNorm; the kernel computes both."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self, hidden: Tensor, residual: Tensor | None, branch_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(hidden, residual, self.read("weight"), self.eps, branch_scale)


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(RMSNorm(residual)). [B, L, D] each, the residual in float32.

    The port `input` sees `hidden`, which is not yet a part of the residual; the port `tap` sees their sum after the
    block, without drop path.
    """

    after = mlp_side = None  # there is neither a port after the block nor an MLP

    def __init__(self, embed_dim: int, *, name: str, norm_eps: float, **mixer: Any) -> None:
        super().__init__()
        self.name = name
        self.mixer = Mixer(embed_dim, name=f"{name}.mixer", **mixer)
        self.norm = RMSNorm(embed_dim, norm_eps)
        self.input = InputPort(f"{name}.input")
        self.tap = TapPort(f"{name}.tap")

    def forward(
        self, hidden: Tensor, residual: Tensor | None, branch_scale: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, TokenLayout]:
        hidden, layout = self.input(hidden, layout)
        if residual is not None and residual.shape[1] != hidden.shape[1]:
            raise UserError(
                f"{self.input.owner!r} changes the number of tokens in {self.name} from {residual.shape[1]} to "
                f"{hidden.shape[1]}; in Vim only the first block's input can, as later tokens have a residual"
            )
        normed, residual = self.norm(hidden, residual, branch_scale)
        hidden = self.mixer(normed, layout)
        if self.tap.readers:
            self.tap(residual + hidden, layout)
        return hidden, residual, layout


class Vim(Ported):
    """Vision Mamba.

    Args:
        img_size: height and width (or one number for both).
        patch_size, stride: of the patch embedding.
        embed_dim, depth, d_state, d_conv, expand, dt_rank: sizes; dt_rank defaults to ceil(embed_dim / 16).
        num_classes: 0 for features only. The head starts at zero.
        drop_path_rate: block i drops its incoming branch with rate linspace(0, rate, depth)[i - 1]
            (block 0 never), and the last branch, before the final norm, with `drop_path_rate`.
        norm_eps: of the RMSNorms.
        halve_sum: average the two directions (the official models do) instead of adding them.
    """

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
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(both_sides(img_size), patch_size, stride or patch_size, in_chans, embed_dim)
        self.default_cfg: dict[str, Any] = {}  # set where the model is registered
        self.pretrained_cfg = self.default_cfg
        self.embed_dim = self.num_features = embed_dim
        self.num_classes = num_classes
        self.layout = self.layout_of(self.patch_embed.grid_size)

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.layout.length, embed_dim))
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.layers = nn.ModuleList(
            Block(embed_dim, name=f"layers.{i}", norm_eps=norm_eps, halve_sum=halve_sum, **sizes) for i in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim, norm_eps)
        self.head = zero_head(embed_dim, num_classes)
        self.prompt = InputPort("prompt")

        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        # One rate for the branch entering each block, and one for the branch entering the final norm.
        rates = [*rates[:depth], drop_path_rate]
        self._keep: Tensor
        self.register_buffer("_keep", 1.0 - torch.tensor(rates), persistent=False)
        self._drops = drop_path_rate > 0
        self.init_weights()

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, layer) for layer in self.layers]

    @property
    def mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.blocks]

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Role → names of parameters, block after block, forward direction before backward."""
        blocks = range(len(self.layers))

        def mixer(*names: str) -> tuple[str, ...]:
            return tuple(f"layers.{i}.mixer.{name}" for i in blocks for name in names)

        return {
            "patch_embed": ("patch_embed.proj.weight",),
            "pos_embed": ("pos_embed",),
            "cls_token": ("cls_token",),
            "norm": (*(f"layers.{i}.norm.weight" for i in blocks), "norm_f.weight"),
            "in_proj": mixer("in_proj.weight"),
            "out_proj": mixer("out_proj.weight"),
            "x_proj": mixer("x_proj.weight", "x_proj_b.weight"),
            "dt_proj": mixer("dt_proj.weight", "dt_proj_b.weight"),
            "dt_bias": mixer("dt_proj.bias", "dt_proj_b.bias"),
            "conv": mixer("conv1d.weight", "conv1d_b.weight"),
            "A_log": mixer("A_log", "A_b_log"),
            "D": mixer("D", "D_b"),
        }

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        """Named blocks of output rows of a weight, e.g. {"x": …, "z": …} for "layers.0.mixer.in_proj.weight"."""
        path, _, attribute = parameter.rpartition(".")
        path, _, module = path.rpartition(".")
        owner = self.get_submodule(path)
        return owner.row_blocks.get(module, {}) if isinstance(owner, Mixer) and attribute == "weight" else {}

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """One class token in the middle of the patches."""
        patches = grid[0] * grid[1]
        return TokenLayout(patches + 1, grid, special=(patches // 2,), readout=(patches // 2,))

    def output_layout(self) -> TokenLayout:
        """The layout of what `forward_features` returns; it is static once methods are attached."""
        return self.layout.through((self.prompt, *(block.input for block in self.blocks)), self.pos_embed)

    def set_kernel(self, kernel: str, device: torch.device | str) -> str:
        """Chooses the kernel backend for all mixers; returns the name of what will run on `device`."""
        resolved = resolve_backend(kernel, device)
        for mixer in self.mixers:
            mixer.kernel = resolved
        return resolved

    def compile_ahead(self, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[Future, ...]:
        """Starts to compile a block's kernels for activations of `dtype`; see `mambapeft_kernels.compile_ahead`."""
        mixer = self.mixers[0]
        sizes = BlockSizes(self.embed_dim, mixer.d_inner, mixer.states, mixer.dt_rank, mixer.conv1d.kernel_size[0])
        return compile_ahead(sizes, mixer.scale, dtype, device, kernel)

    def reset_classifier(self, num_classes: int) -> None:
        """A new zero head for `num_classes` classes (0: none), on the backbone's device and dtype."""
        self.num_classes = num_classes
        weight = self.norm_f.weight
        self.head = zero_head(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, L, D]: all tokens after the last block and the final norm."""
        hidden, residual, scale, _ = self._through_blocks(images)
        return self.norm_f(hidden, residual, scale)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, L, D] → [B, classes]; or with `pre_logits` the class token [B, D]."""
        feature = self.output_layout().read(x).flatten(1)
        return feature if pre_logits else self.head(feature)

    def forward(self, images: Tensor) -> Tensor:
        """forward_head(forward_features(images)), where the final norm is left to the token that is read out."""
        hidden, residual, scale, layout = self._through_blocks(images)
        feature, _ = self.norm_f(layout.read(hidden), layout.read(residual), scale)
        return self.head(feature.flatten(1))

    def _through_blocks(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None, TokenLayout]:
        """The arguments of the final norm, and the layout of their tokens."""
        hidden, layout = self.embed(images)
        scales = self._branch_scales(hidden.shape[0])
        residual = None
        for i, layer in enumerate(self.layers):
            branch_scale = None if i == 0 or scales is None else scales[i]
            hidden, residual, layout = layer(hidden, residual, branch_scale, layout)
        assert residual is not None
        return hidden, residual, None if scales is None else scales[-1], layout

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        """Patches with the class token in the middle and position embedding, and prompts where there are any."""
        patches, (middle,) = self.patch_embed(images), self.layout.special
        class_token = self.read("cls_token").to(patches.dtype).expand(patches.shape[0], -1, -1)
        tokens = torch.cat((patches[:, :middle], class_token, patches[:, middle:]), dim=1) + self.read("pos_embed")
        return self.prompt(tokens, self.layout)

    def _branch_scales(self, batch: int) -> Tensor | None:
        """[depth + 1, B] drop-path factors, 0 or 1 / keep, drawn per sample; None outside training."""
        if not (self.training and self._drops):
            return None
        keep = self._keep[:, None]
        return (torch.rand(keep.shape[0], batch, device=keep.device) < keep).to(keep.dtype) / keep

    def init_weights(self) -> None:
        """Vim's own initialisation of everything; the head is zero."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.get_parameter("bias"))
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for block in self.blocks:
            block.mixer.init_weights(len(self.layers))
            nn.init.ones_(block.norm.weight)
        nn.init.ones_(self.norm_f.weight)
        zero_init(self.head)


# ---------------------------------------------------------------------------------------------------------------
# Variants. A model's `default_cfg` says everything needed to use it: input, normalisation, where weights come from.


def _build(pretrained: bool, cfg: dict[str, Any], sizes: dict[str, Any], kwargs: dict[str, Any]) -> Vim:
    # timm.create_model hands these to every entry point; they steer timm's own loader, which we do not use.
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    sizes = {**sizes, **kwargs}
    model = Vim(**sizes)
    model.default_cfg = model.pretrained_cfg = {
        "input_size": (3, *model.patch_embed.img_size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **cfg,
        "architecture": {key: value for key, value in sizes.items() if key != "num_classes"},
    }
    if pretrained:
        from mambapeft_vision.backbones.weights import load_official

        load_official(model)
    return model


def _hub(repository: str, file: str) -> dict[str, str]:
    return {"hf_hub_id": repository, "hf_hub_filename": file}


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 197 tokens."""
    cfg = _hub("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth")
    return _build(pretrained, cfg, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 197 tokens."""
    cfg = _hub("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth")
    return _build(pretrained, cfg, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 197 tokens."""
    cfg = _hub("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth")
    return _build(pretrained, cfg, {"embed_dim": 768}, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti with overlapping patches, 730 tokens."""
    cfg = _hub("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth")
    return _build(pretrained, cfg, {"stride": 8, "embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S with overlapping patches, 730 tokens."""
    cfg = _hub("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth")
    return _build(pretrained, cfg, {"stride": 8, "embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B with overlapping patches, 730 tokens; no published weights."""
    return _build(pretrained, {}, {"stride": 8, "embed_dim": 768}, kwargs)


@register_model
def vim_pico_patch8_32(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A very small Vim (17 tokens) for tests and the demo; no pretrained weights."""
    return _build(pretrained, {}, {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4}, kwargs)


@register_model
def vim_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A small Vim (65 tokens) with weights of our own in the package (docs/how-to/pretrain.md), for demos and tests."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "d_state": 8, "expand": 1}
    return _build(pretrained, {"embedded": "vim_nano.safetensors"}, sizes, kwargs)
