"""The parts of Vim's blocks: mixer of selective scans, RMSNorm with residual sum, block.

Vim (arXiv 2401.09417), Mamba-Reg, VideoMamba and ARM are made of them. Everything between in_proj and out_proj is one
op of `mambapeft_kernels`.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from mambapeft_kernels import FUSED, Direction, add_rms_norm, ssm_mixer
from torch import Tensor, nn

from mambapeft_vision.backbones.layers import ConvWeights, LinearWeights, PortedLinear, computes_as
from mambapeft_vision.backbones.layout import TokenLayout
from mambapeft_vision.backbones.ports import (
    AffixPort,
    BranchPort,
    InputPort,
    Joined,
    Port,
    Ported,
    ReplacePort,
    TapPort,
)
from mambapeft_vision.backbones.unfused import ModuleDirection, announce, mixer_through_modules
from mambapeft_vision.utils.errors import UserError

Directions: TypeAlias = Sequence[Direction] | Sequence[ModuleDirection]  # for the kernel, or to call modules

# Modules whose weights the kernel reads.
_HELD: dict[str, type[nn.Module]] = {"conv1d": ConvWeights, "x_proj": LinearWeights, "dt_proj": LinearWeights}


class Mixer(Ported):
    """The bidirectional selective-scan mixer of one block: [B, L, D] → [B, L, D].

    D embed_dim, E = expand·D channels, N states (read from A_log), R dt_rank, K conv taps. `*_b` is the direction
    that reads the tokens from last to first. conv1d, x_proj and dt_proj hold weights that the kernel reads; the modules
    are called only if other code takes part in their computation (see `unfused.py`).

    Args:
        halve_sum: average the two directions (Vim and Mamba-Reg do) instead of adding them (VideoMamba).
    """

    #: What the names of each direction's parameters end in.
    suffixes: tuple[str, ...] = ("", "_b")

    # Modules of the first direction; names of the others end in their suffix.
    A_log: nn.Parameter
    D: nn.Parameter
    conv1d: ConvWeights
    x_proj: LinearWeights
    dt_proj: LinearWeights

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
        self.d_conv = d_conv
        self.scale = 0.5 if halve_sum else 1.0
        self.kernel = "auto"

        inner, rank = self.d_inner, self.dt_rank
        for suffix in self.suffixes:
            self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.empty(inner, d_state)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(inner)))
        self.in_proj = PortedLinear(embed_dim, 2 * inner, bias=False, name=f"{name}.in_proj")
        for suffix in self.suffixes:
            x_proj = LinearWeights(inner, rank + 2 * d_state, bias=False)
            # The fused kernels round it to the activations' dtype as they load it: a cast is half of the bytes.
            x_proj.cast_weights = ("weight",)
            self.add_module(f"conv1d{suffix}", ConvWeights(inner, inner, d_conv, groups=inner))
            self.add_module(f"x_proj{suffix}", x_proj)
            self.add_module(f"dt_proj{suffix}", LinearWeights(rank, inner))
        self.out_proj = PortedLinear(inner, embed_dim, bias=False, name=f"{name}.out_proj")

        self.affix = AffixPort(f"{name}.affix")  # tokens, layout → Joined
        self.gate = Port(f"{name}.gate")  # z [B, L, E] → the tensor whose silu gates the output
        self.state_offset = Port(f"{name}.state_offset")  # () → one [E, N] for each direction
        self.output_offset = Port(f"{name}.output_offset")  # () → one [E] for each direction

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
            **{f"x_proj{suffix}": x_proj for suffix in self.suffixes},
        }

    def directions(self, dtype: torch.dtype) -> Directions:
        """The weights of the scan directions, each read once (they may be computed when read); or their modules.

        dtype: dtype of the activations.
        """
        nothing = (None,) * len(self.suffixes)
        offsets = [nothing if p.value is None else p.value() for p in (self.state_offset, self.output_offset)]
        if not self._is_held():
            return tuple(self._module_direction(suffix, *own) for suffix, *own in zip(self.suffixes, *offsets))
        narrow = dtype if self.kernel in FUSED else None
        return tuple(
            self._direction(suffix, narrow, state, output) for suffix, state, output in zip(self.suffixes, *offsets)
        )

    def _is_held(self) -> bool:
        """Whether a kernel may read the weights of conv1d, x_proj and dt_proj."""
        for part, kind in _HELD.items():
            for suffix in self.suffixes:
                module = getattr(self, f"{part}{suffix}")
                if not computes_as(module, kind):
                    announce(part, module)
                    return False
        return True

    def _module_direction(
        self, suffix: str, state_offset: Tensor | None, output_offset: Tensor | None
    ) -> ModuleDirection:
        conv1d, x_proj, dt_proj = (getattr(self, f"{part}{suffix}") for part in _HELD)
        return ModuleDirection(
            conv1d=conv1d,
            x_proj=x_proj,
            dt_proj=dt_proj,
            taps=self.d_conv,
            A_log=self.read(f"A{suffix}_log"),
            D=self.read(f"D{suffix}"),
            state_offset=state_offset,
            output_offset=output_offset,
            reverse=suffix.endswith("_b"),
        )

    def _direction(
        self, suffix: str, narrow: torch.dtype | None, state_offset: Tensor | None, output_offset: Tensor | None
    ) -> Direction:
        conv1d, x_proj, dt_proj = (getattr(self, f"{part}{suffix}") for part in _HELD)
        return Direction(
            conv_weight=conv1d.read("weight").squeeze(1),
            conv_bias=conv1d.read("bias"),
            x_proj=x_proj.read("weight", narrow),
            dt_proj=dt_proj.read("weight"),
            dt_bias=dt_proj.read("bias"),
            A_log=self.read(f"A{suffix}_log"),
            D=self.read(f"D{suffix}"),
            state_offset=state_offset,
            output_offset=output_offset,
            reverse=suffix.endswith("_b"),
        )

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

    def _scan(self, xz: Tensor, z: Tensor | None, directions: Directions) -> Tensor:
        """[B, L, E]; arguments as `_project` and `directions` return them."""
        if isinstance(directions[0], ModuleDirection):
            return mixer_through_modules(xz, z, cast(Sequence[ModuleDirection], directions), self.scale)
        return ssm_mixer(xz, cast(Sequence[Direction], directions), self.scale, self.kernel, z=z)

    def _scan_apart(
        self,
        inputs: Sequence[tuple[Tensor, Tensor | None]],
        directions: Directions,
        keep: Sequence[slice | Tensor],
    ) -> Tensor:
        """[B, L, E] where each of two directions reads a buffer of its own, of which the tokens `keep` remain.

        The gate of a kept token is the same in both, so outputs add up.
        """
        forward, backward = (
            self._scan(*buffer, directions[i : i + 1])[:, kept]
            for i, (buffer, kept) in enumerate(zip(inputs, keep, strict=True))
        )
        return forward + backward

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
        return self.out_proj(self._scan_apart(inputs, directions, joined.keep))

    def _join_inside(self, h: Tensor, layout: TokenLayout) -> Joined:
        """The affix port's tokens beside in_proj's output, [B, L', 2E]."""
        if self.gate.value is None and self.affix.ends is not None and _keeps_zeros(self.in_proj):
            # in_proj leaves room at the ends, so that its output need not be copied: it is four times as wide as h.
            return self.affix.value(self.in_proj(F.pad(h, (0, 0, *self.affix.ends))), layout, has_room=True)
        xz, z = self._project(h)
        return self.affix.value(xz if z is None else torch.cat((xz, z), dim=-1), layout)

    def init_weights(self, depth: int, further_dt_bias: str = "drawn") -> None:
        """Vim's initialisation: S4D-real A, D = 1, Δ log-uniform in [1e-3, 0.1], out_proj scaled by depth.

        further_dt_bias: start of the directions after the first. "drawn": as the first one's. "zero": as in the
            published codes, so that Δ is near softplus(0) = 0.69 and they forget within few tokens.
        """
        if further_dt_bias not in ("drawn", "zero"):
            raise UserError(f"backbone.further_dt_bias={further_dt_bias!r}; expected 'drawn' or 'zero'")
        # In this order, so that a seed draws the same weights in every release.
        parts = (f"{part}{suffix}" for part in ("x_proj", "conv1d") for suffix in self.suffixes)
        for module in ("in_proj", *parts, "out_proj"):
            getattr(self, module).reset_parameters()
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(depth)
        for suffix in self.suffixes:
            self._init_scan(suffix, draw_bias=not suffix or further_dt_bias == "drawn")

    @torch.no_grad()
    def _init_scan(self, suffix: str, draw_bias: bool) -> None:
        A_log, dt_proj = getattr(self, f"A{suffix}_log"), getattr(self, f"dt_proj{suffix}")
        states = torch.arange(1, A_log.shape[1] + 1, dtype=A_log.dtype)
        A_log.copy_(states.log().expand_as(A_log))
        getattr(self, f"D{suffix}").fill_(1.0)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(dt_proj.weight, -bound, bound)
        if not draw_bias:
            nn.init.zeros_(dt_proj.bias)
            return
        dt = torch.exp(torch.empty_like(dt_proj.bias).uniform_(math.log(1e-3), math.log(0.1)))
        dt = dt.clamp(min=1e-4)
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of the bias is dt


def _keeps_zeros(in_proj: nn.Module) -> bool:
    """Whether in_proj maps zeros to zeros; False for any other module in its place."""
    return isinstance(in_proj, PortedLinear) and in_proj.keeps_zeros


class RMSNorm(Ported):
    """Holds the weight of residual add + RMSNorm; the kernel computes both. The port `offset` takes a bias."""

    def __init__(self, dim: int, eps: float, *, name: str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.offset = Port(f"{name}.offset")  # () → [D]

    def forward(
        self, hidden: Tensor, residual: Tensor | None, branch_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        normed, residual = add_rms_norm(hidden, residual, self.read("weight"), self.eps, branch_scale)
        if self.offset.value is not None:
            normed = normed + self.offset.value().to(normed.dtype)
        return normed, residual


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(RMSNorm(residual)). [B, L, D] each, the residual in float32.

    The port `input` sees `hidden`, which is not yet a part of the residual; the port `tap` sees their sum after the
    block, without drop path.
    """

    after = mlp_side = mlp_branch = None  # there is neither a port after the block nor an MLP

    def __init__(self, embed_dim: int, *, name: str, norm_eps: float, **mixer: Any) -> None:
        super().__init__()
        self.name, self.embed_dim = name, embed_dim
        self.mixer = Mixer(embed_dim, name=f"{name}.mixer", **mixer)
        self.norm = RMSNorm(embed_dim, norm_eps, name=f"{name}.norm")
        self.input = InputPort(f"{name}.input")
        self.replace = ReplacePort(f"{name}.replace")
        self.mixer_branch = BranchPort(f"{name}.mixer_branch")
        self.tap = TapPort(f"{name}.tap")

    def forward(
        self, hidden: Tensor, residual: Tensor | None, branch_scale: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, TokenLayout]:
        hidden, layout = self.input(hidden, layout)
        if residual is not None and residual.shape[1] != hidden.shape[1]:
            raise UserError(
                f"{self.input.owner!r} changes the number of tokens in {self.name} from {residual.shape[1]} to "
                f"{hidden.shape[1]}; only the first block's input can, as later tokens have a residual"
            )
        hidden, residual = self.replace(hidden, residual, layout)
        normed, residual = self.norm(hidden, residual, branch_scale)
        hidden = self.mixer_branch(normed, self.mixer(normed, layout), layout)
        if self.tap.readers:
            self.tap(residual + hidden, layout)
        return hidden, residual, layout
