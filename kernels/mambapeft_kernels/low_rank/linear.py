"""Low-rank branches beside a linear map without their copies: LoRA in activation space.

Written out, `out = F.linear(x, W); out[..., rows] += s · up(dropout(down(x)))` costs two passes over `out` and one over
the gradient of `x` for the additions alone: a twelfth of a Vim-S block's time. Here products add to what is there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients
from mambapeft_kernels.low_rank import low_rank_add, low_rank_product
from mambapeft_kernels.matmul import product


class LowRankFactors(NamedTuple):
    """One branch, scale · up(dropout(down(x))) on the features `rows`: down [r, in], up [number of rows, r].

    dropout: 0 when it is not drawn; rows: None for all.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float
    rows: slice | None


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[LowRankFactors]) -> Tensor:
    """F.linear(x, weight, bias) + the branches, which have one rate of dropout. [..., in] → [..., out].

    Under autocast everything is computed in its dtype.
    """
    settings, factors = _taken_apart(branches)
    x = x.to(compute_dtype(x))  # before it is kept for the backward pass, so that only the narrow one is
    if torch.compiler.is_compiling():  # a program: its compiler decides what is fused, and what is kept
        with no_autocast(x.device.type):
            return _linear_definition(settings, x.dtype, _drawn(settings, x, factors), x, weight, bias, *factors)
    return _LowRankLinear.apply(x, weight, bias, settings, *factors)


def add_low_rank(out: Tensor, x: Tensor, branches: Sequence[LowRankFactors]) -> Tensor:
    """Adds the branches, which have one rate of dropout, to out [..., out], which is contiguous, in place."""
    settings, factors = _taken_apart(branches)
    if torch.compiler.is_compiling():
        with no_autocast(x.device.type):
            mask = _drawn(settings, x, factors)
            return out + _branches_definition(settings, out.shape[-1], out.dtype, mask, x, *factors)
    return _AddLowRank.apply(out, x.to(out.dtype), settings, *factors)


class _Settings(NamedTuple):
    """The settings of several branches: their common dropout, and the scale and rows of each."""

    dropout: float
    scales: tuple[float, ...]
    rows: tuple[slice | None, ...]


def _taken_apart(branches: Sequence[LowRankFactors]) -> tuple[_Settings, list[Tensor]]:
    """The settings, and down, up of each branch in turn."""
    scales, rows = tuple(b.scale for b in branches), tuple(b.rows for b in branches)
    return _Settings(branches[0].dropout, scales, rows), [t for b in branches for t in (b.down, b.up)]


class _Kept(NamedTuple):
    """The tensors that the branches' gradients need."""

    x: Tensor  # [m, in]
    down: Tensor  # [Σr, in], of all branches one below another
    low: Tensor  # [m, Σr] = dropout(x downᵀ)
    mask: Tensor | None  # the dropout's
    ups: tuple[Tensor, ...]  # scale · up of each branch, [rows, r]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """For `save_for_backward`; `_Kept.of` puts them together again."""
        return self.x, self.down, self.low, self.mask, *self.ups

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> "_Kept":
        x, down, low, mask, *ups = tensors
        return cls(x, down, low, mask, tuple(ups))


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, settings, *factors):
        dtype = compute_dtype(x)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        with no_autocast(x.device.type):
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            plain_weight, plain_bias = weight, bias
            weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
            out = flat.new_empty(*x.shape[:-1], weight.shape[0])
            flat_out = out.view(-1, out.shape[-1])
            if bias is None and settings.rows == (None,):
                down, low, mask = _narrowed(flat, settings, factors)
                up = low_rank_product(flat_out, flat, weight, low, factors[1], settings.scales[0])
                kept = _Kept(flat, down, low, mask, (up,))
            else:
                if bias is None:
                    torch.mm(flat, weight.T, out=flat_out)
                else:
                    torch.addmm(bias, flat, weight.T, out=flat_out)
                kept = _add_branches(flat_out, flat, settings, factors)
        ctx.settings, ctx.factor_dtypes = settings, [t.dtype for t in factors]
        ctx.save_for_backward(weight, *kept.tensors(), x, plain_weight, plain_bias, *factors)
        return out

    @staticmethod
    def backward(ctx, grad):
        count = len(ctx.settings.scales)
        weight, *saved = ctx.saved_tensors
        kept, inputs = _Kept.of(saved[: 4 + count]), saved[4 + count :]
        if differentiated_again(grad):
            need_x, need_weight, need_bias, _, *need_factors = ctx.needs_input_grad
            definition = partial(_linear_definition, ctx.settings, weight.dtype, kept.mask)
            need = need_x, need_weight, need_bias, *need_factors
            dx, dweight, dbias, *dfactors = plain_gradients(definition, inputs, need, grad)
            return dx, dweight, dbias, None, *dfactors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        need_x, need_weight, need_bias, _, *need_factors = ctx.needs_input_grad
        dx = dweight = dbias = None
        with no_autocast(grad.device.type):
            grad = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)
            if need_weight:
                dweight = product(grad.T, kept.x, weight_dtype)
            if need_bias:
                dbias = grad.sum(0, dtype=bias_dtype)
            dlow, dfactors = _branch_gradients(grad, ctx.settings, kept, need_factors, ctx.factor_dtypes)
            if need_x:
                dx = (grad @ weight).addmm_(dlow, kept.down).view(ctx.shape).to(x_dtype)
        return dx, dweight, dbias, None, *dfactors


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, x, settings, *factors):
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.mark_dirty(out)
        with no_autocast(x.device.type):
            flat = x.to(out.dtype).reshape(-1, x.shape[-1])
            kept = _add_branches(out.view(-1, out.shape[-1]), flat, settings, factors)
        ctx.settings, ctx.factor_dtypes = settings, [t.dtype for t in factors]
        ctx.save_for_backward(*kept.tensors(), x, *factors)
        return out

    @staticmethod
    def backward(ctx, grad):
        saved, count = ctx.saved_tensors, len(ctx.settings.scales)
        kept, inputs = _Kept.of(saved[: 4 + count]), saved[4 + count :]
        if differentiated_again(grad):
            _, need_x, _, *need_factors = ctx.needs_input_grad
            definition = partial(_branches_definition, ctx.settings, grad.shape[-1], kept.x.dtype, kept.mask)
            dx, *dfactors = plain_gradients(definition, inputs, (need_x, *need_factors), grad)
            return grad, dx, None, *dfactors
        _, need_x, _, *need_factors = ctx.needs_input_grad
        with no_autocast(grad.device.type):
            flat = grad.reshape(-1, grad.shape[-1]).to(kept.x.dtype)
            dlow, dfactors = _branch_gradients(flat, ctx.settings, kept, need_factors, ctx.factor_dtypes)
            dx = (dlow @ kept.down).view(ctx.shape).to(ctx.x_dtype) if need_x else None
        return grad, dx, None, *dfactors


def _linear_definition(
    settings: _Settings,
    dtype: torch.dtype,
    mask: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *factors: Tensor,
) -> Tensor:
    """`low_rank_linear` in plain PyTorch, for the dropout `mask` that was drawn."""
    out = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return out + _branches_definition(settings, out.shape[-1], dtype, mask, x, *factors)


def _branches_definition(
    settings: _Settings, features: int, dtype: torch.dtype, mask: Tensor | None, x: Tensor, *factors: Tensor
) -> Tensor:
    """The branches' sum for `features` features, in plain PyTorch; mask: [m, Σr], of the dropout, or None."""
    ranks = [len(down) for down in factors[::2]]
    kept = [1.0] * len(ranks) if mask is None else mask.view(*x.shape[:-1], -1).split(ranks, dim=-1)
    total = x.new_zeros(*x.shape[:-1], features, dtype=dtype)
    for down, up, scale, rows, keep in zip(factors[::2], factors[1::2], settings.scales, settings.rows, kept):
        low = F.linear(x.to(dtype), down.to(dtype)) * keep / (1 - settings.dropout)
        part = F.linear(low, scale * up.to(dtype))
        start, stop, _ = (rows or slice(None)).indices(features)
        total = total + F.pad(part, (start, features - stop))
    return total


def _drawn(settings: _Settings, x: Tensor, factors: Sequence[Tensor]) -> Tensor | None:
    """A mask of dropout for `_branches_definition`, or None."""
    if not settings.dropout:
        return None
    ranks = sum(len(down) for down in factors[::2])
    return torch.bernoulli(x.new_full((x.shape[:-1].numel(), ranks), 1 - settings.dropout))


def _add_branches(out: Tensor, x: Tensor, settings: _Settings, factors: Sequence[Tensor]) -> _Kept:
    """Adds the branches to out [m, out] for x [m, in] of one dtype; returns what `_branch_gradients` needs."""
    down, low, mask = _narrowed(x, settings, factors)
    ranks = [len(part) for part in factors[::2]]
    ups = tuple(
        low_rank_add(_features(out, rows), part, up, scale)
        for part, up, scale, rows in zip(low.split(ranks, dim=1), factors[1::2], settings.scales, settings.rows)
    )
    return _Kept(x, down, low, mask, ups)


def _narrowed(x: Tensor, settings: _Settings, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """down of all branches one below another, dropout(down(x)) [m, Σr] by one product, and the dropout's mask."""
    downs = list(factors[::2])
    down = downs[0].to(x.dtype)
    if len(downs) > 1:
        down = torch.cat(downs, out=x.new_empty(sum(map(len, downs)), x.shape[1]))
    low = x @ down.T
    return (down, *torch.native_dropout(low, settings.dropout, True)) if settings.dropout else (down, low, None)


def _branch_gradients(
    grad: Tensor,
    settings: _Settings,
    kept: _Kept,
    need_factors: Sequence[bool],
    dtypes: Sequence[torch.dtype],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of all down(x) [m, Σr], and of down, up of each branch in turn, from grad [m, out].

    The scale is in `kept.ups`, so in the gradient of down(x) too.
    """
    x, _, low, mask, ups = kept
    ranks = [up.shape[1] for up in ups]
    through = [_features(grad, rows) for rows in settings.rows]
    if len(ups) == 1:
        dlow = through[0] @ ups[0]
    else:
        dlow = torch.empty_like(low)
        for part, above, up in zip(dlow.split(ranks, dim=1), through, ups):
            torch.mm(above, up, out=part)
    if mask is not None:
        dlow = torch.ops.aten.native_dropout_backward(dlow, mask, 1 / (1 - settings.dropout))
    dfactors: list[Tensor | None] = [None] * (2 * len(ups))
    if any(need_factors[::2]):
        dfactors[::2] = product(dlow.T, x, dtypes[0]).split(ranks)
    for i, (above, part, scale) in enumerate(zip(through, low.split(ranks, dim=1), settings.scales)):
        if need_factors[2 * i + 1]:
            dfactors[2 * i + 1] = product(above.T, part, dtypes[2 * i + 1], scale)
    return dlow, [d if needed else None for d, needed in zip(dfactors, need_factors)]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map of `x` is computed here: autocast's where it is on, else its own."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):  # the meta device has none
        return x.dtype
    casts = torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def _features(out: Tensor, rows: slice | None) -> Tensor:
    return out if rows is None else out[:, rows]
