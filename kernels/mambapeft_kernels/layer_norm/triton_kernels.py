"""LayerNorm in Triton, alone or with residual addition and drop path: one launch forward, one backward.

A program owns a few whole rows. The backward computes the statistics again from what was kept: the input, or the
residual sum; for frozen weights in bfloat16 the sum without its mean, rounded, which is half of the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.block_order import from_last
from mambapeft_kernels.derivatives import differentiated_again, plain_gradients
from mambapeft_kernels.layer_norm import naive

_FUSED = torch.float32, torch.bfloat16, torch.float16


@triton.jit
def _centred(total, D, mask):
    """total - mean of each row."""
    return tl.where(mask, total - (tl.sum(total, axis=1) / D)[:, None], 0.0)


@triton.jit
def _unit(centred, D, eps):
    """centred / deviation of each row, and 1 / deviation."""
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    return centred * factor[:, None], factor


@triton.jit(do_not_specialize=["rows", "per_sample"])
def _forward(
    hidden_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, normed_ptr, out_ptr, centred_ptr, rows,
    per_sample, D, eps, PLANES: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr, KEEP: tl.constexpr, KEEP_CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """hidden: PLANES maps [rows, D] one after another, which are added up."""
    row = from_last().to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    total = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(hidden_ptr + plane * rows.to(tl.int64) * D + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        total += tl.load(shift_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        total *= tl.load(scale_ptr + row // per_sample, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
    centred = _centred(total, D, mask)
    if KEEP_CENTRED:
        tl.store(centred_ptr + at, centred.to(centred_ptr.dtype.element_ty), mask=mask)
    unit, _ = _unit(centred, D, eps)
    weight = tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    normed = unit * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "per_sample"])
def _backward(
    dnormed_ptr, dout_ptr, total_ptr, weight_ptr, scale_ptr, dhidden_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    rows, per_sample, D, eps, HAS_DOUT: tl.constexpr, HAS_SCALE: tl.constexpr, NEED_HIDDEN: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dweight, dbias: partial sums [programs, D]; hidden's gradient is the residual's times the branch's scale."""
    row = from_last().to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    at = row[:, None] * D + col[None, :]
    dnormed = tl.load(dnormed_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32)
    unit, factor = _unit(_centred(total, D, mask), D, eps)
    part = from_last().to(tl.int64) * D + col
    if NEED_WEIGHT:
        tl.store(dweight_ptr + part, tl.sum(dnormed * unit, axis=0), mask=col < D)
    if NEED_BIAS:
        tl.store(dbias_ptr + part, tl.sum(dnormed, axis=0), mask=col < D)
    if NEED_HIDDEN or NEED_RESIDUAL:
        scaled = dnormed * tl.load(weight_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
        along = (tl.sum(scaled * unit, axis=1) / D)[:, None]
        grad = (scaled - (tl.sum(scaled, axis=1) / D)[:, None] - unit * along) * factor[:, None]
        if HAS_DOUT:
            grad += tl.load(dout_ptr + at, mask=mask, other=0.0)
        if NEED_RESIDUAL:
            tl.store(dresidual_ptr + at, grad, mask=mask)
        if NEED_HIDDEN:
            if HAS_SCALE:
                grad *= tl.load(scale_ptr + row // per_sample, mask=row < rows, other=0.0).to(tl.float32)[:, None]
            tl.store(dhidden_ptr + at, grad.to(dhidden_ptr.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None) -> Tensor:
    """See `mambapeft_kernels.layer_norm`."""
    if x.dtype not in _FUSED or not x.numel():
        return naive.layer_norm(x, weight, bias, eps, shift)
    # The backward pass knows of no shift: it wants the rows that are centred behind it, or else a sum of its own.
    centre = False
    if shift is not None and torch.is_grad_enabled():
        trained = weight.requires_grad or shift.requires_grad
        if trained or (x.requires_grad and x.dtype != torch.bfloat16):
            return layer_norm(x + shift.to(x.dtype), weight, bias, eps)
        centre = x.requires_grad
    return torch.ops.mambapeft.add_layer_norm(x, None, weight, bias, eps, None, False, centre, False, shift)[0]


def add_layer_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_scale: Tensor | None,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `mambapeft_kernels.add_layer_norm`. A gradient of `branch_scale` is not computed: it is drawn, not learnt."""
    backward = torch.is_grad_enabled() and (hidden.requires_grad or (residual is not None and residual.requires_grad))
    sums = (torch.float32, hidden.dtype) if narrow and not backward else (torch.float32,)
    fused = hidden.dtype in _FUSED and hidden.numel() and (residual is None or residual.dtype in sums)
    if not fused or (branch_scale is not None and branch_scale.requires_grad):
        return naive.add_layer_norm(hidden, residual, weight, bias, eps, branch_scale, narrow)
    # The weight's gradient is as exact as what is kept; and float16 has not the range of the sums.
    centre = backward and hidden.dtype == torch.bfloat16 and not weight.requires_grad
    out = torch.ops.mambapeft.add_layer_norm(
        hidden, residual, weight, bias, eps, branch_scale, True, centre, narrow and not backward, None
    )
    return out[0], out[1]


def norm_of_sum(parts: Tensor, weight: Tensor, bias: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    """LayerNorm(Σ parts[i]) and, with `keep`, that sum in the parts' dtype; for ops that launch it among their kernels.

    parts: [planes, ..., D] contiguous.
    """
    kept = keep and len(parts) > 1
    normed = parts.new_empty(parts.shape[1:])
    total = torch.empty_like(normed) if kept else parts[0] if keep else parts.new_empty(0)
    _launch(parts, None, weight, bias, eps, None, None, normed, total if kept else None, None)
    return normed, total


def _launch(
    parts: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_scale: Tensor | None,
    shift: Tensor | None,
    normed: Tensor,
    out: Tensor | None,
    centred: Tensor | None,
) -> None:
    """parts: [planes, ..., D]. Writes `normed`, and `out` and `centred` where they are given."""
    width = normed.shape[-1]
    rows, tile = normed.numel() // width, _tile(width)
    given = (weight if t is None else t.contiguous() for t in (branch_scale, shift))
    with torch.cuda.device_of(normed):
        _forward[(triton.cdiv(rows, tile["ROWS"]),)](
            parts.contiguous(), normed if residual is None else residual.contiguous(), weight.contiguous(),
            bias.contiguous(), *given, normed, normed if out is None else out, normed if centred is None else centred,
            rows, rows // normed.shape[0], width, eps, PLANES=len(parts), HAS_SHIFT=shift is not None,
            HAS_RESIDUAL=residual is not None, HAS_SCALE=branch_scale is not None, KEEP=out is not None,
            KEEP_CENTRED=centred is not None, **tile,
        )  # fmt: skip


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


@torch.library.custom_op(
    "mambapeft::add_layer_norm",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? residual, Tensor weight, Tensor bias, float eps, Tensor? branch_scale, bool keep, "
    "bool centre, bool narrow, Tensor? shift) -> (Tensor, Tensor, Tensor)",
)
def _op(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_scale: Tensor | None,
    keep: bool,
    centre: bool,
    narrow: bool,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """normed; with `keep` the residual sum; with `centre` that without its mean, rounded to hidden's dtype.

    narrow: the sum is rounded to hidden's dtype too. shift: [D], added to each row of hidden.
    """
    normed = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    sum_dtype = hidden.dtype if narrow else torch.float32
    out = torch.empty(hidden.shape if keep else (0,), dtype=sum_dtype, device=hidden.device)
    centred = torch.empty(hidden.shape if centre else (0,), dtype=hidden.dtype, device=hidden.device)
    kept = out if keep else None, centred if centre else None
    _launch(hidden[None], residual, weight, bias, eps, branch_scale, shift, normed, *kept)
    return normed, out, centred


@_op.register_fake
def _(hidden, residual, weight, bias, eps, branch_scale, keep, centre, narrow, shift):
    out = hidden.new_empty(hidden.shape if keep else (0,), dtype=hidden.dtype if narrow else torch.float32)
    return hidden.new_empty(hidden.shape), out, hidden.new_empty(hidden.shape if centre else (0,))


@torch.library.custom_op(
    "mambapeft::add_layer_norm_backward",
    mutates_args=(),
    schema="(Tensor? dnormed, Tensor? dout, Tensor total, Tensor weight, Tensor? branch_scale, float eps, "
    "ScalarType dtype, bool[] need) -> Tensor[]",
)
def _op_backward(
    dnormed: Tensor | None,
    dout: Tensor | None,
    total: Tensor,
    weight: Tensor,
    branch_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    need: list[bool],
) -> list[Tensor]:
    """The gradients of hidden (in `dtype`), residual, weight and bias (float32); empty where not asked for."""
    total = total.contiguous()
    width = total.shape[-1]
    rows = total.numel() // width
    tile = _tile(width)
    programs = triton.cdiv(rows, tile["ROWS"])
    shapes = total.shape, total.shape, (programs, width), (programs, width)
    dtypes = dtype, torch.float32, torch.float32, torch.float32
    grads = [total.new_empty(s if n else (0,), dtype=d) for s, d, n in zip(shapes, dtypes, need)]
    dnormed = torch.zeros_like(total, dtype=dtype) if dnormed is None else dnormed.contiguous()
    with torch.cuda.device_of(total):
        _backward[(programs,)](
            dnormed, total if dout is None else dout.contiguous(), total, weight.contiguous(),
            weight if branch_scale is None else branch_scale.contiguous(), *grads, rows, rows // total.shape[0], width,
            eps, HAS_DOUT=dout is not None, HAS_SCALE=branch_scale is not None, NEED_HIDDEN=need[0],
            NEED_RESIDUAL=need[1], NEED_WEIGHT=need[2], NEED_BIAS=need[3], **tile,
        )  # fmt: skip
    return [*grads[:2], *(g.sum(0) if n else g for g, n in zip(grads[2:], need[2:]))]


@_op_backward.register_fake
def _(dnormed, dout, total, weight, branch_scale, eps, dtype, need):
    shapes = total.shape, total.shape, weight.shape, weight.shape
    dtypes = dtype, torch.float32, torch.float32, torch.float32
    return [total.new_empty(s if n else (0,), dtype=d) for s, d, n in zip(shapes, dtypes, need)]


def _setup_context(ctx, inputs, output) -> None:
    hidden, _, weight, bias, eps, branch_scale, keep, centre, *_ = inputs
    _, out, centred = output
    kept = centred if centre else out if keep else hidden
    ctx.save_for_backward(kept, weight, branch_scale)
    ctx.set_materialize_grads(False)
    ctx.keep, ctx.eps = keep, eps
    ctx.dtypes = hidden.dtype, torch.float32, weight.dtype, bias.dtype
    empty = [t for t, has in ((out, keep), (centred, centre)) if not has]
    ctx.mark_non_differentiable(*empty)


def _differentiate(ctx, dnormed, dout, dcentred):
    total, weight, branch_scale = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:4])
    dout = dout if ctx.keep else None
    if dcentred is not None:  # only this function reads what is centred, so this is a derivative of a gradient
        wide = dcentred.float()
        wide = wide - wide.mean(-1, keepdim=True)
        dout = wide if dout is None else dout + wide
    if any(differentiated_again(t) for t in (dnormed, dout, dcentred) if t is not None):
        grads = _plainly(ctx, dnormed, dout, total, weight, branch_scale)
    else:
        found = torch.ops.mambapeft.add_layer_norm_backward(
            dnormed, dout, total, weight, branch_scale, ctx.eps, ctx.dtypes[0], need
        )
        grads = [g.to(dtype) if n else None for g, dtype, n in zip(found, ctx.dtypes, need)]
    return *grads, None, None, None, None, None, None


def _plainly(
    ctx, dnormed: Tensor | None, dout: Tensor | None, total: Tensor, weight: Tensor, branch_scale: Tensor | None
) -> list[Tensor | None]:
    """The gradients of hidden, residual, weight and bias, which can be differentiated again."""

    def norm(total: Tensor, weight: Tensor) -> Tensor:
        return naive.layer_norm(total, weight, torch.zeros_like(weight), ctx.eps).to(ctx.dtypes[0])

    need_hidden, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    grad = torch.zeros_like(total, dtype=ctx.dtypes[0]) if dnormed is None else dnormed
    dtotal, dweight = plain_gradients(norm, (total, weight), (need_hidden or need_residual, need_weight), grad)
    if dtotal is not None and dout is not None:
        dtotal = dtotal + dout
    scaled = dtotal
    if dtotal is not None and branch_scale is not None:
        scaled = dtotal * branch_scale.view(-1, *[1] * (total.ndim - 1))
    return [
        scaled.to(ctx.dtypes[0]) if scaled is not None and need_hidden else None,
        dtotal if need_residual else None,
        dweight,
        grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.dtypes[3]) if need_bias else None,
    ]


torch.library.register_autograd("mambapeft::add_layer_norm", _differentiate, setup_context=_setup_context)
