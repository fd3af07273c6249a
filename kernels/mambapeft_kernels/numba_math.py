"""Decay, sigmoid and softplus of vectors of channels, as instructions that LLVM puts into the caller's loop.

The C library's functions take one number at a time. These take `numba_lanes.LANES`; tests/kernels/test_numba.py holds
their accuracy. Their polynomials interpolate at Chebyshev's nodes, where the error is at most a few times the least.
"""
# Numba infers these types when it compiles.
# mypy: ignore-errors

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from mambapeft_kernels.numba_lanes import fused, suffix

LOG2E, LN2 = math.log2(math.e), math.log(2)


def _interpolated(function, low, high, degree):
    """Coefficients, constant first, of the polynomial that meets `function` at Chebyshev's nodes of [low, high].

    Exact but for the function's values, which have 40 digits: sums of powers magnify errors.
    """
    angles = [math.pi * (k + 0.5) / (degree + 1) for k in range(degree + 1)]
    nodes = [Fraction((low + high) / 2 + (high - low) / 2 * math.cos(angle)) for angle in angles]
    with localcontext() as context:
        context.prec = 40
        differences = [Fraction(function(Decimal(x.numerator) / x.denominator)) for x in nodes]
    for order in range(1, degree + 1):  # Newton's divided differences
        for i in range(degree, order - 1, -1):
            differences[i] = (differences[i] - differences[i - 1]) / (nodes[i] - nodes[i - order])
    powers = [differences[-1]]
    for difference, node in zip(differences[-2::-1], nodes[-2::-1]):  # powers (x - node) + difference
        powers = [a - node * b for a, b in zip([Fraction(0), *powers], [*powers, Fraction(0)])]
        powers[0] += difference
    return [float(c) for c in powers]


class _Format:
    """A floating-point format: its layout and polynomials of its accuracy."""

    def __init__(self, mantissa, least, ln2, degrees, newton):
        self.mantissa = mantissa  # bits
        self.least = least  # log2 of the least decay
        self.magic = 1.5 * 2.0**mantissa  # x + magic has the integer next to x in its last bits
        self.ln2_high, self.ln2_low = ln2  # k ln2_high is exact
        exp2, exp, log = degrees
        self.exp2 = _interpolated(lambda f: (2**f - 1) / f, -0.5, 0.5, exp2)  # 2^f = 1 + f p(f)
        self.exp = _interpolated(lambda r: (r.exp() - 1 - r) / r**2, -0.3466, 0.3466, exp)  # 1 + r + r² p(r)
        self.log = _interpolated(lambda v: (1 + v).ln() / v, -0.2929, 0.4143, log)  # ln(1 + v) = v p(v)
        self.reciprocal = _interpolated(lambda d: 1 / d, 1.0, 2.0, 2)
        self.newton = newton  # steps: each doubles the digits of 1 / d


@cache
def _format(bits):
    if bits == 32:
        return _Format(23, -126.0, (0.693359375, -2.12194440e-4), (5, 5, 9), 2)
    return _Format(52, -1022.0, (6.93145751953125e-1, 1.42860682030941723212e-6), (11, 11, 21), 3)


class _Vector:
    """Writes instructions for vectors of one type."""

    def __init__(self, builder, kind):
        self.builder, self.kind = builder, kind
        self.bits = 32 if isinstance(kind.element, ir.FloatType) else 64
        self.format = _format(self.bits)
        self.integers = ir.VectorType(ir.IntType(self.bits), kind.count)

    def constant(self, value):
        return ir.Constant(self.kind, [value] * self.kind.count)

    def polynomial(self, x, coefficients):
        """Horner's rule."""
        found = self.constant(coefficients[-1])
        for c in coefficients[-2::-1]:
            found = fused(self.builder, found, x, self.constant(c))
        return found

    def at_least(self, x, low):
        """x or `low`; NaN stays NaN."""
        return self.builder.select(self.builder.fcmp_ordered("<", x, self.constant(low)), self.constant(low), x)

    def nearest(self, x):
        """The integer next to x as a float, and as the last bits of a number."""
        shifted = self.builder.fadd(x, self.constant(self.format.magic))
        return self.builder.fsub(shifted, self.constant(self.format.magic)), shifted

    def scaled(self, p, shifted):
        """p 2^k, where k is in the last bits of `shifted`: added to the exponent of p."""
        k = self.builder.bitcast(shifted, self.integers)
        k = self.builder.shl(k, ir.Constant(self.integers, [self.format.mantissa] * self.kind.count))
        return self.builder.bitcast(self.builder.add(self.builder.bitcast(p, self.integers), k), self.kind)

    def exp2_not_positive(self, y):
        y = self.at_least(y, self.format.least)
        k, shifted = self.nearest(y)
        f = self.builder.fsub(y, k)
        p = fused(self.builder, self.polynomial(f, self.format.exp2), f, self.constant(1.0))
        return self.scaled(p, shifted)

    def exp_minus_absolute(self, x):
        x = self.builder.fneg(self._absolute(x))
        x = self.at_least(x, self.format.least * LN2)
        k, shifted = self.nearest(self.builder.fmul(x, self.constant(LOG2E)))
        k = self.builder.fneg(k)
        r = fused(self.builder, k, self.constant(self.format.ln2_high), x)
        r = fused(self.builder, k, self.constant(self.format.ln2_low), r)
        p = fused(self.builder, self.polynomial(r, self.format.exp), r, self.constant(1.0))
        return self.scaled(fused(self.builder, p, r, self.constant(1.0)), shifted)

    def reciprocal(self, d):
        """1 / d, 1 <= d <= 2: a division takes as long as twenty multiplications."""
        found, minus = self.polynomial(d, self.format.reciprocal), self.builder.fneg(d)
        for _ in range(self.format.newton):
            error = fused(self.builder, minus, found, self.constant(1.0))
            found = fused(self.builder, found, error, found)
        return found

    def sigmoid(self, x):
        t = self.exp_minus_absolute(x)
        r = self.reciprocal(self.builder.fadd(t, self.constant(1.0)))
        return self.builder.select(self._negative(x), self.builder.fmul(t, r), r)

    def softplus(self, x):
        t = self.exp_minus_absolute(x)
        # ln(1 + t) = ln 2 + ln(1 + (t - 1) / 2) for large t.
        large = self.builder.fcmp_ordered(">", t, self.constant(math.sqrt(2) - 1))
        half = fused(self.builder, t, self.constant(0.5), self.constant(-0.5))
        v = self.builder.select(large, half, t)
        start = self.builder.select(large, self.constant(LN2), self.constant(0.0))
        log = fused(self.builder, self.polynomial(v, self.format.log), v, start)
        return self.builder.fadd(self.builder.select(self._negative(x), self.constant(0.0), x), log)

    def _negative(self, x):
        return self.builder.fcmp_ordered("<", x, self.constant(0.0))

    def _absolute(self, x):
        kind = ir.FunctionType(self.kind, [self.kind])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fabs.{suffix(self.kind)}")
        return self.builder.call(function, [x])


@intrinsic
def exp2_not_positive(typingctx, y):
    """2^y for y <= 0. Below the smallest normal number it stays at that number; NaN stays NaN."""

    def generate(context, builder, signature, arguments):
        return _Vector(builder, arguments[0].type).exp2_not_positive(*arguments)

    return y(y), generate


@intrinsic
def sigmoid(typingctx, x):
    """1 / (1 + e^-x)."""

    def generate(context, builder, signature, arguments):
        return _Vector(builder, arguments[0].type).sigmoid(*arguments)

    return x(x), generate


@intrinsic
def softplus(typingctx, x):
    """ln(1 + e^x)."""

    def generate(context, builder, signature, arguments):
        return _Vector(builder, arguments[0].type).softplus(*arguments)

    return x(x), generate
