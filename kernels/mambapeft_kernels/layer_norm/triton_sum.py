"""The sum of a residual and a branch in Triton, rounded once: one launch each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again
from mambapeft_kernels.layer_norm import naive

_TILE = {"BLOCK": 2048, "num_warps": 4}


@triton.jit
def _forward(hidden_ptr, residual_ptr, scale_ptr, out_ptr, size, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """size: elements of a sample; a program owns some of one."""
    sample = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, mask = sample * size + within, within < size
    total = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        total *= tl.load(scale_ptr + sample).to(tl.float32)
    total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad_ptr, scale_ptr, dhidden_ptr, dresidual_ptr, size, HAS_SCALE: tl.constexpr, NEED_HIDDEN: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, mask = sample * size + within, within < size
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if NEED_RESIDUAL:
        tl.store(dresidual_ptr + at, grad, mask=mask)
    if NEED_HIDDEN:
        if HAS_SCALE:
            grad *= tl.load(scale_ptr + sample).to(tl.float32)
        tl.store(dhidden_ptr + at, grad.to(dhidden_ptr.dtype.element_ty), mask=mask)


def add_branch(hidden: Tensor, residual: Tensor, branch_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `mambapeft_kernels.add_branch`. A gradient of `branch_scale` is not computed: it is drawn, not learnt."""
    narrow = residual.dtype == hidden.dtype and not (torch.is_grad_enabled() and residual.requires_grad)
    fused = hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
    fused = fused and (narrow or residual.dtype == torch.float32)
    if not fused or not hidden.numel() or (branch_scale is not None and branch_scale.requires_grad):
        return naive.add_branch(hidden, residual, branch_scale).to(dtype)
    return torch.ops.mambapeft.add_branch(hidden, residual, branch_scale, dtype)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x[0].numel(), _TILE["BLOCK"]), len(x)


@torch.library.custom_op(
    "mambapeft::add_branch",
    mutates_args=(),
    schema="(Tensor hidden, Tensor residual, Tensor? branch_scale, ScalarType dtype) -> Tensor",
)
def _op(hidden: Tensor, residual: Tensor, branch_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _forward[_grid(hidden)](
            hidden.contiguous(), residual.contiguous(), out if branch_scale is None else branch_scale.contiguous(), out,
            hidden[0].numel(), HAS_SCALE=branch_scale is not None, **_TILE,
        )  # fmt: skip
    return out


@_op.register_fake
def _(hidden, residual, branch_scale, dtype):
    return hidden.new_empty(hidden.shape, dtype=dtype)


@torch.library.custom_op(
    "mambapeft::add_branch_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? branch_scale, ScalarType dtype, bool need_hidden, bool need_residual)"
    " -> (Tensor, Tensor)",
)
def _op_backward(
    grad: Tensor, branch_scale: Tensor | None, dtype: torch.dtype, need_hidden: bool, need_residual: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden (in `dtype`) and of the residual (float32); empty where not asked for."""
    dhidden = torch.empty(grad.shape if need_hidden else (0,), dtype=dtype, device=grad.device)
    dresidual = torch.empty(grad.shape if need_residual else (0,), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _backward[_grid(grad)](
            grad.contiguous(), grad if branch_scale is None else branch_scale.contiguous(), dhidden, dresidual,
            grad[0].numel(), HAS_SCALE=branch_scale is not None, NEED_HIDDEN=need_hidden, NEED_RESIDUAL=need_residual,
            **_TILE,
        )  # fmt: skip
    return dhidden, dresidual


@_op_backward.register_fake
def _(grad, branch_scale, dtype, need_hidden, need_residual):
    dhidden = grad.new_empty(grad.shape if need_hidden else (0,), dtype=dtype)
    return dhidden, grad.new_empty(grad.shape if need_residual else (0,), dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    hidden, _, branch_scale, _ = inputs
    ctx.save_for_backward(branch_scale)
    ctx.dtype = hidden.dtype


def _differentiate(ctx, grad):
    (scale,) = ctx.saved_tensors
    need_hidden, need_residual, *_ = ctx.needs_input_grad
    if differentiated_again(grad):
        wide = grad.float()
        dhidden = wide if scale is None else wide * scale.view(-1, *[1] * (grad.ndim - 1))
        dresidual = wide
    else:
        dhidden, dresidual = torch.ops.mambapeft.add_branch_backward(grad, scale, ctx.dtype, need_hidden, need_residual)
    return dhidden.to(ctx.dtype) if need_hidden else None, dresidual if need_residual else None, None, None


torch.library.register_autograd("mambapeft::add_branch", _differentiate, setup_context=_setup_context)
