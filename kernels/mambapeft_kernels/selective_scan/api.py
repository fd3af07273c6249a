"""The selective scan by itself, for mixers that compute through their modules."""

from typing import Any

import torch
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients, transformed
from mambapeft_kernels.selective_scan import naive
from mambapeft_kernels.selective_scan.chunked import chunk_length, scan_backward, scan_forward
from mambapeft_kernels.selective_scan.exported import exported_as_operator


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
) -> Tensor:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = C_t · (h_t + h') + D u_t + y'.

    Vectorised PyTorch on any device, which keeps one state in every few steps and recomputes the others.

    Args: see `naive.selective_scan`; all of one dtype.
    Returns: y [B, L, E]; derivatives of all orders exist.
    """
    with no_autocast(u.device.type):
        scan = _definition if transformed() else _Scan.apply
        y = scan(u, delta, A, B, C) + D * u
        if state_offset is not None:
            y = y + C @ state_offset.T
        return y if output_offset is None else y + output_offset


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        steps = chunk_length(u.shape[1], 1, u.shape[0], u.shape[2], A.shape[-1])
        u_t, delta_t, B_t, C_t = map(_time_major, (u, delta, B, C))
        as_operator = exported_as_operator(ctx.needs_input_grad)
        y, starts = scan_forward(u_t, delta_t, A[None], B_t, C_t, steps, as_operator)
        ctx.save_for_backward(u, delta, A, B, C, starts)
        ctx.steps = steps
        return _batch_major(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, starts = ctx.saved_tensors
        if differentiated_again(dy):
            return tuple(plain_gradients(_definition, (u, delta, A, B, C), ctx.needs_input_grad, dy))
        u_t, delta_t, B_t, C_t, dy_t = map(_time_major, (u, delta, B, C, dy))
        need_dA = ctx.needs_input_grad[2]
        with no_autocast(u.device.type):
            du, ddelta, dB, dC, dA = scan_backward(u_t, delta_t, A[None], B_t, C_t, starts, dy_t, ctx.steps, need_dA)
        du, ddelta, dB, dC = map(_batch_major, (du, ddelta, dB, dC))
        return du, ddelta, None if dA is None else dA[0], dB, dC


def _definition(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return naive.selective_scan(u, delta, A, B, C, u.new_zeros(u.shape[-1]))


def _time_major(tensor: Tensor) -> Tensor:
    """[B, L, C] → [L, 1, B, C]."""
    return tensor.transpose(0, 1).unsqueeze(1).contiguous()


def _batch_major(tensor: Tensor) -> Tensor:
    """[L, 1, B, C] → [B, L, C]."""
    return tensor[:, 0].transpose(0, 1)
