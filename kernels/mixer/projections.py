"""What surrounds the scans, fused in Triton: conv → SiLU → x_proj → dt_proj → softplus, and its backward.

One program owns a block of tokens of one direction, so neither the convolution's output nor the low-rank Δ makes
a round trip through memory between its producer and its consumer. Weights are cast where they are loaded:
under autocast they arrive in float32 while x is bfloat16.
"""

import torch
import triton
import triton.language as tl
from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.conv1d.triton import conv_preactivation, sigmoid
from torch import Tensor


@triton.jit
def _softplus(v):
    """log(1 + e^v) without cancellation: log(w)·e/(w-1) with w = 1 + e corrects the rounding of w."""
    e = tl.exp(tl.minimum(v, 20.0))
    w = 1.0 + e
    exact = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(v > 20.0, v, exact)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """A product with float32 accumulation. Triton's interpreter has no 16-bit products: exact in float32 there."""
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _forward(
    x_ptr, cw0, cw1, cb0, cb1, xp0, xp1, dp0, dp1, db0, db1, u_ptr, delta_ptr, bc_ptr,
    tokens, L, E, sb, sl, se,
    REV0: tl.constexpr, REV1: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    RP: tl.constexpr, SP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u, Δ [G, tokens, E] and B|C [G, tokens, S] with S = 2N."""
    d = tl.program_id(1)
    if d == 0:
        cw, cb, xp, dp, db = cw0, cb0, xp0, dp0, db0
    else:
        cw, cb, xp, dp, db = cw1, cb1, xp1, dp1, db1
    direction = tl.where(d == 0, 1 - 2 * REV0, 1 - 2 * REV1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < tokens
    batch, step = token // L, token % L
    out_row = (d.to(tl.int64) * tokens + token) * E
    io = x_ptr.dtype.element_ty
    rank, state = tl.arange(0, RP), tl.arange(0, SP)

    low = tl.zeros([BLOCK_T, RP], tl.float32)
    bc = tl.zeros([BLOCK_T, SP], tl.float32)
    for start in range(0, E, BLOCK_E):
        chan = start + tl.arange(0, BLOCK_E)
        mask_e = chan < E
        pre = conv_preactivation(x_ptr, cw, cb, batch, step, chan, mask_t, L, E, sb, sl, se, direction, K)
        u = (pre * sigmoid(pre)).to(io)
        u = tl.where(mask_t[:, None] & mask_e[None, :], u, 0.0).to(io)
        tl.store(u_ptr + out_row[:, None] + chan[None, :], u, mask=mask_t[:, None] & mask_e[None, :])
        w_low = tl.load(xp + rank[None, :] * E + chan[:, None], mask=mask_e[:, None] & (rank < R)[None, :], other=0.0)
        low += _dot(u, w_low.to(io), PRECISION)
        w_bc = tl.load(
            xp + (R + state)[None, :] * E + chan[:, None],
            mask=mask_e[:, None] & (state < S)[None, :],
            other=0.0,
        )
        bc += _dot(u, w_bc.to(io), PRECISION)
    bc_row = (d.to(tl.int64) * tokens + token) * S
    tl.store(bc_ptr + bc_row[:, None] + state[None, :], bc, mask=mask_t[:, None] & (state < S)[None, :])

    low = low.to(io)
    for start in range(0, E, BLOCK_E):
        chan = start + tl.arange(0, BLOCK_E)
        mask_e = chan < E
        w = tl.load(dp + chan[None, :] * R + rank[:, None], mask=mask_e[None, :] & (rank < R)[:, None], other=0.0)
        raw = _dot(low, w.to(io), PRECISION)
        raw += tl.load(db + chan, mask=mask_e, other=0.0).to(tl.float32)[None, :]
        tl.store(
            delta_ptr + out_row[:, None] + chan[None, :],
            _softplus(raw).to(io),
            mask=mask_t[:, None] & mask_e[None, :],
        )


@triton.jit
def _backward(
    x_ptr, cw0, cw1, cb0, cb1, xp0, xp1, dp0, dp1, du_ptr, draw_ptr, dbc_ptr, dproj_ptr,
    tokens, L, E, sb, sl, se, parts, part_stride,
    REV0: tl.constexpr, REV1: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    RP: tl.constexpr, SP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    NEED_INPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """du → gradient of the convolution's preactivation, in place; and the gradient of [dt | B | C]."""
    d = tl.program_id(1)
    if d == 0:
        cw, cb, xp, dp = cw0, cb0, xp0, dp0
    else:
        cw, cb, xp, dp = cw1, cb1, xp1, dp1
    direction = tl.where(d == 0, 1 - 2 * REV0, 1 - 2 * REV1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < tokens
    batch, step = token // L, token % L
    grouped = d.to(tl.int64) * tokens + token
    row = grouped * E
    io = x_ptr.dtype.element_ty
    rank, state = tl.arange(0, RP), tl.arange(0, SP)

    dlow = tl.zeros([BLOCK_T, RP], tl.float32)
    for start in range(0, E, BLOCK_E):
        chan = start + tl.arange(0, BLOCK_E)
        mask_e = chan < E
        draw = tl.load(draw_ptr + row[:, None] + chan[None, :], mask=mask_t[:, None] & mask_e[None, :], other=0.0)
        w = tl.load(dp + chan[:, None] * R + rank[None, :], mask=mask_e[:, None] & (rank < R)[None, :], other=0.0)
        dlow += _dot(draw, w.to(io), PRECISION)
    dbc = tl.zeros([BLOCK_T, SP], tl.float32)
    mask_s = mask_t[:, None] & (state < S)[None, :]
    for part in range(parts):
        source = dbc_ptr + part * part_stride + (grouped * S)[:, None] + state[None, :]
        dbc += tl.load(source, mask=mask_s, other=0.0)

    dlow, dbc = dlow.to(io), dbc.to(io)
    proj = dproj_ptr + (grouped * (R + S))[:, None]
    tl.store(proj + rank[None, :], dlow, mask=mask_t[:, None] & (rank < R)[None, :])
    tl.store(proj + R + state[None, :], dbc, mask=mask_s)
    if NEED_INPUT:
        for start in range(0, E, BLOCK_E):
            chan = start + tl.arange(0, BLOCK_E)
            mask_e = chan < E
            mask = mask_t[:, None] & mask_e[None, :]
            du = tl.load(du_ptr + row[:, None] + chan[None, :], mask=mask, other=0.0).to(tl.float32)
            w_low = tl.load(
                xp + rank[:, None] * E + chan[None, :], mask=mask_e[None, :] & (rank < R)[:, None], other=0.0
            )
            du += _dot(dlow, w_low.to(io), PRECISION)
            w_bc = tl.load(
                xp + (R + state)[:, None] * E + chan[None, :],
                mask=mask_e[None, :] & (state < S)[:, None],
                other=0.0,
            )
            du += _dot(dbc, w_bc.to(io), PRECISION)
            pre = conv_preactivation(x_ptr, cw, cb, batch, step, chan, mask_t, L, E, sb, sl, se, direction, K)
            gate = sigmoid(pre)
            du *= gate * (1.0 + pre * (1.0 - gate))
            tl.store(du_ptr + row[:, None] + chan[None, :], du.to(io), mask=mask)


def _precision(x: Tensor) -> str:
    """float32 products are exact float32 unless torch's own switch allows tf32."""
    if interpreted(x.device):
        return "interpreter"
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _sizes(rank: int, states: int, channels: int) -> dict[str, int]:
    """Padded inner sizes (a Triton product needs 16) and the tuned tile."""
    return {
        "RP": max(16, triton.next_power_of_2(rank)),
        "SP": max(16, triton.next_power_of_2(2 * states)),
        "BLOCK_E": min(64, max(16, triton.next_power_of_2(channels))),
    }


def _pair(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    return weights[0], weights[-1]


def projections_forward(
    x: Tensor,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_proj: list[Tensor],
    dt_proj: list[Tensor],
    dt_bias: list[Tensor],
    reverse: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """u, Δ [G, B, L, E] in x's dtype and B|C [G, B, L, 2N] in float32, from x [B, L, E] (any strides)."""
    batch, length, channels = x.shape
    groups, rank = len(reverse), dt_proj[0].shape[1]
    pair_states = x_proj[0].shape[0] - rank
    u = torch.empty(groups, batch, length, channels, dtype=x.dtype, device=x.device)
    delta = torch.empty_like(u)
    bc = torch.empty(groups, batch, length, pair_states, dtype=torch.float32, device=x.device)
    block_t = 32 if x.dtype != torch.float32 else 16
    _forward[(triton.cdiv(batch * length, block_t), groups)](
        x, *_pair(conv_weight), *_pair(conv_bias), *_pair(x_proj), *_pair(dt_proj), *_pair(dt_bias),
        u, delta, bc, batch * length, length, channels, *x.stride(),
        REV0=int(reverse[0]), REV1=int(reverse[-1]), K=conv_weight[0].shape[1], R=rank, S=pair_states,
        BLOCK_T=block_t, PRECISION=_precision(x), num_warps=4,
        **_sizes(rank, pair_states // 2, channels),
    )  # fmt: skip
    return u, delta, bc


def projections_backward(
    x: Tensor,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_proj: list[Tensor],
    dt_proj: list[Tensor],
    reverse: tuple[bool, ...],
    du: Tensor,
    draw: Tensor,
    dbc: Tensor,
    need_input: bool,
) -> Tensor:
    """The way back through dt_proj, x_proj and SiLU.

    Args:
        du, draw: [G, B, L, E] gradients of u (scan's share) and of Δ before softplus. With `need_input`, `du` is
            replaced by the gradient of the convolution's preactivation.
        dbc: [P, G, B, L, 2N] float32, partial sums of the gradients of B|C.
    Returns: the gradient of [dt | B | C], [G, B, L, R + 2N] in x's dtype.
    """
    batch, length, channels = x.shape
    groups, rank = len(reverse), dt_proj[0].shape[1]
    pair_states = dbc.shape[-1]
    dproj = torch.empty(groups, batch, length, rank + pair_states, dtype=x.dtype, device=x.device)
    block_t = 32 if x.dtype != torch.float32 else 16
    _backward[(triton.cdiv(batch * length, block_t), groups)](
        x, *_pair(conv_weight), *_pair(conv_bias), *_pair(x_proj), *_pair(dt_proj),
        du, draw, dbc, dproj, batch * length, length, channels, *x.stride(), dbc.shape[0], dbc.stride(0),
        REV0=int(reverse[0]), REV1=int(reverse[-1]), K=conv_weight[0].shape[1], R=rank, S=pair_states,
        BLOCK_T=block_t, NEED_INPUT=need_input, PRECISION=_precision(x), num_warps=4,
        **_sizes(rank, pair_states // 2, channels),
    )  # fmt: skip
    return dproj
