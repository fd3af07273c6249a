"""The mixer core on fused kernels: one autograd node made of `torch.library` ops, for every fused backend.

Forward: conv + SiLU, x_proj, dt_proj + softplus, then both scans with gate and sum. Backward: recompute u, Δ, B, C
(unless kept), both scans' adjoints, the way back through the projections, the convolution. The backends differ in
the scans (`_SCANS`) and the convolution. Gradients are computed only for what asks for them.
"""

import importlib

import torch
from torch import Tensor

from mambapeft_kernels.matmul import product
from mambapeft_kernels.selective_scan.checkpoints import checkpoint_shape
from mambapeft_kernels.ssm_mixer.api import Direction

_FIELDS = Direction._fields[:-1]  # every field but `reverse` is a tensor or None
_SCANS = {
    "triton": "mambapeft_kernels.selective_scan.triton_kernels",
    "cuda": "mambapeft_kernels.selective_scan.cuda_kernels",
}

# Keep u and Δ of the forward up to this many bytes a call; beyond, the backward computes them again (three launches,
# 8 % of the block's time). 512 MiB is Vim-S at a batch of about 440 in bfloat16.
KEEP_BYTES = 512 << 20


def run(x: Tensor, z: Tensor, directions: tuple[Direction, ...], scale: float, scans: str) -> Tensor:
    """See `mambapeft_kernels.ssm_mixer`; `scans` names the implementation of the scans."""
    _check(directions)
    x, z = _rejoined(x, z)
    if x.numel() == 0:
        return torch.zeros_like(x) + 0 * z  # no token or no sample: an empty result that keeps its graph
    directions = _uniform(directions)
    flat = [getattr(d, f) for d in directions for f in _FIELDS]
    present = [t is not None for t in flat]
    tensors = [t for t in flat if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, z, *tensors))
    reverse = [d.reverse for d in directions]
    out, *_ = torch.ops.mambapeft.mixer_forward(x, z, tensors, present, reverse, scale, scans, save)
    return out


def _check(directions: tuple[Direction, ...]) -> None:
    if len(directions) > 2:
        raise ValueError(
            f"ssm_mixer: the fused kernels take one or two directions, got {len(directions)}; kernel=torch takes more"
        )
    shapes = {(d.A_log.shape, d.dt_proj.shape, d.conv_weight.shape) for d in directions}
    if len(shapes) > 1:
        raise ValueError(
            "ssm_mixer: the fused kernels need the same N, R and K in both directions, got the shapes "
            f"{[tuple(map(tuple, s)) for s in shapes]} of A_log, dt_proj, conv_weight; choose kernel=torch"
        )
    if directions[0].A_log.shape[1] > 32:
        raise ValueError(
            f"ssm_mixer: the fused kernels take up to 32 states, got {directions[0].A_log.shape[1]}; "
            "choose kernel=torch"
        )


def _uniform(directions: tuple[Direction, ...]) -> tuple[Direction, ...]:
    """Contiguous weights, and each field in one dtype across directions: a kernel selects between their pointers."""
    columns = []
    for field in _FIELDS:
        tensors = [getattr(d, field) for d in directions]
        dtypes = {t.dtype for t in tensors if t is not None}
        if len(dtypes) > 1:
            tensors = [t if t is None else t.to(torch.float32) for t in tensors]
        columns.append([t if t is None else t.contiguous() for t in tensors])
    return tuple(Direction(*row, reverse=d.reverse) for row, d in zip(zip(*columns), directions))


def _rejoined(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """x and z again, where they are the halves of one tensor: taken by a split whose backward copies nothing."""
    base = None if torch.compiler.is_compiling() else x._base
    if base is None or z._base is not base or not (x.requires_grad and z.requires_grad and torch.is_grad_enabled()):
        return x, z
    channels = x.shape[-1]
    whole = base.shape == (*x.shape[:-1], 2 * channels) and x.stride() == z.stride() == base.stride()
    offset = base.storage_offset()
    if not whole or x.storage_offset() != offset or z.storage_offset() != offset + channels * x.stride(-1):
        return x, z
    if x._backward_hooks or z._backward_hooks or x.retains_grad or z.retains_grad:
        return x, z  # somebody watches the halves' own gradients
    return _Halves.apply(base)


class _Halves(torch.autograd.Function):
    """The two halves [..., E] of a tensor [..., 2E]. Gradients that already lie side by side are not copied."""

    @staticmethod
    def forward(ctx, whole):
        ctx.set_materialize_grads(True)
        return whole.chunk(2, dim=-1)

    @staticmethod
    def backward(ctx, dx, dz):
        channels = dx.shape[-1]
        side_by_side = (
            dx.untyped_storage().data_ptr() == dz.untyped_storage().data_ptr()
            and dx.stride() == dz.stride()
            and dx.stride()[-2:] == (2 * channels, 1)
            and dz.storage_offset() == dx.storage_offset() + channels
        )
        if side_by_side:
            return dx.as_strided((*dx.shape[:-1], 2 * channels), dx.stride())
        return torch.cat([dx, dz], dim=-1)


class _Weights:
    """The flat list of weights, field by field: `weights.x_proj` is one tensor (or None) for each direction."""

    def __init__(self, tensors: list[Tensor], present: list[bool]):
        it = iter(tensors)
        flat = [next(it) if p else None for p in present]
        for i, name in enumerate(_FIELDS):
            setattr(self, name, flat[i :: len(_FIELDS)])


def _scans(name: str):
    return importlib.import_module(_SCANS[name])


def _project(x: Tensor, w: _Weights, reverse: tuple[bool, ...], scans: str) -> tuple[Tensor, Tensor, Tensor]:
    """u, Δ [G, B, L, E] in x's dtype and B|C [G, B, L, 2N] float32."""
    from mambapeft_kernels.ssm_mixer.projections import projections_forward

    u = _convolution(scans, x).conv_silu(x, w.conv_weight, w.conv_bias, reverse)
    return u, *projections_forward(u, w.x_proj, w.dt_proj, w.dt_bias)


def _convolution(scans: str, *tensors: Tensor):
    """The module of the convolution: CUDA C++ goes with the CUDA scans, where the layout lets it."""
    if scans == "cuda":
        from mambapeft_kernels.causal_conv1d import cuda_kernels as cuda

        if cuda.supports(*tensors):
            return cuda
    from mambapeft_kernels.causal_conv1d import triton_kernels as triton

    return triton


def _keep(x: Tensor, groups: int) -> bool:
    return 2 * groups * x.numel() * x.element_size() <= KEEP_BYTES


@torch.library.custom_op(
    "mambapeft::mixer_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor z, Tensor[] tensors, bool[] present, bool[] reverse, float scale, str scans, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _mixer_forward(
    x: Tensor,
    z: Tensor,
    tensors: list[Tensor],
    present: list[bool],
    reverse: list[bool],
    scale: float,
    scans: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B, L, E]; and, if `save`: total [B, L, E], checkpoints, and where they fit u, Δ, B|C."""
    w, rev = _Weights(tensors, present), tuple(reverse)
    with torch.cuda.device_of(x):
        u, delta, bc = _project(x, w, rev, scans)
        out, total, ckpt = _scans(scans).scan_forward(
            u, delta, bc, z, w.A_log, w.D, w.state_offset, w.output_offset, rev, scale, save
        )
    if save and _keep(x, len(rev)):
        return out, total, ckpt, u, delta, bc
    return out, total, ckpt, u.new_empty(0), delta.new_empty(0), bc.new_empty(0)


@_mixer_forward.register_fake
def _(x, z, tensors, present, reverse, scale, scans, save):
    w = _Weights(tensors, present)
    groups, (batch, length, channels) = len(reverse), x.shape
    states, rank = w.A_log[0].shape[1], w.dt_proj[0].shape[1]
    out = x.new_empty(x.shape)
    kept = (groups, batch, length, channels) if save and _keep(x, groups) else (0,)
    shape = checkpoint_shape(groups, batch, length, channels, states)
    bc = (groups, batch, length, w.x_proj[0].shape[0] - rank)
    return (
        out,
        x.new_empty(x.shape if save else (0,)),
        x.new_empty(shape if save else (0,)),
        x.new_empty(kept),
        x.new_empty(kept),
        x.new_empty(bc if len(kept) > 1 else kept, dtype=torch.float32),
    )


@torch.library.custom_op(
    "mambapeft::mixer_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor z, Tensor total, Tensor ckpt, Tensor u, Tensor delta, Tensor bc, "
    "Tensor[] tensors, bool[] present, bool[] reverse, float scale, str scans, bool need_x, bool need_z, bool[] need)"
    " -> Tensor[]",
)
def _mixer_backward(
    dout: Tensor,
    x: Tensor,
    z: Tensor,
    total: Tensor,
    ckpt: Tensor,
    u: Tensor,
    delta: Tensor,
    bc: Tensor,
    tensors: list[Tensor],
    present: list[bool],
    reverse: list[bool],
    scale: float,
    scans: str,
    need_x: bool,
    need_z: bool,
    need: list[bool],
) -> list[Tensor]:
    """[dx | dz] as one [B, L, 2E] buffer, then one float32 gradient for each field of `Direction`, those of all
    directions stacked; where none of them is asked for: empty.

    A call always fills both halves it was asked for; one buffer spares the copy that would join them for in_proj.
    """
    from mambapeft_kernels.causal_conv1d import triton_kernels as triton
    from mambapeft_kernels.selective_scan.triton_kernels import channel_sums
    from mambapeft_kernels.ssm_mixer.projections import dt_proj_backward, x_proj_backward

    w, wanted, rev = _Weights(tensors, present), _wanted(need, present), tuple(reverse)
    channels, rank = x.shape[-1], w.dt_proj[0].shape[1]
    dxz = x.new_empty(*x.shape[:2], channels * (need_x + need_z))
    dz = dxz[..., -channels:] if need_z else None
    grads: dict[str, Tensor] = {}
    with torch.cuda.device_of(x):
        if not u.numel():
            u, delta, bc = _project(x, w, rev, scans)
        du, draw, dbc, dA = _scans(scans).scan_backward(
            dout, u, delta, bc, z, total, ckpt, w.A_log, w.D, w.state_offset, rev, scale, dz, wanted["A_log"]
        )

        need_conv = wanted["conv_weight"] or wanted["conv_bias"]
        if need_x or need_conv or wanted["x_proj"] or wanted["dt_proj"]:
            dproj = dt_proj_backward(draw, w.dt_proj, dbc)
        if need_x or need_conv:
            dx = dxz[..., :channels] if need_x else None
            conv, filters = _convolution(scans, x if dx is None else dx, x), (w.conv_weight, w.conv_bias, rev)
            x_proj_backward(du, dproj, x, w.x_proj, *filters, through_silu=conv is triton)
            sums = conv.conv_backward(du, x, *filters, dx, need_conv)
            grads |= {name: _own(s) for name, s in zip(("conv_weight", "conv_bias"), sums)}
        rows = u.flatten(1, 2)
        if wanted["x_proj"]:
            grads["x_proj"] = product(dproj.flatten(1, 2).transpose(1, 2), rows, torch.float32)
        if wanted["dt_proj"]:
            # The low-rank Δ is not stored; one product brings it back.
            low = torch.stack([r @ p[:rank].T.to(r.dtype) for r, p in zip(rows, w.x_proj)])
            grads["dt_proj"] = product(draw.flatten(1, 2).transpose(1, 2), low, torch.float32)
        if wanted["A_log"]:
            grads["A_log"] = dA.sum(0).mul_(torch.stack(w.A_log).float().exp_().neg_())
        needs = wanted["dt_bias"], wanted["D"] or wanted["output_offset"], wanted["state_offset"]
        if any(needs):
            *sums, dy = channel_sums(draw, u, dout, z, scale, *needs)
            grads |= {name: _own(s) for name, s in zip(("dt_bias", "D", "output_offset"), sums) if wanted[name]}
            if wanted["state_offset"]:
                C = bc[..., bc.shape[-1] // 2 :].flatten(1, 2)
                grads["state_offset"] = torch.stack([dy.flatten(0, 1).T @ c for c in C])
    return [dxz, *(grads[f] if wanted[f] else x.new_empty(0, dtype=torch.float32) for f in _FIELDS)]


def _own(part: Tensor) -> Tensor:
    """A copy of a part of a tensor: an op may not return views of one tensor."""
    return part.clone(memory_format=torch.contiguous_format)


def _wanted(need: list[bool], present: list[bool]) -> dict[str, bool]:
    """Field → whether any direction asks for its gradient."""
    it = iter(need)
    flat = [p and next(it) for p in present]
    return {name: any(flat[i :: len(_FIELDS)]) for i, name in enumerate(_FIELDS)}


@_mixer_backward.register_fake
def _(dout, x, z, total, ckpt, u, delta, bc, tensors, present, reverse, scale, scans, need_x, need_z, need):
    dxz = x.new_empty(*x.shape[:2], x.shape[2] * (int(need_x) + int(need_z)))
    w, wanted = _Weights(tensors, present), _wanted(need, present)
    grads = []
    for field in _FIELDS:
        shape = next((len(reverse), *t.shape) for t in getattr(w, field) if t is not None) if wanted[field] else (0,)
        grads.append(x.new_empty(shape, dtype=torch.float32))
    return [dxz, *grads]


def _setup_context(ctx, inputs, output) -> None:
    x, z, tensors, present, reverse, scale, scans, _ = inputs
    _, *kept = output
    ctx.save_for_backward(x, z, *kept, *tensors)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # no zeros for the gradients of what is only kept
    ctx.constants = present, reverse, scale, scans
    ctx.count = len(kept)


def _differentiate(ctx, dout, *_):
    x, z, *rest = ctx.saved_tensors
    kept, tensors = rest[: ctx.count], rest[ctx.count :]
    need_x, need_z, need = ctx.needs_input_grad[0], ctx.needs_input_grad[1], list(ctx.needs_input_grad[2])
    dxz, *grads = torch.ops.mambapeft.mixer_backward(dout, x, z, *kept, tensors, *ctx.constants, need_x, need_z, need)
    channels = x.shape[-1]
    dx = dxz[..., :channels] if need_x else None
    dz = dxz[..., -channels:] if need_z else None
    slots = [divmod(slot, len(_FIELDS)) for slot, there in enumerate(ctx.constants[0]) if there]
    own = [
        grads[field][direction].to(tensor.dtype) if asked else None
        for (direction, field), tensor, asked in zip(slots, tensors, need)
    ]
    return dx, dz, own, None, None, None, None, None


torch.library.register_autograd("mambapeft::mixer_forward", _differentiate, setup_context=_setup_context)
