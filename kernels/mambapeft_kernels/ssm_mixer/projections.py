"""The operations around the scans, in Triton: x_proj, dt_proj + softplus, and their gradients.

Both directions share every launch. Weights are cast where they are loaded: under autocast they arrive in float32
while x is bfloat16. Numbers of samples and tokens are not specialised on: they decide no alignment, and an epoch's last
batch would compile every kernel again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambapeft_kernels.backends import interpreted
from mambapeft_kernels.causal_conv1d.triton_kernels import conv_preactivation, sigmoid


@triton.jit
def _softplus(v, EXACT: tl.constexpr):
    """max(v, 0) + log1p(a), a = e^-|v|: to float32's last bits, or in half as many instructions to 6e-5 of it."""
    a = tl.exp2(-1.4426950408889634 * tl.abs(v))
    if EXACT:
        q = a / (2.0 + a)  # log1p(a) = 2 artanh(q), q <= 1/3
        s = q * q
        series = 1.0 + s * (
            0.33333334 + s * (0.2 + s * (0.14285715 + s * (0.11111111 + s * (0.09090909 + s * 0.07692308))))
        )
        log = 2.0 * q * series
    else:  # the polynomial of the smallest relative error on [0, 1]
        log = a * (0.99994326 + a * (-0.4969778 + a * (0.30630088 + a * (-0.15742712 + a * 0.04134726))))
    return tl.maximum(v, 0.0) + log


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """A product with float32 accumulation. Triton's interpreter has no 16-bit products: exact in float32 there."""
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens"])
def _x_proj(
    u_ptr, w0, w1, low_ptr, bc_ptr, tokens, E, R: tl.constexpr, S: tl.constexpr, WP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u x_projᵀ: the low-rank Δ [G, tokens, R] in u's dtype and B|C [G, tokens, S] in float32, S = 2N."""
    d = tl.program_id(1)
    if d == 0:  # noqa: SIM108 (Triton has no conditional expression on run-time values)
        weight = w0
    else:
        weight = w1
    token = d.to(tl.int64) * tokens + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < (d + 1).to(tl.int64) * tokens
    io = u_ptr.dtype.element_ty
    row = tl.arange(0, WP)  # rows of the weight
    out = tl.zeros([BLOCK_T, WP], tl.float32)
    for start in range(0, E, BLOCK_E):
        chan = start + tl.arange(0, BLOCK_E)
        mask_e = chan < E
        u = tl.load(u_ptr + (token * E)[:, None] + chan[None, :], mask=mask_t[:, None] & mask_e[None, :], other=0.0)
        at = weight + row[None, :] * E + chan[:, None]
        w = tl.load(at, mask=mask_e[:, None] & (row < R + S)[None, :], other=0.0)
        out += _dot(u, w.to(io), PRECISION)
    tl.store(low_ptr + (token * R)[:, None] + row[None, :], out.to(io), mask=mask_t[:, None] & (row < R)[None, :])
    state = row - R
    mask_s = (state >= 0) & (state < S)
    tl.store(bc_ptr + (token * S)[:, None] + state[None, :], out, mask=mask_t[:, None] & mask_s[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _dt_proj(
    low_ptr, w0, w1, b0, b1, delta_ptr, tokens, E, R: tl.constexpr, RP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Δ = softplus(low dt_projᵀ + bias), [G, tokens, E]."""
    d = tl.program_id(2)
    if d == 0:
        weight, bias = w0, b0
    else:
        weight, bias = w1, b1
    token = d.to(tl.int64) * tokens + tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < (d + 1).to(tl.int64) * tokens
    chan = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = chan < E
    rank = tl.arange(0, RP)
    at = low_ptr + (token * R)[:, None] + rank[None, :]
    low = tl.load(at, mask=mask_t[:, None] & (rank < R)[None, :], other=0.0)
    w = tl.load(weight + chan[None, :] * R + rank[:, None], mask=mask_e[None, :] & (rank < R)[:, None], other=0.0)
    raw = _dot(low, w.to(low.dtype), PRECISION)
    raw += tl.load(bias + chan, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    at = delta_ptr + (token * E)[:, None] + chan[None, :]
    out = delta_ptr.dtype.element_ty
    tl.store(at, _softplus(raw, out == tl.float32).to(out), mask=mask_t[:, None] & mask_e[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _dt_proj_backward(
    draw_ptr, w0, w1, dbc_ptr, dproj_ptr, tokens, E, part_stride, PARTS: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, RP: tl.constexpr, SP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of [dt | B | C], [G, tokens, R + S]: dΔ_raw dt_proj, and the sum of the scan's partial sums."""
    d = tl.program_id(1)
    if d == 0:  # noqa: SIM108 (Triton has no conditional expression on run-time values)
        weight = w0
    else:
        weight = w1
    token = d.to(tl.int64) * tokens + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < (d + 1).to(tl.int64) * tokens
    rank, state = tl.arange(0, RP), tl.arange(0, SP)
    io = draw_ptr.dtype.element_ty
    dlow = tl.zeros([BLOCK_T, RP], tl.float32)
    for start in range(0, E, BLOCK_E):
        chan = start + tl.arange(0, BLOCK_E)
        mask_e = chan < E
        at = draw_ptr + (token * E)[:, None] + chan[None, :]
        draw = tl.load(at, mask=mask_t[:, None] & mask_e[None, :], other=0.0)
        at = weight + chan[:, None] * R + rank[None, :]
        w = tl.load(at, mask=mask_e[:, None] & (rank < R)[None, :], other=0.0)
        dlow += _dot(draw, w.to(io), PRECISION)
    dbc = tl.zeros([BLOCK_T, SP], tl.float32)
    mask_s = mask_t[:, None] & (state < S)[None, :]
    for part in tl.static_range(PARTS):  # unrolled: all loads are under way at once
        at = dbc_ptr + part * part_stride + (token * S)[:, None] + state[None, :]
        dbc += tl.load(at, mask=mask_s, other=0.0).to(tl.float32)
    row = dproj_ptr + (token * (R + S))[:, None]
    tl.store(row + rank[None, :], dlow.to(io), mask=mask_t[:, None] & (rank < R)[None, :])
    tl.store(row + R + state[None, :], dbc.to(io), mask=mask_s)


@triton.jit(do_not_specialize=["B", "L"])
def _x_proj_backward(
    du_ptr, dproj_ptr, x_ptr, w0, w1, cw0, cw1, cb0, cb1, B, L, E, sb, sl, se,
    REV0: tl.constexpr, REV1: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, THROUGH_SILU: tl.constexpr,
):  # fmt: skip
    """du += dproj x_proj in place; then, if asked, on to the gradient of the convolution's preactivation."""
    bd = tl.program_id(2)
    d = bd // B
    b = (bd % B).to(tl.int64)
    if d == 0:
        weight, cw, cb = w0, cw0, cb0
    else:
        weight, cw, cb = w1, cw1, cb1
    direction = tl.where(d == 0, 1 - 2 * REV0, 1 - 2 * REV1)
    step = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    chan = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_t, mask_e = step < L, chan < E
    mask = mask_t[:, None] & mask_e[None, :]
    column = tl.arange(0, WP)
    token = bd.to(tl.int64) * L + step
    at = dproj_ptr + (token * W)[:, None] + column[None, :]
    dproj = tl.load(at, mask=mask_t[:, None] & (column < W)[None, :], other=0.0)
    at = weight + (column * E)[:, None] + chan[None, :]
    w = tl.load(at, mask=mask_e[None, :] & (column < W)[:, None], other=0.0)
    at = du_ptr + (token * E)[:, None] + chan[None, :]
    du = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    du += _dot(dproj, w.to(dproj.dtype), PRECISION)
    if THROUGH_SILU:
        pre = conv_preactivation(x_ptr + b * sb, cw, cb, step, chan, L, E, sl, se, direction, K)
        gate = sigmoid(pre)
        du *= gate * (1.0 + pre * (1.0 - gate))
    tl.store(at, du.to(du_ptr.dtype.element_ty), mask=mask)


def _precision(x: Tensor) -> str:
    """float32 products are exact float32 unless torch's own switch allows tf32."""
    if interpreted(x.device):
        return "interpreter"
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


# Tiles: tokens, channels, warps and pipeline stages; float32 products have no tensor cores and want small ones.
_TILES: dict[str, dict[str, int]] = {
    "x_proj": {"BLOCK_T": 64, "BLOCK_E": 64, "num_warps": 4, "num_stages": 4},
    "dt_proj": {"BLOCK_T": 64, "BLOCK_E": 64, "num_warps": 4, "num_stages": 1},
    "dt_proj_backward": {"BLOCK_T": 64, "BLOCK_E": 128, "num_warps": 4, "num_stages": 3},
    "x_proj_backward": {"BLOCK_T": 64, "BLOCK_E": 128, "num_warps": 4, "num_stages": 1},
}
_FLOAT32_TILE = {"BLOCK_T": 32, "BLOCK_E": 32, "num_warps": 4, "num_stages": 2}


def _tile(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    return _FLOAT32_TILE if dtype == torch.float32 else _TILES[kernel]


def _padded(size: int) -> int:
    """An inner size of a Triton product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def _pair(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    return weights[0], weights[-1]


def projections_forward(
    u: Tensor, x_proj: list[Tensor], dt_proj: list[Tensor], dt_bias: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Δ [G, B, L, E] in u's dtype and B|C [G, B, L, 2N] in float32, from u [G, B, L, E]."""
    groups, batch, length, channels = u.shape
    tokens, rank = batch * length, dt_proj[0].shape[1]
    pair_states = x_proj[0].shape[0] - rank
    delta = torch.empty_like(u)
    low = torch.empty(groups, tokens, rank, dtype=u.dtype, device=u.device)
    bc = torch.empty(groups, batch, length, pair_states, dtype=torch.float32, device=u.device)
    precision = _precision(u)
    tile = _tile("x_proj", u.dtype)
    _x_proj[(triton.cdiv(tokens, tile["BLOCK_T"]), groups)](
        u, *_pair(x_proj), low, bc, tokens, channels, R=rank, S=pair_states, WP=_padded(rank + pair_states),
        PRECISION=precision, **tile,
    )  # fmt: skip
    tile = _tile("dt_proj", u.dtype)
    _dt_proj[(triton.cdiv(channels, tile["BLOCK_E"]), triton.cdiv(tokens, tile["BLOCK_T"]), groups)](
        low, *_pair(dt_proj), *_pair(dt_bias), delta, tokens, channels, R=rank, RP=_padded(rank), PRECISION=precision,
        **tile,
    )  # fmt: skip
    return delta, bc


def dt_proj_backward(draw: Tensor, dt_proj: list[Tensor], dbc: Tensor) -> Tensor:
    """The gradient of [dt | B | C], [G, B, L, R + 2N] in draw's dtype.

    Args:
        draw: [G, B, L, E] gradient of Δ before softplus.
        dbc: [P, G, B, L, 2N], partial sums of the gradients of B|C; float32 or draw's dtype.
    """
    groups, batch, length, channels = draw.shape
    tokens, rank, pair_states = batch * length, dt_proj[0].shape[1], dbc.shape[-1]
    dproj = torch.empty(groups, batch, length, rank + pair_states, dtype=draw.dtype, device=draw.device)
    tile = _tile("dt_proj_backward", draw.dtype)
    _dt_proj_backward[(triton.cdiv(tokens, tile["BLOCK_T"]), groups)](
        draw, *_pair(dt_proj), dbc, dproj, tokens, channels, dbc.stride(0), PARTS=dbc.shape[0], R=rank,
        S=pair_states, RP=_padded(rank), SP=_padded(pair_states), PRECISION=_precision(draw), **tile,
    )  # fmt: skip
    return dproj


def x_proj_backward(
    du: Tensor,
    dproj: Tensor,
    x: Tensor,
    x_proj: list[Tensor],
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    reverse: tuple[bool, ...],
    through_silu: bool,
) -> None:
    """Adds dproj [G, B, L, R + 2N] · x_proj to du [G, B, L, E] (the scan's share), in place.

    With `through_silu`, du then becomes the gradient of the convolution's preactivation, which is computed again.
    """
    groups, batch, length, channels = du.shape
    if not through_silu:  # no token reads another one: all samples as one leave no tile half empty
        batch, length = 1, batch * length
    tile = _tile("x_proj_backward", du.dtype)
    grid = triton.cdiv(channels, tile["BLOCK_E"]), triton.cdiv(length, tile["BLOCK_T"]), batch * groups
    _x_proj_backward[grid](
        du, dproj, x, *_pair(x_proj), *_pair(conv_weight), *_pair(conv_bias), batch, length, channels, *x.stride(),
        REV0=int(through_silu and reverse[0]), REV1=int(through_silu and reverse[-1]), K=conv_weight[0].shape[1],
        W=dproj.shape[-1],
        WP=_padded(dproj.shape[-1]), PRECISION=_precision(du), THROUGH_SILU=through_silu, **tile,
    )  # fmt: skip
