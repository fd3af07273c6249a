"""The loops of the compiled CPU backend: convolution, scan and gate, forward and backward.

Every loop works on vectors of `LANES` channels (numba_lanes.py). A call covers the samples first … last - 1 of a batch,
so that threads share a batch without writing to the same place.
All arrays are contiguous and of one dtype; beside an integer literal Numba would compute in float64.
Time runs from the last token to the first where `reverse` is set: step s reads token t = L - 1 - s.
"""
# Numba infers these types when it compiles.
# mypy: ignore-errors

from mambapeft_kernels.numba_lanes import LANES, load, multiply_add, spread, store, sum_lanes, vectors
from mambapeft_kernels.numba_loop import inlined, loop
from mambapeft_kernels.numba_math import LN2, LOG2E, exp2_not_positive, sigmoid, softplus

CHUNK = 8  # steps between two kept states


@inlined
def _convolved(x, weight, bias, reverse, b, s, left, width):
    """Step s of bias + the causal convolution, for the channels from `left` on."""
    taps, length = weight.shape[0], x.shape[1]
    found = load(bias, left, width)
    for k in range(max(0, taps - 1 - s), taps):
        past = s - (taps - 1) + k
        p = length - 1 - past if reverse else past
        found = multiply_add(load(weight, (k, left), width), load(x, (b, p, left), width), found)
    return found


@loop
def convolve(x, weight, bias, reverse, u, first, last):
    """u = silu(bias + causal depthwise convolution of the first E channels of x [B, L, >= E]); weight [K, E]."""
    channels, length = weight.shape[1], x.shape[1]
    for b in range(first, last):
        for s in range(length):
            t = length - 1 - s if reverse else s
            for left in range(0, channels, LANES):
                width = min(LANES, channels - left)
                before = _convolved(x, weight, bias, reverse, b, s, left, width)
                store(u, (b, t, left), width, before * sigmoid(before))


@loop
def convolve_backward(x, weight, bias, reverse, du, need_dx, need_weight, add, dx, dweight, dbias, first, last):
    """Writes (or adds to) dx [B, L, >= E]; adds a sum for each sample to dweight [B, K, E] and dbias [B, E].

    Overwrites du.
    """
    taps, channels = weight.shape
    length = x.shape[1]
    zero, one = spread(du.dtype.type(0)), spread(du.dtype.type(1))
    for b in range(first, last):
        for s in range(length):
            t = length - 1 - s if reverse else s
            for left in range(0, channels, LANES):
                width = min(LANES, channels - left)
                before = _convolved(x, weight, bias, reverse, b, s, left, width)
                gate = sigmoid(before)
                dbefore = load(du, (b, t, left), width) * gate * multiply_add(before, one - gate, one)
                store(du, (b, t, left), width, dbefore)
                if need_weight:
                    for k in range(max(0, taps - 1 - s), taps):
                        past = s - (taps - 1) + k
                        p = length - 1 - past if reverse else past
                        own = load(dweight, (b, k, left), width)
                        own = multiply_add(load(x, (b, p, left), width), dbefore, own)
                        store(dweight, (b, k, left), width, own)
                    store(dbias, (b, left), width, load(dbias, (b, left), width) + dbefore)
        if need_dx:
            for s in range(length):
                t = length - 1 - s if reverse else s
                for left in range(0, channels, LANES):
                    width = min(LANES, channels - left)
                    found = load(dx, (b, t, left), width) if add else zero
                    for k in range(max(0, taps + s - length), taps):
                        future = s + (taps - 1) - k
                        f = length - 1 - future if reverse else future
                        found = multiply_add(load(weight, (k, left), width), load(du, (b, f, left), width), found)
                    store(dx, (b, t, left), width, found)


@loop
def _tiled(matrix, factor):
    """factor · matrix [K, E] as [tiles, K, LANES]; zeros beyond the last channel."""
    rows, channels = matrix.shape
    tiles = (channels + LANES - 1) // LANES
    found = vectors(matrix.dtype, tiles * rows).reshape(tiles, rows, LANES)
    for tile in range(tiles):
        for k in range(rows):
            own = load(matrix, (k, tile * LANES), channels - tile * LANES)
            store(found, (tile, k, 0), LANES, own * spread(matrix.dtype.type(factor)))
    return found


@inlined
def _before_softplus(projected, dt_weight, bias, tile, b, t):
    """dt_proj's output for one tile of channels; dt_weight [tiles, R, LANES]."""
    for r in range(dt_weight.shape[1]):
        bias = multiply_add(spread(projected[b, t, r]), load(dt_weight, (tile, r, 0), LANES), bias)
    return bias


@loop
def scan(u, dt_weight, dt_bias, A, projected, D, reverse, initial, add, total, starts, first, last):
    """total = (total +) scan(u) + D u; starts [B, chunks, N, E] gets the state before each chunk, unless it is empty.

    dt_weight: [R, E]; A: [N, E]; projected: [B, L, R + 2N], the input of dt_proj, B and C;
    initial: [N, E], the state before the first step.
    """
    length, channels = u.shape[1], u.shape[2]
    rank, states = dt_weight.shape[0], A.shape[0]
    rates, weight = _tiled(A, LOG2E), _tiled(dt_weight, 1)  # with these rates decays are powers of two
    tiles = rates.shape[0]
    h = vectors(u.dtype, tiles * states).reshape(tiles, states, LANES)
    delta, zero = vectors(u.dtype, CHUNK), spread(u.dtype.type(0))
    for b in range(first, last):
        for chunk in range((length + CHUNK - 1) // CHUNK):
            begin, steps = chunk * CHUNK, min(CHUNK, length - chunk * CHUNK)
            for tile in range(tiles):
                left = tile * LANES
                width = min(LANES, channels - left)
                for n in range(states):
                    if chunk == 0:
                        store(h, (tile, n, 0), LANES, load(initial, (n, left), width))
                    if starts.size > 0:
                        store(starts, (b, chunk, n, left), width, load(h, (tile, n, 0), LANES))
                bias, skip = load(dt_bias, left, width), load(D, left, width)
                for i in range(steps):
                    t = length - 1 - begin - i if reverse else begin + i
                    store(delta, (i, 0), LANES, softplus(_before_softplus(projected, weight, bias, tile, b, t)))
                for i in range(steps):
                    t = length - 1 - begin - i if reverse else begin + i
                    value, step = load(u, (b, t, left), width), load(delta, (i, 0), LANES)
                    scaled = step * value
                    out = multiply_add(skip, value, load(total, (b, t, left), width) if add else zero)
                    for n in range(states):
                        a = exp2_not_positive(step * load(rates, (tile, n, 0), LANES))
                        entering = scaled * spread(projected[b, t, rank + n])
                        state = multiply_add(a, load(h, (tile, n, 0), LANES), entering)
                        store(h, (tile, n, 0), LANES, state)
                        out = multiply_add(spread(projected[b, t, rank + states + n]), state, out)
                    store(total, (b, t, left), width, out)


@loop
def scan_backward(
    u,
    dt_weight,
    dt_bias,
    A,
    projected,
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
    dD,
    ddt_bias,
    dinitial,
    first,
    last,
):
    """Gradients of `scan`'s sum; states are computed again within one chunk at a time.

    du, draw [B, L, E] (of dt_proj's output) and B, C's columns of dprojected [B, L, R + 2N] are written; dA [B, N, E],
    dD and ddt_bias [B, E] are added to; dinitial [B, N, E] is written. With
    g_t = C_t dy_t + a_{t+1} g_{t+1}: dC = Σ_e dy h, dB = Σ_e g Δ u, du = Δ Σ_n g B + D dy,
    dΔ = u Σ_n g B + Σ_n g a h_{t-1} A, and draw = dΔ sigmoid(dt_proj's output + bias).
    """
    length, channels = u.shape[1], u.shape[2]
    rank, states = dt_weight.shape[0], A.shape[0]
    rates, weight = _tiled(A, LOG2E), _tiled(dt_weight, 1)
    tiles = rates.shape[0]
    carry = vectors(u.dtype, tiles * states).reshape(tiles, states, LANES)
    # Of one chunk and tile; the sums over channels, of one chunk.
    h, decay = vectors(u.dtype, CHUNK + 1), vectors(u.dtype, CHUNK)
    delta, scaled = vectors(u.dtype, CHUNK), vectors(u.dtype, CHUNK)
    opened, upstream = vectors(u.dtype, CHUNK), vectors(u.dtype, CHUNK)
    from_states, through_A = vectors(u.dtype, CHUNK), vectors(u.dtype, CHUNK)
    sums = vectors(u.dtype, 2 * states * CHUNK).reshape(2 * states, CHUNK, LANES)
    zero, ln2 = spread(u.dtype.type(0)), spread(u.dtype.type(LN2))
    for b in range(first, last):
        carry[:] = 0
        for chunk in range(starts.shape[1] - 1, -1, -1):
            begin, steps = chunk * CHUNK, min(CHUNK, length - chunk * CHUNK)
            sums[:] = 0
            for tile in range(tiles):
                left = tile * LANES
                width = min(LANES, channels - left)
                bias, skip = load(dt_bias, left, width), load(D, left, width)
                for i in range(steps):
                    t = length - 1 - begin - i if reverse else begin + i
                    before = _before_softplus(projected, weight, bias, tile, b, t)
                    step = softplus(before)
                    store(delta, (i, 0), LANES, step)
                    store(opened, (i, 0), LANES, sigmoid(before))
                    store(scaled, (i, 0), LANES, step * load(u, (b, t, left), width))
                    store(upstream, (i, 0), LANES, load(dy, (b, t, left), width))
                    store(from_states, (i, 0), LANES, zero)
                    store(through_A, (i, 0), LANES, zero)
                for n in range(states):
                    rate = load(rates, (tile, n, 0), LANES)
                    state = load(starts, (b, chunk, n, left), width)
                    store(h, (0, 0), LANES, state)
                    for i in range(steps):
                        t = length - 1 - begin - i if reverse else begin + i
                        a = exp2_not_positive(load(delta, (i, 0), LANES) * rate)
                        entering = load(scaled, (i, 0), LANES) * spread(projected[b, t, rank + n])
                        state = multiply_add(a, state, entering)
                        store(decay, (i, 0), LANES, a)
                        store(h, (i + 1, 0), LANES, state)
                    carried, own = load(carry, (tile, n, 0), LANES), zero
                    for i in range(steps - 1, -1, -1):
                        t = length - 1 - begin - i if reverse else begin + i
                        arriving = load(upstream, (i, 0), LANES)
                        g = multiply_add(spread(projected[b, t, rank + states + n]), arriving, carried)
                        to_B = multiply_add(g, load(scaled, (i, 0), LANES), load(sums, (n, i, 0), LANES))
                        store(sums, (n, i, 0), LANES, to_B)
                        to_C = load(sums, (states + n, i, 0), LANES)
                        to_C = multiply_add(arriving, load(h, (i + 1, 0), LANES), to_C)
                        store(sums, (states + n, i, 0), LANES, to_C)
                        inputs = load(from_states, (i, 0), LANES)
                        inputs = multiply_add(spread(projected[b, t, rank + n]), g, inputs)
                        store(from_states, (i, 0), LANES, inputs)
                        carried = load(decay, (i, 0), LANES) * g
                        through = carried * load(h, (i, 0), LANES)
                        store(through_A, (i, 0), LANES, multiply_add(through, rate, load(through_A, (i, 0), LANES)))
                        own = multiply_add(through, load(delta, (i, 0), LANES), own)
                    store(carry, (tile, n, 0), LANES, carried)
                    if need_A:
                        store(dA, (b, n, left), width, load(dA, (b, n, left), width) + own)
                to_D, to_bias = load(dD, (b, left), width), load(ddt_bias, (b, left), width)
                for i in range(steps):
                    t = length - 1 - begin - i if reverse else begin + i
                    inputs, arriving = load(from_states, (i, 0), LANES), load(upstream, (i, 0), LANES)
                    value = load(u, (b, t, left), width)
                    ddelta = value * inputs + load(through_A, (i, 0), LANES) * ln2
                    dbefore = ddelta * load(opened, (i, 0), LANES)
                    to_D, to_bias = multiply_add(arriving, value, to_D), to_bias + dbefore
                    store(draw, (b, t, left), width, dbefore)
                    store(du, (b, t, left), width, multiply_add(load(delta, (i, 0), LANES), inputs, skip * arriving))
                store(dD, (b, left), width, to_D)
                store(ddt_bias, (b, left), width, to_bias)
            for i in range(steps):
                t = length - 1 - begin - i if reverse else begin + i
                for n in range(2 * states):
                    dprojected[b, t, rank + n] = sum_lanes(load(sums, (n, i, 0), LANES))
        if need_initial:
            for tile in range(tiles):
                left = tile * LANES
                for n in range(states):
                    store(dinitial, (b, n, left), min(LANES, channels - left), load(carry, (tile, n, 0), LANES))


@loop
def gate(total, z, column, scale, out, first, last):
    """out = scale silu(z) total; z [B, L, >= column + E], read from `column` on."""
    channels, factor = total.shape[2], spread(scale)
    for b in range(first, last):
        for t in range(total.shape[1]):
            for left in range(0, channels, LANES):
                width = min(LANES, channels - left)
                value = load(z, (b, t, column + left), width)
                found = factor * value * sigmoid(value) * load(total, (b, t, left), width)
                store(out, (b, t, left), width, found)


@loop
def gate_backward(total, z, column, scale, dout, need_dz, dy, dz, dz_column, first, last):
    """dy = scale silu(z) dout, and dz into its columns from `dz_column` on."""
    channels, factor, one = total.shape[2], spread(scale), spread(total.dtype.type(1))
    for b in range(first, last):
        for t in range(total.shape[1]):
            for left in range(0, channels, LANES):
                width = min(LANES, channels - left)
                value = load(z, (b, t, column + left), width)
                opened = sigmoid(value)
                upstream = factor * load(dout, (b, t, left), width)
                store(dy, (b, t, left), width, upstream * value * opened)
                if need_dz:
                    slope = opened * multiply_add(value, one - opened, one)
                    found = upstream * load(total, (b, t, left), width) * slope
                    store(dz, (b, t, dz_column + left), width, found)
