"""VMamba (arXiv 2401.10166): four stages of blocks that scan a map in four directions.

Plain PyTorch that reads top to bottom and knows nothing of PEFT. Maps are channel-last, [B, H, W, D]: that is what
the kernels read, and their places row by row are the tokens [B, L, D]. Parameter names are those of the official
checkpoints, but for `norm` and `head`: there `classifier.norm` and `classifier.head`. Images may have any size.
D embed_dim of a stage, E channels, N states, R dt_rank.
"""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from mambapeft_kernels import (
    FUSED,
    SS2DWeights,
    StageSizes,
    add_branch,
    add_layer_norm,
    compile_stages_ahead,
    conv_norm_gelu,
    depthwise_conv_silu,
    layer_norm,
    prefix_states,
    resolve_backend,
    ss2d,
    ss2d_norm,
)
from mambapeft_kernels.low_rank.linear import compute_dtype
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambapeft_vision.backbones.build import EMBEDDED_WEIGHTS, build, cfg
from mambapeft_vision.backbones.drop_path import BranchScales
from mambapeft_vision.backbones.layers import (
    Mlp,
    PortedConv2d,
    PortedLinear,
    both_sides,
    computes_as,
    zero_head,
    zero_init,
)
from mambapeft_vision.backbones.layout import TokenLayout, select
from mambapeft_vision.backbones.ports import BranchPort, InputPort, Port, Ported, PrefixPort, SidePort, TapPort
from mambapeft_vision.backbones.timm_model import State, TimmModel
from mambapeft_vision.backbones.timm_model import stream as tokens_of
from mambapeft_vision.backbones.unfused import announce
from mambapeft_vision.utils.errors import UserError


class RefusedPort(InputPort):
    """A port of other backbones for which this one has no place; setting it raises UserError."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.reason = reason

    def set(self, owner: str, value: Any, **options: Any) -> None:
        raise UserError(f"{owner!r} wants the port {self.name!r}, but {self.reason}; choose another method or backbone")


class Norm(Ported):
    """LayerNorm over the channels of a map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.kernel = "auto"
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """[..., D] → [..., D]; shift: [D], added to x first."""
        return layer_norm(x, self.read("weight"), self.read("bias"), self.eps, self.kernel, shift)


def add_norm(norm: nn.Module, hidden: Tensor, residual: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of residual + scale · hidden [B, ..., D], and that sum in at least float32; scale: [B] or None.

    One pass makes both, unless other code takes part in the norm; then the norm is called. In inference fused kernels
    round the sum to hidden's dtype once it is normed: the sums of all blocks are a third of an evaluation's bytes.
    """
    if computes_as(norm, Norm):
        weights = norm.read("weight"), norm.read("bias")
        narrow = not torch.is_grad_enabled() and norm.kernel in FUSED
        return add_layer_norm(hidden, residual, *weights, norm.eps, scale, norm.kernel, narrow)
    total = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if scale is not None:
        total = total * scale.view(-1, *[1] * (hidden.ndim - 1))
    total = total if residual is None else residual + total
    return norm(total).to(hidden.dtype), total


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of channel-last maps, [B, H, W, C] → [B, H', W', C']."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def normed_convolution(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)) of channel-last maps; fused kernels of norms add the convolution's bias, unless that trains."""
    if computes_as(conv, PortedConv2d) and conv.bias is not None and computes_as(norm, Norm) and norm.kernel in FUSED:
        bias = conv.read("bias")
        if not (torch.is_grad_enabled() and bias.requires_grad):
            return norm(conv.convolve(x.permute(0, 3, 1, 2), None).permute(0, 2, 3, 1), bias)
    return norm(convolved(conv, x))


class SS2D(Ported):
    """The mixer of one block, [B, H, W, D] → [B, H, W, D]: out_proj(norm(scans(silu(conv(in_proj))))).

    In the vanilla layout in_proj also makes a gate z [B, H, W, E]: out_proj(norm(...) · silu(z)).
    The four directions, along the first axis of the weights: row by row, column by column, and both backwards.
    """

    suffixes = ("_0", "_1", "_2", "_3")

    def __init__(
        self,
        embed_dim: int,
        *,
        name: str,
        d_state: int,
        ssm_ratio: float,
        vanilla: bool,
        conv_bias: bool,
        dt_rank: int | None,
    ) -> None:
        super().__init__()
        self.name = name
        directions = len(self.suffixes)
        self.d_inner = inner = int(ssm_ratio * embed_dim)
        self.dt_rank = rank = math.ceil(embed_dim / 16) if dt_rank is None else dt_rank
        self.gated = vanilla
        self.kernel = "auto"
        self.x_proj_weight = nn.Parameter(torch.empty(directions, rank + 2 * d_state, inner))
        self.A_logs = nn.Parameter(torch.empty(directions * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(directions * inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner))
        in_proj = PortedLinear(embed_dim, inner * (2 if vanilla else 1), bias=False, name=f"{name}.in_proj")
        conv2d = PortedConv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        if vanilla:  # the official order of keys
            self.in_proj, self.conv2d, self.out_norm = in_proj, conv2d, Norm(inner)
        else:
            self.out_norm, self.in_proj, self.conv2d = Norm(inner), in_proj, conv2d
        self.out_proj = PortedLinear(inner, embed_dim, bias=False, name=f"{name}.out_proj")
        # The fused kernels round it to the activations' dtype as they read it: a cast is half of the bytes.
        self.cast_weights = ("x_proj_weight",)

        self.affix = PrefixPort(f"{name}.affix")  # () → [4, n, E]
        self._prefix_states: Tensor | None  # states that the affix leaves, in a merged model: [4, E, N]
        self.register_buffer("_prefix_states", None, persistent=False)
        self.gate = Port(f"{name}.gate") if vanilla else RefusedPort(f"{name}.gate", "VMamba's blocks have no gate")
        self.state_offset = Port(f"{name}.state_offset")  # () → four [E, N]
        self.output_offset = Port(f"{name}.output_offset")  # () → four [E]

    @property
    def d_state(self) -> int:
        """N of the frozen weights."""
        return self.A_logs.shape[1]

    @property
    def states(self) -> int:
        """N as the scan has it."""
        return self.read("A_logs").shape[1]

    @property
    def row_blocks(self) -> dict[str, dict[str, slice]]:
        """Named blocks of rows (axis -2) of the weights."""
        inner, rank, states = self.d_inner, self.dt_rank, self.d_state
        x_proj = {
            "d": slice(0, rank),
            "b": slice(rank, rank + states),
            "c": slice(rank + states, rank + 2 * states),
        }
        in_proj = {"x": slice(0, inner)} | ({"z": slice(inner, 2 * inner)} if self.gated else {})
        return {"x_proj_weight": x_proj, "in_proj.weight": in_proj}

    def weights(self, dtype: torch.dtype) -> SS2DWeights:
        """The weights of the scans, each read once (a read may compute it); dtype: that of the activations."""
        weights = SS2DWeights(
            x_proj_weight=self.read("x_proj_weight", dtype if self.kernel in FUSED else None),
            dt_projs_weight=self.read("dt_projs_weight"),
            dt_projs_bias=self.read("dt_projs_bias"),
            A_logs=self.read("A_logs"),
            Ds=self.read("Ds"),
            state_offset=None if self.state_offset.value is None else torch.stack(self.state_offset.value()),
        )
        if self.affix.value is None:
            return weights
        folded = self._prefix_states
        states = prefix_states(self.affix.value(), weights) if folded is None else folded
        return weights._replace(initial_states=states)

    @torch.no_grad()
    def bake(self) -> None:
        """As `Ported.bake`; and the states that an affix leaves, which are all that the scans need of it."""
        super().bake()
        if self.affix.value is not None:
            self._prefix_states = None
            self._prefix_states = self.weights(self.x_proj_weight.dtype).initial_states

    def forward(self, h: Tensor) -> Tensor:
        """[B, H, W, D] → [B, H, W, D]."""
        x, z = self.in_proj(h), None
        if self.gated:
            x, z = x.chunk(2, dim=-1)
            z = z if self.gate.value is None else self.gate.value(z)
        u = self._conv_silu(x)
        y = self._normed_scans(u)
        return self.out_proj(y if z is None else y * F.silu(z))

    def _normed_scans(self, u: Tensor) -> Tensor:
        """out_norm of the scans' sum, [B, H, W, E]."""
        norm, weights = self.out_norm, self.weights(u.dtype)
        if self.output_offset.value is None and computes_as(norm, Norm):
            return ss2d_norm(u, weights, norm.read("weight"), norm.read("bias"), norm.eps, self.kernel)
        y = ss2d(u, weights, self.kernel)
        if self.output_offset.value is not None:
            y = y + torch.stack(self.output_offset.value()).sum(0).to(y.dtype)
        return norm(y)

    def _conv_silu(self, x: Tensor) -> Tensor:
        """silu(conv2d(x)), [B, H, W, E]; conv2d is called if other code takes part in it."""
        conv = self.conv2d
        if not computes_as(conv, PortedConv2d):
            announce("conv2d", conv)
            return F.silu(convolved(conv, x))
        bias = None if conv.bias is None else conv.read("bias")
        return depthwise_conv_silu(x, conv.read("weight"), bias, self.kernel)

    def init_weights(self) -> None:
        """Δ log-uniform in [0.001, 0.1], A = -(1 … N), D = 1."""
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            dt = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(1e-3), math.log(0.1))).clamp(min=1e-4)
            self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of the bias is dt
            self.A_logs.copy_(torch.arange(1, self.d_state + 1, dtype=self.A_logs.dtype).log().expand_as(self.A_logs))
            self.Ds.fill_(1.0)


class Stream(NamedTuple):
    """A map whose last sum is still to be made: residual + scale · hidden. The next norm makes it."""

    hidden: Tensor  # [B, H, W, D]
    residual: Tensor | None = None  # [B, H, W, D]; None: zero
    scale: Tensor | None = None  # [B], the drop-path factor of each sample; None: 1

    def total(self) -> Tensor:
        """[B, H, W, D]."""
        hidden = self.hidden if self.scale is None else self.hidden * self.scale[:, None, None, None]
        return hidden if self.residual is None else self.residual + hidden

    def state(self) -> State:
        """The same as tokens."""
        residual = None if self.residual is None else self.residual.flatten(1, 2)
        return State(self.hidden.flatten(1, 2), map_layout(self.hidden), residual, self.scale)


class Block(nn.Module):
    """x += drop_path(op(norm(x))); x += drop_path(mlp(norm2(x))), x: [B, H, W, D]; no MLP in the vanilla layout.

    Ports see maps as tokens [B, H · W, D]. `after` adds to the sum of both branches, `tap` sees it without drop path.
    """

    mlp_branch: BranchPort | None = None

    def __init__(self, embed_dim: int, *, name: str, mlp_ratio: float, **mixer: Any) -> None:
        super().__init__()
        self.name, self.embed_dim = name, embed_dim
        self.norm = Norm(embed_dim)
        self.op = SS2D(embed_dim, name=f"{name}.op", **mixer)
        if mlp_ratio:
            self.norm2 = Norm(embed_dim)
            self.mlp = Mlp(embed_dim, int(mlp_ratio * embed_dim), name=f"{name}.mlp")
            self.mlp_branch = BranchPort(f"{name}.mlp_branch")
        self.has_mlp = bool(mlp_ratio)
        self.input = InputPort(f"{name}.input")
        self.mixer_branch = BranchPort(f"{name}.mixer_branch")
        self.after = SidePort(f"{name}.after")
        self.tap = TapPort(f"{name}.tap")

    @property
    def mlp_side(self) -> SidePort | None:
        return self.mlp.side if self.has_mlp else None

    def forward(self, stream: Stream, first: Tensor | None, second: Tensor | None) -> Stream:
        """first, second: drop-path factors [B] of the two branches."""
        if self.input.value is not None:
            stream = Stream(self._through_input(stream.total()))
        normed, residual = add_norm(self.norm, *stream)
        stream = Stream(through_branch(self.mixer_branch, normed, self.op(normed)), residual, first)
        if self.mlp_branch is not None:
            normed, residual = add_norm(self.norm2, *stream)
            stream = Stream(through_branch(self.mlp_branch, normed, self.mlp(normed)), residual, second)
        if self.after.branches:
            total = stream.total()
            tokens = total.flatten(1, 2)
            stream = Stream(self.after(tokens, tokens, self.training).view_as(total))
        if self.tap.readers:
            total = Stream(stream.hidden, stream.residual).total()
            self.tap(total.flatten(1, 2), map_layout(total))
        return stream

    def _through_input(self, x: Tensor) -> Tensor:
        tokens, _ = self.input(x.flatten(1, 2), map_layout(x))
        if tokens.shape[1] != x.shape[1] * x.shape[2]:
            raise UserError(
                f"{self.input.owner!r} changes the number of tokens in {self.name} from {x.shape[1] * x.shape[2]} to "
                f"{tokens.shape[1]}; a map of VMamba has room for no other tokens"
            )
        return tokens.view_as(x)


def through_branch(port: BranchPort, x: Tensor, out: Tensor) -> Tensor:
    """Applies a branch port to a branch whose input and output are maps [B, H, W, D]."""
    if not port.functions:
        return out
    return port(x.flatten(1, 2), out.flatten(1, 2), map_layout(x)).view_as(out)


def map_layout(x: Tensor) -> TokenLayout:
    """The layout of a map [B, H, W, D] as tokens, row by row."""
    return TokenLayout(x.shape[1] * x.shape[2], (x.shape[1], x.shape[2]))


class PatchEmbed(nn.ModuleDict):
    """Images [B, C, H, W] → [B, H/p, W/p, D] by two convolutions (3x3 for p = 4), norms and GELU; sides round up."""

    def __init__(self, img_size: tuple[int, int], in_chans: int, embed_dim: int, patch_size: int) -> None:
        if patch_size % 2:
            raise UserError(f"backbone.patch_size={patch_size}; expected an even number, but with vanilla=true")
        side = patch_size // 2
        super().__init__(
            {
                "0": PortedConv2d(in_chans, embed_dim // 2, side + 1, side, padding=1),
                "2": Norm(embed_dim // 2),
                "5": PortedConv2d(embed_dim // 2, embed_dim, side + 1, side, padding=1),
                "7": Norm(embed_dim),
            }
        )
        self.img_size = img_size
        self.grid_size = tuple(math.ceil(size / patch_size) for size in img_size)

    def forward(self, images: Tensor) -> Tensor:
        return normed_convolution(self["5"], self["7"], self._half(images))

    def _half(self, images: Tensor) -> Tensor:
        """gelu(norm(conv)), the map of half the sides: [B, H', W', D/2]; one launch where nothing of it is trained."""
        conv, norm, dtype = self["0"], self["2"], compute_dtype(images)
        if computes_as(conv, PortedConv2d) and computes_as(norm, Norm) and norm.kernel in FUSED:
            weights = conv.read("weight"), conv.read("bias"), norm.read("weight"), norm.read("bias")
            trained = torch.is_grad_enabled() and any(t.requires_grad for t in (images, *weights))
            if not trained and dtype in (torch.bfloat16, torch.float16):
                stride, padding = conv.stride[0], cast(tuple[int, int], conv.padding)[0]
                return conv_norm_gelu(images.to(dtype), *weights, stride, padding, norm.eps, norm.kernel)
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # then the first map lies as norms read it
        return F.gelu(norm(conv(images).permute(0, 2, 3, 1)))


class VanillaPatchEmbed(nn.ModuleDict):
    """Images [B, C, H, W] → [B, H/p, W/p, D]: one product for each patch, and a norm."""

    def __init__(self, img_size: tuple[int, int], in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__({"0": PortedConv2d(in_chans, embed_dim, patch_size, patch_size), "2": Norm(embed_dim)})
        self.img_size = img_size
        self.grid_size = tuple(size // patch_size for size in img_size)

    def forward(self, images: Tensor) -> Tensor:
        return self["2"](self["0"](images).permute(0, 2, 3, 1))


class Downsample(nn.ModuleDict):
    """[B, H, W, D] → [B, H/2, W/2, D'] by a convolution 3x3 and a norm; sides round up."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__({"1": PortedConv2d(dim, out_dim, 3, 2, padding=1), "3": Norm(out_dim)})
        self.kernel = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return normed_convolution(self["1"], self["3"], x)


class PatchMerging(nn.Module):
    """[B, H, W, D] → [B, H/2, W/2, D']: the norm of each 2x2 cell's places side by side, and a linear map."""

    def __init__(self, dim: int, out_dim: int, *, name: str) -> None:
        super().__init__()
        self.reduction = PortedLinear(4 * dim, out_dim, bias=False, name=f"{name}.reduction")
        self.norm = Norm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        cells = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(cells, dim=-1)))


class Stage(nn.Module):
    """Blocks on maps of one size, and the way to the next stage."""

    def __init__(self, blocks: list[Block], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class VMamba(TimmModel):
    """VMamba.

    Args:
        img_size: height and width (or one number for both) that `layout` speaks of; images of any size run.
        patch_size: patch size of the patch embedding.
        dims: D of each stage; or of the first, and every stage doubles it.
        depths: blocks of each stage.
        d_state, ssm_ratio: N, and E / D.
        mlp_ratio: hidden width of the MLPs / D; 0: none.
        vanilla: the first version's layout: a gate, biases of the convolutions, patches without overlap.
        conv_bias: whether the mixers' convolutions have biases; None: in the first version's layout.
        dt_rank: R; None: ceil(D / 16).
        num_classes: 0 for features only. The head starts at zero.
        drop_path_rate: both branches of block i of n are dropped with rate linspace(0, rate, n)[i].
        global_pool, drop_rate: see `TimmModel`.
    """

    family = "vmamba"
    norm_name = "norm"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        dims: int | tuple[int, ...] = 96,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        mlp_ratio: float = 4.0,
        vanilla: bool = False,
        conv_bias: bool | None = None,
        dt_rank: int | None = None,
        num_classes: int = 1000,
        drop_path_rate: float = 0.2,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        widths = tuple(dims << i for i in range(len(depths))) if isinstance(dims, int) else tuple(dims)
        if len(widths) != len(depths):
            raise UserError(f"backbone.dims={dims} and backbone.depths={depths}; expected one width for each stage")
        embedding = VanillaPatchEmbed if vanilla else PatchEmbed
        patch_embed = embedding(both_sides(img_size), in_chans, widths[0], patch_size)
        super().__init__(
            img_size, patch_size, None, widths[0], in_chans, num_classes, global_pool, drop_rate, patch_embed
        )
        self.num_features = widths[-1]
        self.prompt = RefusedPort("prompt", "the maps of VMamba have no room for other tokens")
        stages = []
        sizes: dict[str, Any] = {"d_state": d_state, "ssm_ratio": ssm_ratio, "mlp_ratio": mlp_ratio, "vanilla": vanilla}
        sizes |= {"conv_bias": vanilla if conv_bias is None else conv_bias, "dt_rank": dt_rank}
        for s, (dim, depth) in enumerate(zip(widths, depths)):
            blocks = [Block(dim, name=f"layers.{s}.blocks.{b}", **sizes) for b in range(depth)]
            downsample: nn.Module = nn.Identity()
            if s + 1 < len(depths):
                name = f"layers.{s}.downsample"
                downsample = PatchMerging(dim, widths[s + 1], name=name) if vanilla else Downsample(dim, widths[s + 1])
            stages.append(Stage(blocks, downsample))
        self.layers = nn.ModuleList(stages)
        self.norm = Norm(self.num_features)
        self.head = zero_head(self.head_hidden_size, num_classes)
        #: One entry for each stage: its channels, its stride in pixels and its name.
        self._feature_info = [
            {"num_chs": dim, "reduction": patch_size << s, "module": f"layers.{s}"} for s, dim in enumerate(widths)
        ]

        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").repeat_interleave(2)
        self.branch_scales = BranchScales(rates.tolist())
        self.init_new()

    # -- parts ------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> list[Stage]:
        return [cast(Stage, stage) for stage in self.layers]

    @property
    def blocks(self) -> list[Block]:
        return [cast(Block, block) for stage in self.stages for block in stage.blocks]

    @property
    def mixers(self) -> list[SS2D]:
        return [block.op for block in self.blocks]

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Role → names of parameters, block after block."""

        def each(name: str) -> tuple[str, ...]:
            return tuple(f"{block.name}.{name}" for block in self.blocks)

        norms = {name for name, module in self.named_modules() if isinstance(module, Norm)}
        names = [name for name, _ in self.named_parameters()]
        roles = {
            "patch_embed": tuple(n for n in names if re.fullmatch(r"patch_embed\.[05]\.weight", n)),
            "norm": tuple(name for name in names if name.rpartition(".")[0] in norms),
            "in_proj": each("op.in_proj.weight"),
            "out_proj": each("op.out_proj.weight"),
            "x_proj": each("op.x_proj_weight"),
            "dt_proj": each("op.dt_projs_weight"),
            "dt_bias": each("op.dt_projs_bias"),
            "conv": each("op.conv2d.weight"),
            "A_log": each("op.A_logs"),
            "D": each("op.Ds"),
        }
        if all(block.has_mlp for block in self.blocks):
            roles |= {"mlp_up": each("mlp.fc1.weight"), "mlp_down": each("mlp.fc2.weight")}
        return roles

    def row_blocks(self, parameter: str) -> dict[str, slice]:
        """Named blocks of rows of a weight, e.g. {"d": …, "b": …, "c": …} of "layers.0.blocks.0.op.x_proj_weight"."""
        path, op, name = parameter.partition(".op.")
        return cast(Block, self.get_submodule(path)).op.row_blocks.get(name, {}) if op else {}

    def layout_of(self, grid: tuple[int, int]) -> TokenLayout:
        """A map's places as tokens; their mean is read out."""
        return TokenLayout(grid[0] * grid[1], grid)

    def output_layout(self) -> TokenLayout:
        """The layout of what `forward_features` returns for images of `img_size`."""
        rows, columns = self.layout.grid
        for _ in self.stages[1:]:
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        return self.layout_of((rows, columns))

    def set_kernel(self, kernel: str, device: torch.device | str) -> str:
        """Chooses the kernel backend of all ops; returns the name of what will run on `device`."""
        resolved = resolve_backend(kernel, device)
        for module in self.modules():
            if isinstance(module, (Downsample, Mlp, Norm, SS2D)):
                module.kernel = resolved
        return resolved

    def compile_ahead(self, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[Future, ...]:
        """Starts to compile the stages' kernels for activations of `dtype`; see `mambapeft_kernels.compile_ahead`."""
        stages, (rows, columns) = [], self.layout.grid
        for stage in self.stages:
            block = cast(Block, stage.blocks[0])
            mixer = block.op
            stages.append(StageSizes(rows, columns, block.embed_dim, mixer.d_inner, mixer.states, mixer.dt_rank))
            rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
        return compile_stages_ahead(tuple(stages), dtype, device, kernel)

    # -- from images to features ------------------------------------------------------------------------------

    def embed(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        map_ = self.patch_embed(images)
        return map_.flatten(1, 2), map_layout(map_)

    def run_blocks(
        self, tokens: Tensor, layout: TokenLayout, take: Collection[int] = (), stop: int | None = None
    ) -> tuple[State, list[State]]:
        """As `TimmModel.run_blocks`; `take` and `stop` count stages, whose states are those before downsampling."""
        stream, taken = Stream(tokens.unflatten(1, layout.grid)), []
        scales = self.branch_scales(tokens.shape[0])
        # The two factors of each block in turn; without drop path there are none, however many blocks.
        pairs = itertools.repeat((None, None)) if scales is None else iter(scales.unflatten(0, (-1, 2)))
        for s, stage in enumerate(self.stages[:stop]):
            if s:
                stream = Stream(self._to_next_stage(self.stages[s - 1].downsample, stream))
            for block in stage.blocks:
                arguments = stream, *next(pairs)
                if self.grad_checkpointing:
                    stream = checkpoint(block, *arguments, use_reentrant=False)
                else:
                    stream = block(*arguments)
            if s in take:
                taken.append(stream.state())
        return stream.state(), taken

    def _to_next_stage(self, downsample: nn.Module, stream: Stream) -> Tensor:
        """The first map [B, H', W', D'] of the next stage."""
        weight = next(self.parameters())
        if isinstance(downsample, Downsample) and stream.residual is not None:  # its convolution rounds what it reads
            total = add_branch(stream.hidden, stream.residual, stream.scale, compute_dtype(weight), downsample.kernel)
        else:
            total = stream.total().to(weight.dtype)  # the sum is float32 also in a model in bfloat16
        return downsample(total)

    def normed(self, state: State, positions: Sequence[int] | None = None) -> Tensor:
        """As `TimmModel.normed`; the norm is that of the last stage, and states of others are only added up."""
        if isinstance(self.norm, nn.Identity) or state.hidden.shape[-1] != self.num_features:
            tokens = tokens_of(state)
        else:
            tokens, _ = add_norm(self.norm, state.hidden, state.residual, state.branch_scale)
        return tokens if positions is None else select(tokens, positions)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, D] of images of any size → logits; with `pre_logits` what the head reads."""
        return self._head(self.pool(x, self.layout_of((1, x.shape[1]))), pre_logits)

    # -- timm -------------------------------------------------------------------------------------------------

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """One entry for each stage: its channels, its stride in pixels and its name."""
        return self._feature_info[: len(self.layers)]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of parameter names, by stage (`coarse`) or by block."""
        downsample, block = (r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None)
        return {
            "stem": r"^patch_embed",
            "blocks": r"^layers\.(\d+)" if coarse else [downsample, block, (r"^norm\.", (99999,))],
        }

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As `TimmModel.prune_intermediate_layers`, of stages."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.stages[-1].downsample = nn.Identity()
        return take

    # -- weights ----------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """VMamba's own initialisation of everything; the head is zero."""
        for module in self.modules():
            if isinstance(module, PortedLinear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, Norm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, SS2D):
                module.init_weights()
        zero_init(self.head)
        self.branch_scales.fill()

    def convert_checkpoint(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """The tensors of an official checkpoint (of any age) under the names and in the shapes of this model.

        Raises: UserError for the checkpoint of another variant, naming it.
        """
        renamed = {_current_name(name): tensor for name, tensor in state.items()}
        self._check_variant(renamed)
        own = self.state_dict()
        return {
            name: tensor.flatten(1) if name in own and own[name].ndim == 2 and tensor.shape[2:] == (1, 1) else tensor
            for name, tensor in renamed.items()
        }, ()

    def _check_variant(self, state: dict[str, Tensor]) -> None:
        """s1 and s2 files carry the same names and are easily confused."""
        mine, given = _sizes(self.state_dict()), _sizes(state)
        if given is None or given == mine:
            return
        names = [name for name, sizes in OFFICIAL_SIZES.items() if sizes == given]
        kind = f"those of {names[0]}" if names else "no published variant's"
        raise UserError(
            f"the weights are {kind}: (D, E, N, blocks of each stage) {given}; expected {mine}. Choose the backbone "
            f"that they belong to, or the file of {self.pretrained_cfg['architecture']}"
        )

    def official_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {re.sub(r"^(norm|head)\.", r"classifier.\1.", name): tensor for name, tensor in state.items()}


# Old name → new name, in this order.
_RENAMED = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^classifier\.(norm|head)\.", r"\1."),
)


def _current_name(name: str) -> str:
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name


# (D, E, N of the first stage, blocks of each stage)
OFFICIAL_SIZES = {
    "vmamba_tiny_s1l8": (96, 96, 1, (2, 2, 8, 2)),
    "vmamba_small_s2l15": (96, 192, 1, (2, 2, 15, 2)),
    "vmamba_base_s2l15": (128, 256, 1, (2, 2, 15, 2)),
    "vmamba_tiny_s2l5": (96, 192, 1, (2, 2, 5, 2)),
    "vmamba_small_s1l20": (96, 96, 1, (2, 2, 20, 2)),
    "vmamba_base_s1l20": (128, 128, 1, (2, 2, 20, 2)),
    "vmamba_vanilla_tiny": (96, 192, 16, (2, 2, 9, 2)),
    "vmamba_vanilla_small": (96, 192, 16, (2, 2, 27, 2)),
    "vmamba_vanilla_base": (128, 256, 16, (2, 2, 27, 2)),
}


def _sizes(state: Mapping[str, Tensor]) -> tuple[int, int, int, tuple[int, ...]] | None:
    """The sizes that distinguish the variants, from shapes and names; None if the names are not VMamba's."""
    out_proj, A_logs = (state.get(f"layers.0.blocks.0.op.{name}") for name in ("out_proj.weight", "A_logs"))
    if out_proj is None or A_logs is None or out_proj.ndim < 2 or A_logs.ndim != 2:
        return None
    found = {tuple(map(int, m.groups())) for name in state if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    stages = range(1 + max(stage for stage, _ in found))
    depths = tuple(sum(stage == s for stage, _ in found) for s in stages)
    return out_proj.shape[0], out_proj.shape[1], A_logs.shape[1], depths


# ---------------------------------------------------------------------------------------------------------------
# Variants


def _published(file: str, tag: str = "v2cls") -> dict[str, Any]:
    return cfg(
        fixed_input_size=False,
        crop_mode="squash",
        first_conv="patch_embed.0",
        url=f"https://github.com/MzeroMiko/VMamba/releases/download/%23{tag}/{file}",
        license="mit",
        origin_url="https://github.com/MzeroMiko/VMamba",
        paper_ids="arXiv:2401.10166",
    )


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8": _published("vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small_s2l15": _published("vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_base_s2l15": _published("vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_tiny_s2l5": _published("vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s1l20": _published("vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s1l20": _published("vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_vanilla_tiny": _published("vssmtiny_dp01_ckpt_epoch_292.pth", "v0cls"),
        "vmamba_vanilla_small": _published("vssmsmall_dp03_ckpt_epoch_238.pth", "v0cls"),
        "vmamba_vanilla_base": _published("vssmbase_dp06_ckpt_epoch_241.pth", "v0cls"),
        "vmamba_pico_patch4_32": cfg(32, fixed_input_size=False, crop_mode="squash", first_conv="patch_embed.0"),
        "vmamba_nano_patch4_64": cfg(
            64,
            fixed_input_size=False,
            crop_mode="squash",
            first_conv="patch_embed.0",
            file=str(EMBEDDED_WEIGHTS / "vmamba_nano.safetensors"),
            license="apache-2.0",
        ),
    }
)


def _build(name: str, pretrained: bool, drop_path_rate: float, kwargs: dict[str, Any]) -> VMamba:
    dim, inner, states, depths = OFFICIAL_SIZES[name]
    sizes: dict[str, Any] = {
        "dims": dim,
        "depths": depths,
        "d_state": states,
        "ssm_ratio": inner / dim,
        "drop_path_rate": drop_path_rate,
    }
    if name.startswith("vmamba_vanilla"):
        sizes |= {"vanilla": True, "mlp_ratio": 0.0}
    return build(VMamba, name, pretrained, sizes, kwargs)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, E = D."""
    return _build("vmamba_tiny_s1l8", pretrained, 0.2, kwargs)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, E = 2D."""
    return _build("vmamba_small_s2l15", pretrained, 0.3, kwargs)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, E = 2D."""
    return _build("vmamba_base_s2l15", pretrained, 0.6, kwargs)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T with E = 2D and fewer blocks."""
    return _build("vmamba_tiny_s2l5", pretrained, 0.2, kwargs)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S with E = D and more blocks."""
    return _build("vmamba_small_s1l20", pretrained, 0.3, kwargs)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B with E = D and more blocks."""
    return _build("vmamba_base_s1l20", pretrained, 0.5, kwargs)


@register_model
def vmamba_vanilla_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first version of VMamba-T: 16 states, a gate, no MLP."""
    return _build("vmamba_vanilla_tiny", pretrained, 0.2, kwargs)


@register_model
def vmamba_vanilla_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first version of VMamba-S: 16 states, a gate, no MLP."""
    return _build("vmamba_vanilla_small", pretrained, 0.3, kwargs)


@register_model
def vmamba_vanilla_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first version of VMamba-B: 16 states, a gate, no MLP."""
    return _build("vmamba_vanilla_base", pretrained, 0.5, kwargs)


@register_model
def vmamba_pico_patch4_32(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A very small VMamba (maps of 8 x 8 to 2 x 2) for tests; no pretrained weights."""
    sizes = {"img_size": 32, "dims": 32, "depths": (1, 1, 2), "ssm_ratio": 2.0, "mlp_ratio": 2.0}
    return build(VMamba, "vmamba_pico_patch4_32", pretrained, sizes, kwargs)


@register_model
def vmamba_nano_patch4_64(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A small VMamba (maps of 16 x 16 to 2 x 2) of vim_nano's size, with weights of our own in the package."""
    sizes = {"img_size": 64, "dims": 24, "depths": (1, 1, 2, 1), "ssm_ratio": 1.0, "mlp_ratio": 4.0}
    return build(VMamba, "vmamba_nano_patch4_64", pretrained, sizes, kwargs)
