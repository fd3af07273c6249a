"""A linear map with a low-rank branch beside it, as one autograd node: LoRA in activation space without its copies.

Written out, `out = F.linear(x, W); out[..., rows] += s · up(dropout(down(x)))` costs two passes over `out` and one over
the gradient of `x` for the additions alone: a twelfth of a Vim-S block's time. Here the products add to what is there.
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


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, dropout, rows):
        dtype = compute_dtype(x)
        ctx.shape, ctx.rows, ctx.scale, ctx.dropout = x.shape, rows, scale, dropout
        ctx.dtypes = x.dtype, *(None if t is None else t.dtype for t in (weight, bias, down, up))
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            weight, bias, down = (None if t is None else t.to(dtype) for t in (weight, bias, down))
            scaled = up.to(dtype) if scale == 1 else torch.mul(up, scale, out=up.new_empty(up.shape, dtype=dtype))
            out = flat.new_empty(*x.shape[:-1], weight.shape[0])
            flat_out = out.view(-1, out.shape[-1])
            if bias is None:
                torch.mm(flat, weight.T, out=flat_out)
            else:
                torch.addmm(bias, flat, weight.T, out=flat_out)
            low, mask = flat @ down.T, None
            if dropout:
                low, mask = torch.native_dropout(low, dropout, True)
            _features(flat_out, rows).addmm_(low, scaled.T)
        ctx.save_for_backward(flat, weight, down, scaled, low, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, down, scaled, low, mask = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype, down_dtype, up_dtype = ctx.dtypes
        need_x, need_weight, need_bias, need_down, need_up, *_ = ctx.needs_input_grad
        dx = dweight = dbias = ddown = dup = None
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(scaled.dtype)
            through = _features(grad, ctx.rows)
            dlow = through @ scaled
            if mask is not None:
                dlow = torch.ops.aten.native_dropout_backward(dlow, mask, 1 / (1 - ctx.dropout))
            if need_x:
                dx = (grad @ weight).addmm_(dlow, down).view(ctx.shape).to(x_dtype)
            if need_weight:
                dweight = _product(grad.T, flat, weight_dtype)
            if need_bias:
                dbias = grad.sum(0, dtype=bias_dtype)
            if need_down:
                ddown = _product(dlow.T, flat, down_dtype)
            if need_up:
                dup = _product(through.T, low, up_dtype)
                dup = dup if ctx.scale == 1 else dup.mul_(ctx.scale)
        return dx, dweight, dbias, ddown, dup, None, None, None


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
