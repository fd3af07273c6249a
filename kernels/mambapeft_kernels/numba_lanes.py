"""Vectors of `LANES` channels as values of the loops that Numba compiles on a CPU.

LLVM's vectoriser decides for every loop anew, and often against it: for want of a proof that arrays do not overlap, for
a conversion, for a call. Here each operation is one of all lanes from the start. LLVM only splits it over the registers
of the CPU, so that a loop has one compiled form, and with it one order of additions.

    x = load(array, (b, t, left), width)          # lanes beyond `width` are zero
    store(array, (b, t, left), width, x * x + multiply_add(x, y, z))
"""
# Numba infers these types when it compiles.
# mypy: ignore-errors

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 64


class Lanes(types.Type):
    """The Numba type of a vector."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.dtype).get_value_type(), LANES))


def splat(builder, scalar, vector):
    """`scalar` in every lane."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _register(operation, instruction):
    @infer_global(operation)
    class _Typing(AbstractTemplate):
        def generic(self, arguments, keywords):
            if len(arguments) == 2 and isinstance(arguments[0], Lanes) and arguments[0] == arguments[1]:
                return signature(arguments[0], *arguments)

    @lower_builtin(operation, Lanes, Lanes)
    def lower(context, builder, signature, arguments):
        return getattr(builder, instruction)(*arguments)


for _operation, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _register(_operation, _instruction)


@intrinsic
def spread(typingctx, scalar):
    """`scalar` in every lane."""

    def generate(context, builder, signature, arguments):
        return splat(builder, arguments[0], context.get_value_type(signature.return_type))

    return Lanes(scalar)(scalar), generate


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a b + c, rounded once where the CPU has such an instruction."""

    def generate(context, builder, signature, arguments):
        return fused(builder, *arguments)

    return a(a, b, c), generate


def fused(builder, a, b, c):
    """The instruction of `multiply_add`."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{suffix(a.type)}")
    return builder.call(function, [a, b, c])


def suffix(vector):
    """The end of an LLVM intrinsic's name."""
    return f"v{vector.count}{vector.element.intrinsic_name}"


@intrinsic
def sum_lanes(typingctx, values):
    """The sum of all lanes: halves are added until one number is left."""

    def generate(context, builder, signature, arguments):
        (vector,) = arguments
        while vector.type.count > 1:
            half = vector.type.count // 2
            parts = [
                builder.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(start, start + half))),
                )
                for start in (0, half)
            ]
            vector = builder.fadd(*parts)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return values.dtype(values), generate


def _pointer(context, builder, array_type, array, index_type, index):
    """The address of an element as one of a vector that starts there."""
    indices = cgutils.unpack_tuple(builder, index) if isinstance(index_type, types.BaseTuple) else [index]
    kinds = index_type if isinstance(index_type, types.BaseTuple) else [index_type]
    indices = [context.cast(builder, i, kind, types.intp) for i, kind in zip(indices, kinds)]
    structure = context.make_array(array_type)(context, builder, array)
    element = cgutils.get_item_pointer(context, builder, array_type, structure, indices, wraparound=False)
    vector = context.get_value_type(Lanes(array_type.dtype))
    return builder.bitcast(element, vector.as_pointer()), vector, context.get_abi_sizeof(vector.element)


def _mask(builder, width, vector):
    """Whether a lane's number is below `width`."""
    numbers = ir.VectorType(width.type, vector.count)
    return builder.icmp_signed("<", ir.Constant(numbers, list(range(vector.count))), splat(builder, width, numbers))


@intrinsic
def _load_all(typingctx, array, index):
    def generate(context, builder, signature, arguments):
        pointer, _, align = _pointer(context, builder, signature.args[0], arguments[0], index, arguments[1])
        return builder.load(pointer, align=align)

    return Lanes(array.dtype)(array, index), generate


@intrinsic
def _load_some(typingctx, array, index, width):
    def generate(context, builder, signature, arguments):
        pointer, vector, align = _pointer(context, builder, signature.args[0], arguments[0], index, arguments[1])
        mask = _mask(builder, arguments[2], vector)
        kind = ir.FunctionType(vector, [pointer.type, ir.IntType(32), mask.type, vector])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.{suffix(vector)}.p0")
        zeros = ir.Constant(vector, [0.0] * vector.count)
        return builder.call(function, [pointer, ir.Constant(ir.IntType(32), align), mask, zeros])

    return Lanes(array.dtype)(array, index, width), generate


@intrinsic
def _store_all(typingctx, array, index, values):
    def generate(context, builder, signature, arguments):
        pointer, _, align = _pointer(context, builder, signature.args[0], arguments[0], index, arguments[1])
        builder.store(arguments[2], pointer, align=align)
        return context.get_dummy_value()

    return types.void(array, index, values), generate


@intrinsic
def _store_some(typingctx, array, index, width, values):
    def generate(context, builder, signature, arguments):
        pointer, vector, align = _pointer(context, builder, signature.args[0], arguments[0], index, arguments[1])
        mask = _mask(builder, arguments[2], vector)
        kind = ir.FunctionType(ir.VoidType(), [vector, pointer.type, ir.IntType(32), mask.type])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.{suffix(vector)}.p0")
        builder.call(function, [arguments[3], pointer, ir.Constant(ir.IntType(32), align), mask])
        return context.get_dummy_value()

    return types.void(array, index, width, values), generate


@njit(forceinline=True)
def load(array, index, width):
    """`LANES` elements of a contiguous array from `index` on; zeros beyond the first `width`, which are not read."""
    if width >= LANES:
        return _load_all(array, index)
    return _load_some(array, index, width)


@njit(forceinline=True)
def store(array, index, width, values):
    """Writes the first `width` lanes to a contiguous array from `index` on."""
    if width >= LANES:
        _store_all(array, index, values)
    else:
        _store_some(array, index, width, values)


@njit
def vectors(dtype, count):
    """[count, LANES] without values, where no vector crosses a line of the cache: that would take twice the time."""
    whole = np.empty(count * LANES + 64, dtype)
    start = -whole.ctypes.data % 64 // whole.itemsize
    return whole[start : start + count * LANES].reshape(count, LANES)
