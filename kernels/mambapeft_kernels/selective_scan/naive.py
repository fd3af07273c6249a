"""The definition of the selective scan, one step a line; any dtype, exact in float64."""

import torch
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    reverse: bool = False,
    state_offset: Tensor | None = None,
    output_offset: Tensor | None = None,
) -> Tensor:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = C_t · (h_t + h') + D u_t + y'  (Mamba, arXiv 2312.00752, eq. 2-4).

    Args:
        u: [B, L, E] input.
        delta: [B, L, E] step sizes Δ, already positive (after softplus).
        A: [E, N] diagonal of the state matrix, negative.
        B, C: [B, L, N] input and output vectors of the states.
        D: [E] skip.
        reverse: run from the last token to the first; the result keeps the order of `u`.
        state_offset: h' [E, N], added to the state where it is read (State-offset tuning, arXiv 2503.03499).
        output_offset: y' [E], added to the output.
    Returns: y [B, L, E].
    """
    batch, length, _ = u.shape
    h = u.new_zeros(batch, *A.shape)
    y: list[Tensor] = [u] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        read = h if state_offset is None else h + state_offset
        y[t] = (read * C[:, t, None, :]).sum(-1) + D * u[:, t]
    out = torch.stack(y, dim=1)
    return out if output_offset is None else out + output_offset
