"""The mixer core on fused kernels: one autograd node made of `torch.library` ops, for every fused backend.

Forward: conv + SiLU, x_proj, dt_proj + softplus, then both scans with gate and sum. Backward: recompute u, Δ, B, C
(unless kept), both scans' adjoints, the way back through the projections, the convolution. The backends differ in
the scans (`_scans`) and the convolution (`_convolution`). Only tensors that require a gradient get one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, plain_gradients
from mambapeft_kernels.matmul import product
from mambapeft_kernels.selective_scan.checkpoints import checkpoint_shape
from mambapeft_kernels.ssm_mixer import naive
from mambapeft_kernels.ssm_mixer.api import Direction, halves

_FIELDS = Direction._fields[:-1]  # every field but `reverse` is a tensor or None

# Keep u and Δ of the forward up to this many bytes a call; beyond, the backward computes them again (three launches,
# 8 % of the block's time). 512 MiB is Vim-S at a batch of about 440 in bfloat16.
KEEP_BYTES = 512 << 20


@dataclass(frozen=True)
class Scans:
    """One implementation of the selective scans of all directions, with gate and sum."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Convolution:
    """One implementation of SiLU(causal convolution) of all directions.

    backward_has_silu: whether `backward` takes the gradient of SiLU's output, or that of its input.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Any]
    backward_has_silu: bool


@cache
def _scans(backend: str) -> Scans:
    """The scans of a fused backend. Imports wait until here: its packages need not exist where another one runs."""
    if backend == "cuda":
        from mambapeft_kernels.selective_scan import cuda_kernels

        return Scans(cuda_kernels.scan_forward, cuda_kernels.scan_backward)
    from mambapeft_kernels.selective_scan import triton_kernels

    return Scans(triton_kernels.scan_forward, triton_kernels.scan_backward)


def _convolution(backend: str, *tensors: Tensor) -> Convolution:
    """The convolution of a fused backend: CUDA C++ goes with the CUDA scans where the layout of `tensors` lets it."""
    if backend == "cuda":
        from mambapeft_kernels.causal_conv1d import cuda_kernels

        if cuda_kernels.supports(*tensors):
            return Convolution(cuda_kernels.conv_silu, cuda_kernels.conv_backward, backward_has_silu=True)
    from mambapeft_kernels.causal_conv1d import triton_kernels

    return Convolution(triton_kernels.conv_silu, triton_kernels.conv_backward, backward_has_silu=False)


def run(xz: Tensor, z: Tensor | None, directions: tuple[Direction, ...], scale: float, backend: str) -> Tensor:
    """See `mambapeft_kernels.ssm_mixer`; `backend` is a fused one."""
    _check(directions)
    if xz.numel() == 0:  # no token or no sample: an empty result that keeps its graph
        x, gate = halves(xz, z)
        return torch.zeros_like(x) + 0 * gate
    directions = _uniform(directions)
    flat = [getattr(d, f) for d in directions for f in _FIELDS]
    present = [t is not None for t in flat]
    tensors = [t for t in flat if t is not None]
    inputs = [xz, *tensors] if z is None else [xz, z, *tensors]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    reverse = [d.reverse for d in directions]
    out, *_ = torch.ops.mambapeft.mixer_forward(xz, z, tensors, present, reverse, scale, backend, save)
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
    columns: list[list[Any]] = []
    for field in _FIELDS:
        tensors = [getattr(d, field) for d in directions]
        dtypes = {t.dtype for t in tensors if t is not None}
        if len(dtypes) > 1:
            tensors = [t if t is None else t.to(torch.float32) for t in tensors]
        columns.append([t if t is None else t.contiguous() for t in tensors])
    return tuple(Direction._make((*row, d.reverse)) for row, d in zip(zip(*columns), directions))


class Weights(NamedTuple):
    """The tensors of `Direction` field by field: one (or None) for each direction."""

    conv_weight: list[Tensor]
    conv_bias: list[Tensor]
    x_proj: list[Tensor]
    dt_proj: list[Tensor]
    dt_bias: list[Tensor]
    A_log: list[Tensor]
    D: list[Tensor]
    state_offset: list[Tensor | None]
    output_offset: list[Tensor | None]


def _weights(tensors: list[Tensor], present: list[bool]) -> Weights:
    """From one flat list, direction after direction: the fields that are `present`."""
    there = iter(tensors)
    flat: list[Any] = [next(there) if p else None for p in present]
    return Weights(*(flat[i :: len(_FIELDS)] for i in range(len(_FIELDS))))


def _project(x: Tensor, w: Weights, reverse: tuple[bool, ...], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """u, Δ [G, B, L, E] in x's dtype and B|C [G, B, L, 2N] float32."""
    from mambapeft_kernels.ssm_mixer.projections import projections_forward

    u = _convolution(backend, x).forward(x, w.conv_weight, w.conv_bias, reverse)
    return u, *projections_forward(u, w.x_proj, w.dt_proj, w.dt_bias)


def _keep(x: Tensor, groups: int) -> bool:
    return 2 * groups * x.numel() * x.element_size() <= KEEP_BYTES


@torch.library.custom_op(
    "mambapeft::mixer_forward",
    mutates_args=(),
    schema="(Tensor xz, Tensor? z, Tensor[] tensors, bool[] present, bool[] reverse, float scale, str backend, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _mixer_forward(
    xz: Tensor,
    z: Tensor | None,
    tensors: list[Tensor],
    present: list[bool],
    reverse: list[bool],
    scale: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B, L, E]; and, if `save`: total [B, L, E], checkpoints, and where they fit u, Δ, B|C."""
    x, gate = halves(xz, z)
    w, rev = _weights(tensors, present), tuple(reverse)
    with torch.cuda.device_of(x):
        u, delta, bc = _project(x, w, rev, backend)
        out, total, ckpt = _scans(backend).forward(
            u, delta, bc, gate, w.A_log, w.D, w.state_offset, w.output_offset, rev, scale, save
        )
    if save and _keep(x, len(rev)):
        return out, total, ckpt, u, delta, bc
    return out, total, ckpt, u.new_empty(0), delta.new_empty(0), bc.new_empty(0)


@_mixer_forward.register_fake
def _(xz, z, tensors, present, reverse, scale, backend, save):
    x, _ = halves(xz, z)
    w = _weights(tensors, present)
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
    schema="(Tensor dout, Tensor xz, Tensor? z, Tensor total, Tensor ckpt, Tensor u, Tensor delta, Tensor bc, "
    "Tensor[] tensors, bool[] present, bool[] reverse, float scale, str backend, bool need_xz, bool need_z, "
    "bool[] need) -> Tensor[]",
)
def _mixer_backward(
    dout: Tensor,
    xz: Tensor,
    z: Tensor | None,
    total: Tensor,
    ckpt: Tensor,
    u: Tensor,
    delta: Tensor,
    bc: Tensor,
    tensors: list[Tensor],
    present: list[bool],
    reverse: list[bool],
    scale: float,
    backend: str,
    need_xz: bool,
    need_z: bool,
    need: list[bool],
) -> list[Tensor]:
    """Gradients of xz and z, in their shapes; then one float32 gradient for each field of `Direction`, those of all
    directions stacked. What is not asked for is empty.

    Where z is a half of xz, both halves of the gradient are written into one buffer: nothing is copied to join them.
    """
    from mambapeft_kernels.selective_scan.triton_kernels import channel_sums
    from mambapeft_kernels.ssm_mixer.projections import dt_proj_backward, x_proj_backward

    x, gate = halves(xz, z)
    w, wanted, rev = _weights(tensors, present), _wanted(need, present), tuple(reverse)
    channels, rank = x.shape[-1], w.dt_proj[0].shape[1]
    dxz = xz.new_empty(xz.shape if need_xz else (0,))
    separate_dz = x.new_empty(x.shape if need_z else (0,))
    dx = dxz[..., :channels] if need_xz else None
    dz = separate_dz if need_z else dxz[..., channels:] if need_xz and z is None else None
    grads: dict[str, Tensor] = {}
    with torch.cuda.device_of(x):
        if not u.numel():
            u, delta, bc = _project(x, w, rev, backend)
        du, draw, dbc, dA = _scans(backend).backward(
            dout, u, delta, bc, gate, total, ckpt, w.A_log, w.D, w.state_offset, rev, scale, dz, wanted["A_log"]
        )

        need_conv = wanted["conv_weight"] or wanted["conv_bias"]
        if need_xz or need_conv or wanted["x_proj"] or wanted["dt_proj"]:
            dproj = dt_proj_backward(draw, w.dt_proj, dbc)
        if need_xz or need_conv:
            conv, filters = _convolution(backend, x if dx is None else dx, x), (w.conv_weight, w.conv_bias, rev)
            x_proj_backward(du, dproj, x, w.x_proj, *filters, through_silu=not conv.backward_has_silu)
            sums = conv.backward(du, x, *filters, dx, need_conv)
            grads |= {name: _own(s) for name, s in zip(("conv_weight", "conv_bias"), sums)}
        rows = u.flatten(1, 2)
        if wanted["x_proj"]:
            grads["x_proj"] = product(dproj.flatten(1, 2).transpose(1, 2), rows, torch.float32)
        if wanted["dt_proj"]:
            # The low-rank Δ is not stored; one product brings it back.
            low = torch.stack([r @ p[:rank].T.to(r.dtype) for r, p in zip(rows, w.x_proj)])
            grads["dt_proj"] = product(draw.flatten(1, 2).transpose(1, 2), low, torch.float32)
        if dA is not None and wanted["A_log"]:
            grads["A_log"] = dA.sum(0).mul_(torch.stack(w.A_log).float().exp_().neg_())
        needs = wanted["dt_bias"], wanted["D"] or wanted["output_offset"], wanted["state_offset"]
        if any(needs):
            *sums, dy = channel_sums(draw, u, dout, gate, scale, *needs)
            grads |= {name: _own(s) for name, s in zip(("dt_bias", "D", "output_offset"), sums) if wanted[name]}
            if wanted["state_offset"]:
                C = bc[..., bc.shape[-1] // 2 :].flatten(1, 2)
                grads["state_offset"] = torch.stack([dy.flatten(0, 1).T @ c for c in C])
    own = (grads[f] if wanted[f] else x.new_empty(0, dtype=torch.float32) for f in _FIELDS)
    return [dxz, separate_dz, *own]


def _own(part: Tensor) -> Tensor:
    """A copy of a part of a tensor: an op may not return views of one tensor."""
    return part.clone(memory_format=torch.contiguous_format)


def _wanted(need: list[bool], present: list[bool]) -> dict[str, bool]:
    """Field → whether any direction asks for its gradient."""
    it = iter(need)
    flat = [p and next(it) for p in present]
    return {name: any(flat[i :: len(_FIELDS)]) for i, name in enumerate(_FIELDS)}


@_mixer_backward.register_fake
def _(dout, xz, z, total, ckpt, u, delta, bc, tensors, present, reverse, scale, backend, need_xz, need_z, need):
    x, _ = halves(xz, z)
    w, wanted = _weights(tensors, present), _wanted(need, present)
    grads = []
    for field in _FIELDS:
        shape = next((len(reverse), *t.shape) for t in getattr(w, field) if t is not None) if wanted[field] else (0,)
        grads.append(x.new_empty(shape, dtype=torch.float32))
    return [xz.new_empty(xz.shape if need_xz else (0,)), x.new_empty(x.shape if need_z else (0,)), *grads]


def _setup_context(ctx, inputs, output) -> None:
    xz, z, tensors, present, reverse, scale, backend, _ = inputs
    _, *kept = output
    ctx.save_for_backward(xz, z, *kept, *tensors)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # no zeros for the gradients of what is only kept
    ctx.constants = present, reverse, scale, backend
    ctx.count = len(kept)


def _differentiate(ctx, dout, *_):
    xz, z, *rest = ctx.saved_tensors
    kept, tensors = rest[: ctx.count], rest[ctx.count :]
    need_xz, need_z, need = ctx.needs_input_grad[0], ctx.needs_input_grad[1], list(ctx.needs_input_grad[2])
    if differentiated_again(dout):
        definition = partial(_definition, ctx.constants)
        dxz, dz, *own = plain_gradients(definition, (xz, z, *tensors), (need_xz, need_z, *need), dout)
        return dxz, dz, own, None, None, None, None, None
    dxz, dz, *grads = torch.ops.mambapeft.mixer_backward(
        dout, xz, z, *kept, tensors, *ctx.constants, need_xz, need_z, need
    )
    slots = [divmod(slot, len(_FIELDS)) for slot, there in enumerate(ctx.constants[0]) if there]
    own = [
        grads[field][direction].to(tensor.dtype) if asked else None
        for (direction, field), tensor, asked in zip(slots, tensors, need)
    ]
    return dxz if need_xz else None, dz if need_z else None, own, None, None, None, None, None


def _definition(constants: tuple[Any, ...], xz: Tensor, z: Tensor | None, *tensors: Tensor) -> Tensor:
    """The op in plain PyTorch; constants: present, reverse, scale, backend."""
    present, reverse, scale, _ = constants
    there = iter(tensors)
    flat: list[Any] = [next(there) if p else None for p in present]
    size = len(_FIELDS)
    directions = tuple(Direction._make((*flat[i * size : (i + 1) * size], r)) for i, r in enumerate(reverse))
    return naive.ssm_mixer(*halves(xz, z), directions, scale)


torch.library.register_autograd("mambapeft::mixer_forward", _differentiate, setup_context=_setup_context)
