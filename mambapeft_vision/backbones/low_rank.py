"""Low-rank branches beside a linear map without their copies: LoRA in activation space.

Written out, `out = F.linear(x, W); out[..., rows] += s · up(dropout(down(x)))` costs two passes over `out` and one over
the gradient of `x` for the additions alone: a twelfth of a Vim-S block's time. Here products add to what is there.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PRODUCT_CASTS = "dtype" in torch.ops.aten.mm.overloads()  # PyTorch >= 2.8, on GPUs


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    dropout: float,
    rows: slice | None,
) -> Tensor:
    """F.linear(x, weight, bias) + scale · up(dropout(down(x))), that on the features `rows`. [..., in] → [..., out].

    Under autocast everything is computed in its dtype. Gradients of first order only.

    Args:
        down: [r, in]; up: [number of rows, r].
        dropout: 0 when it is not drawn.
        rows: None for all.
    """
    return _LowRankLinear.apply(x, weight, bias, down, up, scale, dropout, rows)


def add_low_rank(
    out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, dropout: float, rows: slice | None
) -> Tensor:
    """Adds scale · up(dropout(down(x))) to the features `rows` of out [..., out], which is contiguous, in place.

    Args: as for `low_rank_linear`.
    """
    return _AddLowRank.apply(out, x, down, up, scale, dropout, rows)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, dropout, rows):
        dtype = compute_dtype(x)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
            out = flat.new_empty(*x.shape[:-1], weight.shape[0])
            flat_out = out.view(-1, out.shape[-1])
            if bias is None:
                torch.mm(flat, weight.T, out=flat_out)
            else:
                torch.addmm(bias, flat, weight.T, out=flat_out)
            ctx.branch, saved = _add_branch(flat_out, flat, down, up, scale, dropout, rows)
        ctx.save_for_backward(weight, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, *saved = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        need_x, need_weight, need_bias, *need_branch, _, _, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)
            if need_weight:
                dweight = _product(grad.T, saved[0], weight_dtype)
            if need_bias:
                dbias = grad.sum(0, dtype=bias_dtype)
            dlow, ddown, dup = _branch_gradients(grad, ctx.branch, saved, *need_branch)
            if need_x:
                dx = (grad @ weight).addmm_(dlow, saved[1]).view(ctx.shape).to(x_dtype)
        return dx, dweight, dbias, ddown, dup, None, None, None


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, x, down, up, scale, dropout, rows):
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.mark_dirty(out)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(out.dtype).reshape(-1, x.shape[-1])
            ctx.branch, saved = _add_branch(out.view(-1, out.shape[-1]), flat, down, up, scale, dropout, rows)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        _, need_x, *need_branch, _, _, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            flat = grad.reshape(-1, grad.shape[-1]).to(saved[0].dtype)
            dlow, ddown, dup = _branch_gradients(flat, ctx.branch, saved, *need_branch)
            dx = (dlow @ saved[1]).view(ctx.shape).to(ctx.x_dtype) if need_x else None
        return grad, dx, ddown, dup, None, None, None


def _add_branch(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, dropout: float, rows: slice | None):
    """Adds the branch to out [m, out] for x [m, in] of one dtype; returns what `_branch_gradients` needs."""
    dtype = x.dtype
    narrow = down.to(dtype)
    scaled = up.to(dtype) if scale == 1 else torch.mul(up, scale, out=up.new_empty(up.shape, dtype=dtype))
    low, mask = x @ narrow.T, None
    if dropout:
        low, mask = torch.native_dropout(low, dropout, True)
    _features(out, rows).addmm_(low, scaled.T)
    return (rows, scale, dropout, down.dtype, up.dtype), (x, narrow, scaled, low, mask)


def _branch_gradients(grad: Tensor, branch, saved, need_down: bool, need_up: bool):
    """Gradients of down(x), down and up from grad [m, out]."""
    rows, scale, dropout, down_dtype, up_dtype = branch
    x, _, scaled, low, mask = saved
    through = _features(grad, rows)
    dlow = through @ scaled
    if mask is not None:
        dlow = torch.ops.aten.native_dropout_backward(dlow, mask, 1 / (1 - dropout))
    ddown = _product(dlow.T, x, down_dtype) if need_down else None
    dup = _product(through.T, low, up_dtype) if need_up else None
    return dlow, ddown, dup if dup is None or scale == 1 else dup.mul_(scale)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map of `x` is computed here: autocast's where it is on, else its own."""
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def _features(out: Tensor, rows: slice | None) -> Tensor:
    return out if rows is None else out[:, rows]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`: on a GPU straight from the product's float32 sums."""
    if a.dtype == dtype:
        return a @ b
    if _PRODUCT_CASTS and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
