"""Residual add, drop path and RMSNorm in loops that Numba compiles for CPUs, forward and backward.

As in ssm_mixer/numba_loops.py: a call covers the samples first … last - 1; arrays are contiguous and of one dtype.
"""
# Numba infers these types when it compiles.
# mypy: ignore-errors

import numpy as np

from mambapeft_kernels.numba_lanes import LANES, load, multiply_add, spread, store, sum_lanes
from mambapeft_kernels.numba_loop import loop


@loop
def normalise(hidden, residual, has_residual, scale, weight, eps, total, normed, first, last):
    """total = residual + scale hidden; normed = total / sqrt(mean(total²) + eps) weight. scale [B], weight [D]."""
    width, one = hidden.shape[2], eps.dtype.type(1)
    zero, size = spread(eps.dtype.type(0)), eps.dtype.type(width)
    for b in range(first, last):
        factor = spread(scale[b])
        for t in range(hidden.shape[1]):
            squares = zero
            for left in range(0, width, LANES):
                value = factor * load(hidden, (b, t, left), width - left)
                if has_residual:
                    value = value + load(residual, (b, t, left), width - left)
                store(total, (b, t, left), width - left, value)
                squares = multiply_add(value, value, squares)
            inverse = spread(one / np.sqrt(sum_lanes(squares) / size + eps[0]))
            for left in range(0, width, LANES):
                value = load(total, (b, t, left), width - left) * inverse
                store(normed, (b, t, left), width - left, value * load(weight, left, width - left))


@loop
def normalise_backward(dnormed, dtotal, total, weight, eps, dresidual, dweight, first, last):
    """Gradients of `normalise`, of which dtotal is total's own; adds to dweight [B, D], a sum for each sample.

    With q = dnormed weight and ρ = (mean(total²) + eps)^(-1/2): dresidual = dtotal + ρ (q - total ρ² mean(q total)).
    """
    width, one = total.shape[2], eps.dtype.type(1)
    zero, size = spread(eps.dtype.type(0)), eps.dtype.type(width)
    for b in range(first, last):
        for t in range(total.shape[1]):
            squares, products = zero, zero
            for left in range(0, width, LANES):
                value = load(total, (b, t, left), width - left)
                q = load(dnormed, (b, t, left), width - left) * load(weight, left, width - left)
                squares, products = multiply_add(value, value, squares), multiply_add(q, value, products)
            square = one / (sum_lanes(squares) / size + eps[0])
            inverse, slope = spread(np.sqrt(square)), spread(square * sum_lanes(products) / size)
            for left in range(0, width, LANES):
                value = load(total, (b, t, left), width - left)
                upstream = load(dnormed, (b, t, left), width - left)
                own = multiply_add(upstream * value, inverse, load(dweight, (b, left), width - left))
                store(dweight, (b, left), width - left, own)
                inner = upstream * load(weight, left, width - left) - value * slope
                found = multiply_add(inner, inverse, load(dtotal, (b, t, left), width - left))
                store(dresidual, (b, t, left), width - left, found)
