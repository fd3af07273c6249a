"""The selective scan by itself, for mixers that compute through their modules."""

import torch
from torch import Tensor

from mambapeft_kernels.derivatives import differentiated_again, no_autocast, plain_gradients
from mambapeft_kernels.selective_scan import naive
from mambapeft_kernels.selective_scan.chunked import chunk_length, scan_backward, scan_forward


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
        y = _Scan.apply(u, delta, A, B, C) + D * u
        if state_offset is not None:
            y = y + C @ state_offset.T
        return y if output_offset is None else y + output_offset


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        steps = chunk_length(u.shape[1], 1, u.shape[0], u.shape[2], A.shape[-1])
        y, starts = scan_forward(*_time_major(u, delta), A[None], *_time_major(B, C), steps)
        ctx.save_for_backward(u, delta, A, B, C, starts)
        ctx.steps = steps
        return y[:, 0].transpose(0, 1)

    @staticmethod
    def backward(ctx, dy):
        u, delta, A, B, C, starts = ctx.saved_tensors
        if differentiated_again():
            return tuple(plain_gradients(_definition, (u, delta, A, B, C), ctx.needs_input_grad, dy))
        with no_autocast(u.device.type):
            *grads, dA = scan_backward(
                *_time_major(u, delta), A[None], *_time_major(B, C), starts, *_time_major(dy), ctx.steps, True
            )
        du, ddelta, dB, dC = (grad[:, 0].transpose(0, 1) for grad in grads)
        return du, ddelta, dA[0], dB, dC


def _definition(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return naive.selective_scan(u, delta, A, B, C, u.new_zeros(u.shape[-1]))


def _time_major(*tensors: Tensor) -> list[Tensor]:
    """[B, L, C] → [L, 1, B, C] each."""
    return [t.transpose(0, 1).unsqueeze(1).contiguous() for t in tensors]
