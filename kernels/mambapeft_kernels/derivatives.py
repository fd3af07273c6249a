"""Helpers for ops with their own backward pass: autocast off, and derivatives of any order from the definition.

Autograd cannot differentiate a fused backward pass. If derivatives of gradients are needed (`create_graph=True`:
Hessian-vector products, gradient penalties, influence functions), the gradients are computed from the op's definition
in plain PyTorch instead. That is slower, and correct in all orders.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def no_autocast(kind: str) -> AbstractContextManager[None]:
    """Autocast off for a type of device; some (meta) have none.

    Where it is off already, nothing is switched: an exported program would keep the switch, and could not be saved.
    """
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp, ...) or forward-mode differentiation is at work.

    They go through plain PyTorch and through no function that has a backward pass of its own.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def differentiated_again(grad: Tensor) -> bool:
    """Within the backward pass of `grad`: whether plain PyTorch must compute it.

    That is so where its result will be differentiated (`create_graph=True`), is transformed, or where `grad` stands for
    many gradients at once (`is_grads_batched=True`). Compiled programs have first derivatives alone, as PyTorch says.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


def exporting() -> bool:
    """Whether `torch.export` traces the model, perhaps for any batch; PyTorch 2.6 does not tell it from compiling."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def plain_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    need: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of function(*inputs) by autograd, which can be differentiated again; None where `need` is false.

    Args:
        function: the op's definition in plain PyTorch.
        inputs: as the forward pass saved them, with their history.
        grad: gradient of the output.
    """
    with torch.enable_grad(), no_autocast(grad.device.type):
        # Views, because an input may be computed from another one: gradients stop here, and none is counted twice.
        fresh = [t.view_as(t) if t is not None and needed else t for t, needed in zip(inputs, need)]
        wanted = [t for t, needed in zip(fresh, need) if t is not None and needed]
        found = iter(torch.autograd.grad(function(*fresh), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and needed else None for t, needed in zip(inputs, need)]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention, [..., L, d] each; its fused kernels have no forward-mode derivatives."""
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
        return F.scaled_dot_product_attention(q, k, v)


def first_order_only(out: Tensor, remedy: str) -> Tensor:
    """`out`, whose gradient cannot be differentiated: that is an error instead of a silent zero."""
    return _FirstOrder.apply(out, remedy)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, remedy):
        ctx.remedy = remedy
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        if differentiated_again(grad):
            raise RuntimeError(
                f"second derivatives (create_graph=True) and batches of gradients do not exist here; {ctx.remedy}"
            )
        return grad, None
