"""Residual add, drop path and RMSNorm in loops that Numba compiles, for CPUs: one pass over memory each way."""

from typing import Any

import torch
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, plain_gradients
from mambapeft_kernels.numba_threads import array, over_batch
from mambapeft_kernels.rms_norm import naive
from mambapeft_kernels.rms_norm import numba_loops as loops


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, branch_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `mambapeft_kernels.add_rms_norm`; without a gradient of `branch_scale`."""
    return _Norm.apply(hidden, residual, weight, eps, branch_scale)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, branch_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32 if residual is None else residual.dtype)
        wide = torch.promote_types(wide, torch.float32)
        batch = hidden.shape[0]
        scale = torch.ones(batch, dtype=wide) if branch_scale is None else branch_scale.to(wide)
        x, small = array(hidden.to(wide)), array(torch.tensor([eps], dtype=wide))
        before = x if residual is None else array(residual.to(wide))
        total, normed = (torch.empty(hidden.shape, dtype=wide) for _ in range(2))
        arrays = (x, before, residual is not None, array(scale), array(weight.to(wide)), small)
        over_batch(loops.normalise, batch, *arrays, total.numpy(), normed.numpy())
        ctx.save_for_backward(total, weight, branch_scale)
        ctx.eps, ctx.dtype = eps, hidden.dtype
        return normed.to(hidden.dtype), total

    @staticmethod
    def backward(ctx: Any, dnormed: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        need_hidden, need_residual, need_weight = ctx.needs_input_grad[:3]
        if differentiated_again(dnormed):
            need = (need_hidden or need_residual, need_weight)
            through, dweight = plain_gradients(_normed(ctx.eps, ctx.dtype), (total, weight), need, dnormed)
            dresidual = None if through is None else through + dtotal
        else:
            dresidual, dweight = _gradients(ctx.eps, total, weight, dnormed, dtotal)
        if not need_weight:
            dweight = None
        if dresidual is None:
            return None, None, dweight, None, None
        dhidden = dresidual if scale is None else dresidual * scale.to(dresidual.dtype)[:, None, None]
        return (
            dhidden.to(ctx.dtype) if need_hidden else None,
            dresidual if need_residual else None,
            dweight,
            None,
            None,
        )


def _gradients(eps: float, total: Tensor, weight: Tensor, dnormed: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor]:
    """Of the residual and the weight."""
    wide, batch = total.dtype, total.shape[0]
    dresidual, dweight = torch.empty_like(total), torch.zeros(batch, total.shape[2], dtype=wide)
    given = (dnormed.to(wide), dtotal, total, weight.to(wide), torch.tensor([eps], dtype=wide))
    over_batch(loops.normalise_backward, batch, *map(array, given), dresidual.numpy(), dweight.numpy())
    return dresidual, dweight.sum(0).to(weight.dtype)


def _normed(eps: float, dtype: torch.dtype) -> Any:
    def norm(total: Tensor, weight: Tensor) -> Tensor:
        return naive.add_rms_norm(total, None, weight, eps)[0].to(dtype)

    return norm
