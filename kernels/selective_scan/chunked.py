"""The selective scan on a CPU: vectorised over everything but time, with its own recomputing backward.

Time is cut into chunks. Within a chunk the exponentials, input products and outputs of all steps are single
tensor operations; only h_t = a_t h_{t-1} + b_t remains a loop, one fused multiply-add a step. The forward keeps
the state at the start of every chunk, the backward recomputes the states inside one chunk at a time, so memory
is O(L / T + T) states instead of O(L). All directions share each step: G is the leading dimension.

Everything here is time-major: [L, G, B, ...] keeps one step contiguous.
"""

import torch
from torch import Tensor

# A chunk's largest tensor holds about this many numbers: small enough for the caches of a laptop's core
# complex, large enough to amortise Python's cost per operation.
_CHUNK_ELEMENTS = 1 << 22


def chunk_length(length: int, groups: int, batch: int, channels: int, states: int) -> int:
    """Steps per chunk: bounded by memory per chunk, and never below 4 (the states kept grow as L / T)."""
    per_step = max(1, groups * batch * channels * states)
    return max(4, min(length, _CHUNK_ELEMENTS // per_step))


def _decay_and_input(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """a = exp(Δ A) and b = Δ u B of one chunk, [T, G, B, E, N]."""
    decay = torch.exp(delta.unsqueeze(-1) * A.unsqueeze(1))
    inputs = (delta * u).unsqueeze(-1) * B.unsqueeze(-2)
    return decay, inputs


def _run_states(decay: Tensor, inputs: Tensor, h: Tensor) -> Tensor:
    """Turns `inputs` into the states of the chunk, in place."""
    for t in range(decay.shape[0]):
        h = torch.addcmul(inputs[t], decay[t], h, out=inputs[t])
    return inputs


def scan_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Outputs Σ_n C h (no D skip) and the states at chunk starts.

    Args:
        u, delta: [L, G, B, E]; A: [G, E, N]; B, C: [L, G, B, N]; steps: chunk length T.
    Returns: y [L, G, B, E], starts [ceil(L / T), G, B, E, N].
    """
    length, groups, batch, channels = u.shape
    y = torch.empty_like(u)
    starts = u.new_zeros((length + steps - 1) // steps, groups, batch, channels, A.shape[-1])
    h = starts[0] if length else None
    for c, s in enumerate(range(0, length, steps)):
        e = min(length, s + steps)
        starts[c] = h
        states = _run_states(*_decay_and_input(u[s:e], delta[s:e], A, B[s:e]), h)
        torch.matmul(states, C[s:e].unsqueeze(-1), out=y[s:e].unsqueeze(-1))
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
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    dA = torch.zeros_like(A) if need_dA else None
    carry = torch.zeros_like(starts[0]) if length else None  # a_{t+1} g_{t+1}
    for c in reversed(range(starts.shape[0])):
        s = c * steps
        e = min(length, s + steps)
        decay, inputs = _decay_and_input(u[s:e], delta[s:e], A, B[s:e])
        states = _run_states(decay, inputs, starts[c])
        torch.matmul(dy[s:e].unsqueeze(-2), states, out=dC[s:e].unsqueeze(-2))

        adjoint = dy[s:e].unsqueeze(-1) * C[s:e].unsqueeze(-2)
        for t in reversed(range(e - s)):
            adjoint[t] += carry
            carry = decay[t] * adjoint[t]

        gB = torch.matmul(adjoint, B[s:e].unsqueeze(-1)).squeeze(-1)
        torch.mul(gB, delta[s:e], out=du[s:e])
        torch.matmul((delta[s:e] * u[s:e]).unsqueeze(-2), adjoint, out=dB[s:e].unsqueeze(-2))
        # From here `adjoint` becomes g_t a_t h_{t-1}.
        adjoint.mul_(decay)
        adjoint[0] *= starts[c]
        adjoint[1:] *= states[:-1]
        torch.mul(gB, u[s:e], out=ddelta[s:e])
        if dA is not None:
            dA += torch.einsum("tgben,tgbe->gen", adjoint, delta[s:e])
        ddelta[s:e] += adjoint.mul_(A.unsqueeze(1)).sum(-1)
    return du, ddelta, dB, dC, dA
