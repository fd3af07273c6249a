"""exp, sigmoid and softplus that LLVM can vectorise, for loops that Numba compiles on a CPU.

Numba calls the C library for `math.exp`, one number at a time. These polynomials become part of the caller's loop, so
that a loop over channels runs in the CPU's vector units. tests/kernels/test_numba.py holds their accuracy.
"""
# Numba infers these types when it compiles.
# mypy: ignore-errors

import math

import numpy as np
from numba import float32, float64, int32, njit
from numba.extending import intrinsic, overload

# Multiply-adds may be fused. Nothing may be regrouped: it would undo the two-part subtraction of k ln 2, and the order
# of sums would depend on how a loop was compiled.
FAST = {"contract", "nsz"}


@intrinsic
def _floor(typingctx, x):
    """`math.floor` as a float: Numba's own returns an integer, whose conversion does not vectorise."""

    def generate(context, builder, signature, arguments):
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [arguments[0].type]), arguments)

    return x(x), generate


@intrinsic
def _as_float(typingctx, bits):
    """The float with these bits."""
    kind = float32 if bits == int32 else float64

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(kind))

    return kind(bits), generate


def _taylor(kind, degree):
    """1 / n! for n = degree … 2: (e^r - 1 - r) / r^2 by Horner's rule, |r| <= ln(2) / 2."""
    return tuple(kind(1.0 / math.factorial(n)) for n in range(degree, 1, -1))


_LOW32, _LOG2E32, _HALF32, _ONE32, _TWO32 = (np.float32(v) for v in (-87.0, 1.4426950408889634, 0.5, 1.0, 2.0))
_ZERO32 = np.float32(0.0)
_LN2_HIGH32, _LN2_LOW32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E0, _E1, _E2, _E3, _E4, _E5 = _taylor(np.float32, 7)
_D0, _D1, _D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10, _D11 = _taylor(np.float64, 13)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (np.float32(1.0 / n) for n in range(15, 0, -2))
_L64 = tuple(1.0 / n for n in range(33, 0, -2))


@njit(fastmath=FAST, error_model="numpy")
def _exp32(x):
    y = _LOW32 if x < _LOW32 else x
    k = _floor(y * _LOG2E32 + _HALF32)
    r = y - k * _LN2_HIGH32
    r = r - k * _LN2_LOW32
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    return (p * r * r + r + _ONE32) * _as_float(np.int32((np.int32(k) + np.int32(127)) << np.int32(23)))


@njit(fastmath=FAST, error_model="numpy")
def _exp64(x):
    y = -708.0 if x < -708.0 else x
    k = _floor(y * 1.4426950408889634 + 0.5)
    r = y - k * 6.93145751953125e-1
    r = r - k * 1.42860682030941723212e-6
    p = ((((_D0 * r + _D1) * r + _D2) * r + _D3) * r + _D4) * r + _D5
    p = (((((p * r + _D6) * r + _D7) * r + _D8) * r + _D9) * r + _D10) * r + _D11
    return (p * r * r + r + 1.0) * _as_float(np.int64((np.int64(k) + 1023) << 52))


@njit(fastmath=FAST, error_model="numpy")
def _log32(w):
    # ln(1 + w), 0 <= w <= 1, as 2 artanh(w / (2 + w)): a series whose ratio is at most 1/9.
    s = w / (_TWO32 + w)
    q = s * s
    p = ((((((_L0 * q + _L1) * q + _L2) * q + _L3) * q + _L4) * q + _L5) * q + _L6) * q + _L7
    return _TWO32 * s * p


@njit(fastmath=FAST, error_model="numpy")
def _log64(w):
    s = w / (2.0 + w)
    q = s * s
    p = _L64[0]
    for i in range(1, len(_L64)):
        p = p * q + _L64[i]
    return 2.0 * s * p


def exp_not_positive(x):
    """e^x for x <= 0. Below the smallest normal number it stays at that number; NaN stays NaN."""
    raise NotImplementedError("only within functions that Numba compiles")


@overload(exp_not_positive)
def _exp_not_positive(x):
    if x == float32:
        return lambda x: _exp32(x)
    return lambda x: _exp64(x)


def sigmoid(x):
    """1 / (1 + e^-x)."""
    raise NotImplementedError("only within functions that Numba compiles")


@njit(fastmath=FAST, error_model="numpy")
def _sigmoid32(x):
    t = _exp32(-abs(x))
    return (_ONE32 if x >= _ZERO32 else t) / (_ONE32 + t)


@njit(fastmath=FAST, error_model="numpy")
def _sigmoid64(x):
    t = _exp64(-abs(x))
    return (1.0 if x >= 0.0 else t) / (1.0 + t)


@overload(sigmoid)
def _sigmoid(x):
    if x == float32:
        return lambda x: _sigmoid32(x)
    return lambda x: _sigmoid64(x)


def softplus(x):
    """ln(1 + e^x)."""
    raise NotImplementedError("only within functions that Numba compiles")


@njit(fastmath=FAST, error_model="numpy")
def _softplus32(x):
    return (x if x > _ZERO32 else _ZERO32) + _log32(_exp32(-abs(x)))


@njit(fastmath=FAST, error_model="numpy")
def _softplus64(x):
    return (x if x > 0.0 else 0.0) + _log64(_exp64(-abs(x)))


@overload(softplus)
def _softplus(x):
    if x == float32:
        return lambda x: _softplus32(x)
    return lambda x: _softplus64(x)
