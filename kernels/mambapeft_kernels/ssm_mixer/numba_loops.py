"""The loops of the compiled CPU backend: convolution, scan and gate, forward and backward.

Every loop runs over channels innermost, E at a time in tiles of `TILE`, so that LLVM uses the vector units; states and
decays of a tile stay in the core's caches. A call covers the samples first … last - 1 of a batch, so that threads share
a batch without writing to the same place.

Every result has one order of additions. LLVM compiles a loop twice, vectorised and not, and chooses by where the arrays
lie: so nothing here may be regrouped by it, and sums over channels have an order of their own (`_sum`).
Constants have the arrays' dtype: beside an integer literal Numba computes in float64.
Time runs from the last token to the first where `reverse` is set: step s reads token t = L - 1 - s.
"""
# Numba infers these types when it compiles.
# mypy: ignore-errors

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mambapeft_kernels.numba_math import FAST, exp_not_positive, sigmoid, softplus

TILE = 64  # channels at a time: 16 states of them are 4 KiB in float32
CHUNK = 8  # steps between two kept states: 8 steps of 16 states of a tile are 32 KiB
LANES = 16  # partial sums of `_sum`


@intrinsic
def _on_stack(typingctx, dtype):
    """A pointer to `TILE` numbers in the caller's frame."""

    def generate(context, builder, signature, arguments):
        kind = context.get_data_type(dtype.dtype)
        return cgutils.alloca_once(builder, kind, size=TILE)

    return types.CPointer(dtype.dtype)(dtype), generate


@njit(inline="always")
def _row(dtype):
    """`TILE` numbers without values, on the stack.

    LLVM then knows that they overlap no other array. It checks for overlap before a loop, and gives up vectorising a
    loop that would need many such checks.
    """
    return carray(_on_stack(dtype), TILE)


@njit(forceinline=True, fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def _sum(values, lanes):
    """The sum of `TILE` values, in lanes and then in halves of them: the same order however it is compiled."""
    for k in range(LANES):
        lanes[k] = values[k]
    for start in range(LANES, TILE, LANES):
        for k in range(LANES):
            lanes[k] += values[start + k]
    for k in range(8):
        lanes[k] += lanes[k + 8]
    for k in range(4):
        lanes[k] += lanes[k + 4]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def _load(matrix, left, width, tile):
    """tile [N, TILE] = the columns of matrix [N, E] from `left` on; zeros beyond the last."""
    for n in range(matrix.shape[0]):
        for e in range(width):
            tile[n, e] = matrix[n, left + e]
        for e in range(width, TILE):
            tile[n, e] = 0


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def convolve(x, weight, bias, reverse, u, first, last):
    """u = silu(bias + causal depthwise convolution of the first E channels of x [B, L, >= E]); weight [K, E]."""
    taps, channels = weight.shape
    length = x.shape[1]
    for b in range(first, last):
        for s in range(length):
            t = length - 1 - s if reverse else s
            for e in range(channels):
                u[b, t, e] = bias[e]
            for k in range(taps):
                past = s - (taps - 1) + k
                if past >= 0:
                    p = length - 1 - past if reverse else past
                    for e in range(channels):
                        u[b, t, e] += weight[k, e] * x[b, p, e]
            for e in range(channels):
                u[b, t, e] = u[b, t, e] * sigmoid(u[b, t, e])


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def convolve_backward(x, weight, bias, reverse, du, need_dx, need_weight, dx, dweight, dbias, first, last):
    """Adds to dx [B, L, >= E]; dweight [B, K, E] and dbias [B, E] hold a sum for each sample. Overwrites du."""
    taps, channels = weight.shape
    length = x.shape[1]
    before, one = np.empty(channels, du.dtype), du.dtype.type(1)
    for b in range(first, last):
        for s in range(length):
            t = length - 1 - s if reverse else s
            for e in range(channels):
                before[e] = bias[e]
            for k in range(taps):
                past = s - (taps - 1) + k
                if past >= 0:
                    p = length - 1 - past if reverse else past
                    for e in range(channels):
                        before[e] += weight[k, e] * x[b, p, e]
            for e in range(channels):
                gate = sigmoid(before[e])
                du[b, t, e] *= gate * (one + before[e] * (one - gate))
            for k in range(taps):
                past = s - (taps - 1) + k
                if past >= 0:
                    p = length - 1 - past if reverse else past
                    if need_dx:
                        for e in range(channels):
                            dx[b, p, e] += weight[k, e] * du[b, t, e]
                    if need_weight:
                        for e in range(channels):
                            dweight[b, k, e] += x[b, p, e] * du[b, t, e]
            if need_weight:
                for e in range(channels):
                    dbias[b, e] += du[b, t, e]


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def scan(u, raw, dt_bias, A, projected, rank, D, reverse, initial, total, starts, first, last):
    """total += scan(u) + D u; starts [B, chunks, N, E] gets the state before each chunk.

    raw: [B, L, E], Δ before its bias and softplus; A: [N, E]; projected: [B, L, R + 2N], of which B and C are read;
    initial: [N, E], the state before the first step.
    """
    length, channels = u.shape[1], u.shape[2]
    states = A.shape[0]
    h, rates = np.empty((states, TILE), u.dtype), np.zeros((states, TILE), u.dtype)
    delta, scaled, out = _row(u.dtype), _row(u.dtype), _row(u.dtype)
    for b in range(first, last):
        for left in range(0, channels, TILE):
            width = min(TILE, channels - left)
            _load(initial, left, width, h)
            _load(A, left, width, rates)
            for e in range(TILE):
                delta[e] = 0
                scaled[e] = 0
            for s in range(length):
                t = length - 1 - s if reverse else s
                if s % CHUNK == 0:
                    for n in range(states):
                        for e in range(width):
                            starts[b, s // CHUNK, n, left + e] = h[n, e]
                for e in range(width):
                    delta[e] = softplus(raw[b, t, left + e] + dt_bias[left + e])
                for e in range(width):
                    scaled[e] = delta[e] * u[b, t, left + e]
                    out[e] = D[left + e] * u[b, t, left + e]
                for n in range(states):
                    to_state, from_state = projected[b, t, rank + n], projected[b, t, rank + states + n]
                    for e in range(TILE):
                        state = exp_not_positive(delta[e] * rates[n, e]) * h[n, e] + scaled[e] * to_state
                        h[n, e] = state
                        out[e] += from_state * state
                for e in range(width):
                    total[b, t, left + e] += out[e]


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def scan_backward(
    u,
    raw,
    dt_bias,
    A,
    projected,
    rank,
    D,
    reverse,
    starts,
    dy,
    need_A,
    need_initial,
    du,
    draw,
    dprojected,
    dA,
    dinitial,
    first,
    last,
):
    """Gradients of `scan`'s sum; states are computed again within one chunk at a time.

    du, draw [B, L, E] and B, C's columns of dprojected [B, L, R + 2N] are written; dA [B, N, E] is added to;
    dinitial [B, N, E] is written. With
    g_t = C_t dy_t + a_{t+1} g_{t+1}: dC = Σ_e dy h, dB = Σ_e g Δ u, du = Δ Σ_n g B + D dy,
    dΔ = u Σ_n g B + Σ_n g a h_{t-1} A, and draw = dΔ sigmoid(raw + bias).
    """
    length, channels = u.shape[1], u.shape[2]
    states = A.shape[0]
    h = np.zeros((CHUNK + 1, states, TILE), u.dtype)
    decay = np.empty((CHUNK, states, TILE), u.dtype)
    delta, scaled = np.zeros((CHUNK, TILE), u.dtype), np.zeros((CHUNK, TILE), u.dtype)
    carry, rates = np.empty((states, TILE), u.dtype), np.zeros((states, TILE), u.dtype)
    step, step_input, upstream = _row(u.dtype), _row(u.dtype), _row(u.dtype)
    from_states, through_A = _row(u.dtype), _row(u.dtype)
    to_products, from_products, lanes = _row(u.dtype), _row(u.dtype), _row(u.dtype)
    for b in range(first, last):
        for t in range(length):
            for n in range(rank, rank + 2 * states):
                dprojected[b, t, n] = 0
        for left in range(0, channels, TILE):
            width = min(TILE, channels - left)
            carry[:] = 0
            # Channels beyond the last one: zeros in, zeros out.
            h[:] = 0
            delta[:] = 0
            scaled[:] = 0
            _load(A, left, width, rates)
            for e in range(TILE):
                upstream[e] = 0
            for chunk in range(starts.shape[1] - 1, -1, -1):
                begin, end = chunk * CHUNK, min(length, (chunk + 1) * CHUNK)
                for n in range(states):
                    for e in range(width):
                        h[0, n, e] = starts[b, chunk, n, left + e]
                for s in range(begin, end):
                    t, i = length - 1 - s if reverse else s, s - begin
                    for e in range(width):
                        delta[i, e] = softplus(raw[b, t, left + e] + dt_bias[left + e])
                    for e in range(width):
                        scaled[i, e] = delta[i, e] * u[b, t, left + e]
                    for e in range(TILE):
                        step[e] = delta[i, e]
                        step_input[e] = scaled[i, e]
                    for n in range(states):
                        to_state = projected[b, t, rank + n]
                        for e in range(TILE):
                            a = exp_not_positive(step[e] * rates[n, e])
                            decay[i, n, e] = a
                            h[i + 1, n, e] = a * h[i, n, e] + step_input[e] * to_state
                for s in range(end - 1, begin - 1, -1):
                    t, i = length - 1 - s if reverse else s, s - begin
                    for e in range(width):
                        upstream[e] = dy[b, t, left + e]
                    for e in range(TILE):
                        step_input[e] = scaled[i, e]
                        from_states[e] = 0
                        through_A[e] = 0
                    for n in range(states):
                        to_state, from_state = projected[b, t, rank + n], projected[b, t, rank + states + n]
                        for e in range(TILE):
                            g = from_state * upstream[e] + carry[n, e]
                            from_products[e] = upstream[e] * h[i + 1, n, e]
                            to_products[e] = g * step_input[e]
                            from_states[e] += g * to_state
                            carried = decay[i, n, e] * g
                            carry[n, e] = carried
                            through_A[e] += carried * h[i, n, e] * rates[n, e]
                        dprojected[b, t, rank + n] += _sum(to_products, lanes)
                        dprojected[b, t, rank + states + n] += _sum(from_products, lanes)
                        if need_A:
                            for e in range(width):
                                dA[b, n, left + e] += carry[n, e] * h[i, n, e] * delta[i, e]
                    for e in range(width):
                        opened = sigmoid(raw[b, t, left + e] + dt_bias[left + e])
                        ddelta = u[b, t, left + e] * from_states[e] + through_A[e]
                        draw[b, t, left + e] = ddelta * opened
                        du[b, t, left + e] = delta[i, e] * from_states[e] + D[left + e] * dy[b, t, left + e]
            if need_initial:
                for n in range(states):
                    for e in range(width):
                        dinitial[b, n, left + e] = carry[n, e]


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def gate(total, z, column, scale, out, first, last):
    """out = scale silu(z) total; z [B, L, >= column + E], read from `column` on."""
    channels = total.shape[2]
    for b in range(first, last):
        for t in range(total.shape[1]):
            for e in range(channels):
                value = z[b, t, column + e]
                out[b, t, e] = scale * value * sigmoid(value) * total[b, t, e]


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)
def gate_backward(total, z, column, scale, dout, need_dz, dy, dz, dz_column, first, last):
    """dy = scale silu(z) dout, and dz into its columns from `dz_column` on."""
    channels, one = total.shape[2], total.dtype.type(1)
    for b in range(first, last):
        for t in range(total.shape[1]):
            for e in range(channels):
                value = z[b, t, column + e]
                opened = sigmoid(value)
                upstream = scale * dout[b, t, e]
                dy[b, t, e] = upstream * value * opened
                if need_dz:
                    dz[b, t, dz_column + e] = upstream * total[b, t, e] * opened * (one + value * (one - opened))
