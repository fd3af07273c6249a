"""The selective scan on a CPU: vectorised over everything but time, with its own recomputing backward.

Time is cut into chunks. Within a chunk the exponentials, input products and outputs of all steps are single
tensor operations; only h_t = a_t h_{t-1} + b_t remains a loop, one fused multiply-add a step. The forward keeps
the state at the start of every chunk, the backward recomputes the states inside one chunk at a time, so memory
is O(L / T + T) states instead of O(L). All directions share each step: G is the leading dimension.

Everything here is time-major, [L, G, B, ...]: one step is contiguous. States are [.., N, E], channels last: the
broadcast products then run over long contiguous rows, which is what a CPU's vector units want.
"""

import torch
from torch import Tensor

from mambapeft_kernels.derivatives import exporting
from mambapeft_kernels.selective_scan.exported import scan_outputs

# A chunk's largest tensor holds about this many numbers: small enough for a core's caches (measured: twice as fast
# as four times as many on a small model), large enough to amortise Python's cost per operation.
_CHUNK_ELEMENTS = 1 << 20


def chunk_length(length: int, groups: int, batch: int, channels: int, states: int) -> int:
    """Steps per chunk: bounded by memory per chunk, and never below 8 (the states kept grow as L / T).

    All steps while a model is exported: the number of chunks may not depend on the batch, which may be dynamic.
    """
    if exporting():
        return length
    per_step = max(1, groups * batch * channels * states)
    return max(8, min(length, _CHUNK_ELEMENTS // per_step))


def _decay_and_input(u: Tensor, delta: Tensor, At: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """a = exp(Δ A) and b = Δ u B of one chunk, [T, G, B, N, E]; At: [G, N, E]."""
    decay = (delta.unsqueeze(-2) * At.unsqueeze(1)).exp_()
    inputs = (delta * u).unsqueeze(-2) * B.unsqueeze(-1)
    return decay, inputs


def run_states(decay: Tensor, inputs: Tensor, h: Tensor) -> Tensor:
    """Turns `inputs` into the states of the chunk, in place."""
    if exporting():  # the program may run where gradients are recorded, which `out=` does not allow
        states = []
        for t in range(decay.shape[0]):
            h = torch.addcmul(inputs[t], decay[t], h)
            states.append(h)
        return torch.stack(states)
    for t in range(decay.shape[0]):
        h = torch.addcmul(inputs[t], decay[t], h, out=inputs[t])
    return inputs


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, steps: int, as_operator: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs Σ_n C h (no D skip) and the states at chunk starts.

    Args:
        u, delta: [L, G, B, E]; A: [G, E, N]; B, C: [L, G, B, N]; steps: chunk length T.
        as_operator: see `exported.scan_outputs`.
    Returns: y [L, G, B, E], starts [ceil(L / T), G, B, N, E].
    """
    length, groups, batch, channels = u.shape
    if as_operator:
        return scan_outputs(u, delta, A, B, C), u.new_zeros(1, groups, batch, A.shape[-1], channels)
    At = A.mT.contiguous()
    y = torch.empty_like(u)
    starts = u.new_zeros((length + steps - 1) // steps, groups, batch, A.shape[-1], channels)
    h = u.new_zeros(groups, batch, A.shape[-1], channels)
    for c, s in enumerate(range(0, length, steps)):
        e = min(length, s + steps)
        starts[c] = h
        states = run_states(*_decay_and_input(u[s:e], delta[s:e], At, B[s:e]), h)
        if exporting():
            y[s:e] = (C[s:e].unsqueeze(-2) @ states).squeeze(-2)
        else:
            torch.matmul(C[s:e].unsqueeze(-2), states, out=y[s:e].unsqueeze(-2))
        h = states[-1]
    return y, starts


def scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    dy: Tensor,
    steps: int,
    need_dA: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `scan_forward`'s y: du, dΔ [L, G, B, E], dB, dC [L, G, B, N], dA [G, E, N] or None.

    With g_t = C_t dy_t + a_{t+1} g_{t+1} (the adjoint state):
    dC_t = Σ_e dy_t h_t;  dB_t = Σ_e g_t Δ_t u_t;  du_t = Δ_t Σ_n g_t B_t;
    dΔ_t = u_t Σ_n g_t B_t + Σ_n g_t a_t h_{t-1} A;  dA = Σ_{b,t} g_t a_t h_{t-1} Δ_t.
    """
    length = u.shape[0]
    At = A.mT.contiguous()
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    dAt = torch.zeros_like(At) if need_dA else None
    carry = starts.new_zeros(starts.shape[1:])  # a_{t+1} g_{t+1}
    for c in reversed(range(starts.shape[0])):
        s = c * steps
        e = min(length, s + steps)
        decay, inputs = _decay_and_input(u[s:e], delta[s:e], At, B[s:e])
        states = run_states(decay, inputs, starts[c])
        torch.matmul(states, dy[s:e].unsqueeze(-1), out=dC[s:e].unsqueeze(-1))

        adjoint = dy[s:e].unsqueeze(-2) * C[s:e].unsqueeze(-1)
        for t in reversed(range(e - s)):
            adjoint[t] += carry
            torch.mul(decay[t], adjoint[t], out=carry)

        gB = torch.matmul(B[s:e].unsqueeze(-2), adjoint).squeeze(-2)
        torch.mul(gB, delta[s:e], out=du[s:e])
        torch.matmul(adjoint, (delta[s:e] * u[s:e]).unsqueeze(-1), out=dB[s:e].unsqueeze(-1))
        # From here `adjoint` becomes g_t a_t h_{t-1}.
        adjoint.mul_(decay)
        adjoint[0] *= starts[c]
        adjoint[1:] *= states[:-1]
        torch.mul(gB, u[s:e], out=ddelta[s:e])
        if dAt is not None:
            dAt += torch.einsum("tgbne,tgbe->gne", adjoint, delta[s:e])
        ddelta[s:e] += adjoint.mul_(At.unsqueeze(1)).sum(-2)
    return du, ddelta, dB, dC, None if dAt is None else dAt.mT
