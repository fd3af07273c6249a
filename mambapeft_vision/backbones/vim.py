"""Vision Mamba (Vim, arXiv 2401.09417): bidirectional v2, class token in the middle, halved sum of directions.

Plain PyTorch that reads top to bottom and knows nothing of PEFT. Parameter names are those of the official
checkpoints. Everything between in_proj and out_proj is one op of `mambapeft_kernels`.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.nn.functional as F
from mambapeft_kernels import FUSED, BlockSizes, Direction, add_rms_norm, compile_ahead, resolve_backend, ssm_mixer
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from mambapeft_vision.backbones.ports import AffixPort, Joined, NarrowCopy, Port, PortedLinear, PortedPatches
from mambapeft_vision.utils.errors import UserError


class Mixer(nn.Module):
    """The bidirectional selective-scan mixer of one block: [B, L, D] → [B, L, D], or one token of it.

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
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(rank, inner)
        self.out_proj = PortedLinear(inner, embed_dim, bias=False, name=f"{name}.out_proj")
        self._narrow = NarrowCopy(), NarrowCopy()

        self.affix = AffixPort(f"{name}.affix")  # tokens → Joined
        self.gate = Port(f"{name}.gate")  # z [B, L, E] → the tensor whose silu gates the output
        self.state_offset = Port(f"{name}.state_offset")  # () → ([E, N], [E, N])
        self.output_offset = Port(f"{name}.output_offset")  # () → ([E], [E])

    @property
    def row_blocks(self) -> dict[str, dict[str, slice]]:
        """Named blocks of output rows of the weights, by submodule name."""
        inner, rank, states = self.d_inner, self.dt_rank, self.A_log.shape[1]
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

        dtype: of the activations. A frozen x_proj comes in it where the kernel would round it to that: half the bytes.
        """
        x_proj = self.x_proj.weight, self.x_proj_b.weight
        if self.kernel in FUSED:
            x_proj = [narrow.of(weight, dtype) for narrow, weight in zip(self._narrow, x_proj)]
        state = (None, None) if self.state_offset.value is None else self.state_offset.value()
        output = (None, None) if self.output_offset.value is None else self.output_offset.value()
        return (
            _direction(self.conv1d, x_proj[0], self.dt_proj, self.A_log, self.D, state[0], output[0], False),
            _direction(self.conv1d_b, x_proj[1], self.dt_proj_b, self.A_b_log, self.D_b, state[1], output[1], True),
        )

    def forward(self, h: Tensor, only: int | None = None) -> Tensor:
        """[B, L, D] → [B, L, D]; with `only` that token's output alone, [B, 1, D]."""
        if self.affix.value is not None:
            out = self._forward_with_affix(h)
            return out if only is None else out[:, only : only + 1]
        if only is not None:
            # A scan depends on nothing behind a token: one direction reads the tokens up to it, the other from it on.
            x_until, z_until, x_from, z_from = _Windows.apply(self._project_joined(h), only)
            return self._scan_apart(((x_until, z_until), (x_from, z_from)), (slice(only, only + 1), slice(0, 1)))
        x, z = self._project(h)
        return self.out_proj(ssm_mixer(x, z, self.directions(x.dtype), self.scale, self.kernel))

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor]:
        x, z = self.in_proj(h).chunk(2, dim=-1)
        return x, z if self.gate.value is None else self.gate.value(z)

    def _project_joined(self, h: Tensor) -> Tensor:
        """x and z side by side, [B, L, 2E]."""
        return self.in_proj(h) if self.gate.value is None else torch.cat(self._project(h), dim=-1)

    def _scan_apart(self, halves: Sequence[tuple[Tensor, Tensor]], keep: Sequence[slice | Tensor]) -> Tensor:
        """The output where each direction reads its own x and z; `keep` says where the output's tokens are in each."""
        # The gate of a kept token is the same in both, so gated outputs add up.
        forward, backward = (
            ssm_mixer(x, z, (direction,), self.scale, self.kernel)[:, tokens]
            for (x, z), direction, tokens in zip(halves, self.directions(halves[0][0].dtype), keep)
        )
        return self.out_proj(forward + backward)

    def _forward_with_affix(self, h: Tensor) -> Tensor:
        """As `forward`, with other tokens joined in before the scan and dropped after it."""
        joined = self._join_inside(h) if self.affix.inner else self.affix.value(h)
        split = (lambda xz: xz.chunk(2, dim=-1)) if self.affix.inner else self._project
        halves = [split(buffer) for buffer in joined.buffers]
        if len(halves) == 2:
            return self._scan_apart(halves, joined.keep)
        ((x, z),) = halves
        out = self.out_proj(ssm_mixer(x, z, self.directions(x.dtype), self.scale, self.kernel))
        return out[:, joined.keep[0]]  # here a token has half the numbers that it has before out_proj

    def _join_inside(self, h: Tensor) -> Joined:
        """The affix port's tokens beside in_proj's output."""
        if self.gate.value is not None or self.affix.ends is None or not self.in_proj.keeps_zeros:
            return self.affix.value(self._project_joined(h))
        # in_proj leaves room at the ends, so that its output need not be copied: it is four times as wide as h.
        return self.affix.value(self.in_proj(F.pad(h, (0, 0, *self.affix.ends))), has_room=True)

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


def _direction(
    conv1d: nn.Conv1d,
    x_proj: Tensor,
    dt_proj: nn.Linear,
    A_log: Tensor,
    D: Tensor,
    state_offset: Tensor | None,
    output_offset: Tensor | None,
    reverse: bool,
) -> Direction:
    return Direction(
        conv1d.weight.squeeze(1),
        conv1d.bias,
        x_proj,
        dt_proj.weight,
        dt_proj.bias,
        A_log,
        D,
        state_offset,
        output_offset,
        reverse,
    )


class _Windows(torch.autograd.Function):
    """x, z of the tokens up to `index`, then x, z of those from it on, without copies: views of xz [B, L, 2E].

    The four gradients meet in one buffer; autograd's own slices would each fill one of the whole size.
    """

    @staticmethod
    def forward(ctx, xz, index):
        ctx.index = index
        return *xz[:, : index + 1].chunk(2, dim=-1), *xz[:, index:].chunk(2, dim=-1)

    @staticmethod
    def backward(ctx, *grads):
        index, (batch, rest, channels) = ctx.index, grads[-1].shape
        dxz = grads[0].new_empty(batch, index + rest, 2 * channels)
        for half, until, onward in zip((dxz[..., :channels], dxz[..., channels:]), grads[:2], grads[2:]):
            half[:, : index + 1] = until
            half[:, index + 1 :] = onward[:, 1:]
            half[:, index] += onward[:, 0]
        return dxz, None


class RMSNorm(nn.Module):
    """Holds the weight of residual add + RMSNorm; the kernel computes both."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(
        self, hidden: Tensor, residual: Tensor | None, branch_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(hidden, residual, self.weight, self.eps, branch_scale)


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(RMSNorm(residual)). The residual stays in float32.

    [B, L, D] each; with `only` it returns that token of both, [B, 1, D].
    """

    def __init__(self, embed_dim: int, *, name: str, norm_eps: float, **mixer: Any) -> None:
        super().__init__()
        self.mixer = Mixer(embed_dim, name=f"{name}.mixer", **mixer)
        self.norm = RMSNorm(embed_dim, norm_eps)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, branch_scale: Tensor | None, only: int | None = None
    ) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm(hidden, residual, branch_scale)
        if only is None:
            return self.mixer(normed), residual
        return self.mixer(normed, only), residual[:, only : only + 1]


def _takes_only(layer: nn.Module) -> bool:
    """Whether nobody needs a layer's other tokens: no hook in it, and neither block nor mixer is somebody else's."""
    watched = any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in layer.modules()
    )
    return not watched and _is_own_forward(layer, Block) and _is_own_forward(layer.mixer, Mixer)


def _is_own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    return getattr(module.forward, "__func__", None) is kind.forward


class PatchEmbed(nn.Module):
    """[B, 3, H, W] → [B, patches, D]; overlapping patches when stride < patch_size."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, stride: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if patch_size > min(img_size):
            raise UserError(
                f"backbone.patch_size={patch_size} is larger than the images, {img_size[0]}x{img_size[1]}; lower it or "
                f"set backbone.img_size"
            )
        self.img_size = img_size
        self.grid_size = tuple((size - patch_size) // stride + 1 for size in img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = PortedPatches(in_chans, embed_dim, patch_size, stride, name="patch_embed.proj")

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.img_size:
            raise UserError(
                f"images are {images.shape[-2]}x{images.shape[-1]}, but this backbone was built for "
                f"{self.img_size[0]}x{self.img_size[1]}; resize them or set backbone.img_size"
            )
        return self.proj(images).flatten(2).transpose(1, 2)


class Vim(nn.Module):
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
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, stride or patch_size, in_chans, embed_dim)
        self.embed_dim = self.num_features = embed_dim
        self.num_classes = num_classes
        self.class_token_index = self.patch_embed.num_patches // 2

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 1, embed_dim))
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand, "dt_rank": dt_rank}
        self.layers = nn.ModuleList(
            Block(embed_dim, name=f"layers.{i}", norm_eps=norm_eps, halve_sum=halve_sum, **sizes) for i in range(depth)
        )
        self.norm_f = RMSNorm(embed_dim, norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.prompt = Port("prompt")  # (tokens [B, L, D], class index) → (tokens [B, L', D], class index)

        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        # One rate for the branch entering each block, and one for the branch entering the final norm.
        rates = [*rates[:depth], drop_path_rate]
        self.register_buffer("_keep", 1.0 - torch.tensor(rates), persistent=False)
        self._drops = drop_path_rate > 0
        self.init_weights()

    @property
    def mixers(self) -> list[Mixer]:
        return [layer.mixer for layer in self.layers]

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        """Named blocks of output rows of a weight, e.g. {"x": …, "z": …} for "layers.0.mixer.in_proj.weight"."""
        path, _, module = parameter.rpartition(".")[0].rpartition(".")
        owner = self.get_submodule(path)
        return {} if owner is self else getattr(owner, "row_blocks", {}).get(module, {})

    def set_kernel(self, kernel: str, device: torch.device | str) -> str:
        """Chooses the kernel backend for all mixers; returns the name of what will run on `device`."""
        resolved = resolve_backend(kernel, device)
        for mixer in self.mixers:
            mixer.kernel = resolved
        return resolved

    def compile_ahead(self, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[Future, ...]:
        """Starts to compile a block's kernels for activations of `dtype`; see `mambapeft_kernels.compile_ahead`."""
        mixer = self.mixers[0]
        states, taps = mixer.A_log.shape[1], mixer.conv1d.kernel_size[0]
        sizes = BlockSizes(self.embed_dim, mixer.d_inner, states, mixer.dt_rank, taps)
        return compile_ahead(sizes, mixer.scale, dtype, device, kernel)

    def reset_classifier(self, num_classes: int) -> None:
        """A new zero head for `num_classes` classes (0: none), on the old one's device and dtype."""
        self.num_classes = num_classes
        like = {"device": self.norm_f.weight.device, "dtype": self.norm_f.weight.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **like) if num_classes else nn.Identity()
        self._init_head()

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, D]: the class token after the last block and the final norm."""
        tokens, index = self.embed(images)
        scales = self._branch_scales(tokens.shape[0])
        hidden, residual = tokens, None
        *layers, last = self.layers
        for i, layer in enumerate(layers):
            hidden, residual = layer(hidden, residual, None if i == 0 or scales is None else scales[i])
        # Only the class token leaves the network, so only it is finished and normalised.
        inputs = hidden, residual, None if not layers or scales is None else scales[len(layers)]
        if _takes_only(last):
            hidden, residual = last(*inputs, only=index)
        else:
            hidden, residual = (t[:, index : index + 1] for t in last(*inputs))
        feature, _ = self.norm_f(hidden, residual, None if scales is None else scales[-1])
        return feature.squeeze(1)

    def embed(self, images: Tensor) -> tuple[Tensor, int]:
        """Patches with the class token in the middle and position embedding; and the class token's index."""
        patches, index = self.patch_embed(images), self.class_token_index
        class_token = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        tokens = torch.cat((patches[:, :index], class_token, patches[:, index:]), dim=1) + self.pos_embed
        return (tokens, index) if self.prompt.value is None else self.prompt.value(tokens, index)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def _branch_scales(self, batch: int) -> Tensor | None:
        """[depth + 1, B] drop-path factors, 0 or 1 / keep, drawn per sample; None outside training."""
        if not (self.training and self._drops):
            return None
        keep = self._keep[:, None]
        return (torch.rand(keep.shape[0], batch, device=keep.device) < keep).to(keep.dtype) / keep

    def init_weights(self) -> None:
        """Vim's own initialisation of everything; the head is zero."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for layer in self.layers:
            layer.mixer.init_weights(len(self.layers))
            nn.init.ones_(layer.norm.weight)
        nn.init.ones_(self.norm_f.weight)
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)


# ---------------------------------------------------------------------------------------------------------------
# Variants. A model's record says everything needed to use it: input, normalisation, and where weights come from.


def _record(img_size: int = 224, **weights: str) -> dict[str, Any]:
    return {
        "input_size": (3, img_size, img_size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **weights,
    }


def _hub(repository: str, file: str) -> dict[str, str]:
    return {"hf_hub_id": repository, "hf_hub_filename": file}


def _build(record: dict[str, Any], sizes: dict[str, Any], pretrained: bool, kwargs: dict[str, Any]) -> Vim:
    # timm.create_model hands these to every entry point; they steer timm's own loader, which we do not use.
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    model = Vim(**{"img_size": record["input_size"][-1], **sizes, **kwargs})
    model.default_cfg = model.pretrained_cfg = {
        **record,
        "input_size": (3, *model.patch_embed.img_size),
        "architecture": {k: v for k, v in {**sizes, **kwargs}.items() if k != "num_classes"},
    }
    if pretrained:
        from mambapeft_vision.backbones.weights import load_official

        load_official(model)
    return model


def _variant(name: str, doc: str, record: dict[str, Any], **sizes: Any) -> Callable[..., Vim]:
    def entry(pretrained: bool = False, **kwargs: Any) -> Vim:
        return _build(record, sizes, pretrained, kwargs)

    entry.__name__, entry.__qualname__, entry.__doc__, entry.__module__ = name, name, doc, __name__
    globals()[name] = register_model(entry)
    return entry


_TINY, _SMALL, _BASE = {"embed_dim": 192}, {"embed_dim": 384}, {"embed_dim": 768}
_variant(
    "vim_tiny_patch16_224",
    "Vim-Ti, 197 tokens.",
    _record(**_hub("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth")),
    **_TINY,
)
_variant(
    "vim_small_patch16_224",
    "Vim-S, 197 tokens.",
    _record(**_hub("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth")),
    **_SMALL,
)
_variant(
    "vim_base_patch16_224",
    "Vim-B, 197 tokens.",
    _record(**_hub("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth")),
    **_BASE,
)
_variant(
    "vim_tiny_patch16_stride8_224",
    "Vim-Ti with overlapping patches, 730 tokens.",
    _record(**_hub("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth")),
    stride=8,
    **_TINY,
)
_variant(
    "vim_small_patch16_stride8_224",
    "Vim-S with overlapping patches, 730 tokens.",
    _record(**_hub("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth")),
    stride=8,
    **_SMALL,
)
_variant("vim_base_patch16_stride8_224", "Vim-B with overlapping patches, 730 tokens.", _record(), stride=8, **_BASE)
_variant(
    "vim_pico_patch8_32",
    "A very small Vim (17 tokens) for tests and the demo; no pretrained weights.",
    _record(32),
    patch_size=8,
    embed_dim=64,
    depth=4,
)
_variant(
    "vim_nano_patch8_64",
    "A small Vim (65 tokens) with weights of our own in the package (docs/pretraining.md), for demos and tests.",
    _record(64, embedded="vim_nano.safetensors"),
    patch_size=8,
    embed_dim=192,
    depth=6,
    d_state=8,
    expand=1,
)
