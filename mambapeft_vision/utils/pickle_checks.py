"""Pickles of PyTorch's files, looked through before PyTorch reads them.

PyTorch's restricted unpickler runs no code of a file, but some of its functions take as much memory as the file asks
for: `bytearray(10**10)`, or a long list that is copied again and again. So a pickle is first read with stand-ins for
every function that it can call, and the stand-ins make nothing.
"""

import pickle
import pickletools
from collections import OrderedDict
from typing import Any, BinaryIO

MAX_OPERATIONS = 5_000_000  # a checkpoint of a thousand tensors has some 50,000
# Names that PyTorch's restricted unpickler allows, too. Others could ask for memory by their argument alone.
_OPERATIONS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
    *("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING"),
}
_KNOWN = {
    "collections OrderedDict",
    "argparse Namespace",
    "torch Size",
    "torch device",
    "torch.nn.parameter Parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.serialization _get_layout",
}
_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_KNOWN |= {f"torch {kind}Storage" for kind in _KINDS}
_KNOWN |= {f"torch {kind}" for kind in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")}
_PUTS = ("BINPUT", "LONG_BINPUT")


def check_pickle(opened: BinaryIO) -> None:
    """Reads one pickle from where the file stands, up to its end.

    Raises:
        pickle.UnpicklingError: for one that holds more than tensors and plain data.
        Exception: whatever Python's unpickler raises on damaged bytes.
    """
    start = opened.tell()
    for number, (operation, argument, _) in enumerate(pickletools.genops(opened)):
        if number > MAX_OPERATIONS or operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"{operation.name} at {number}")
        if operation.name == "GLOBAL" and argument not in _KNOWN:
            raise pickle.UnpicklingError(str(argument))
        if operation.name in _PUTS and (argument or 0) > number:  # Python's unpickler makes room for all places below
            raise pickle.UnpicklingError(f"{operation.name} {argument}")
    opened.seek(start)
    _Rehearsal(opened).load()


class _Empty(OrderedDict[Any, Any]):
    """For an OrderedDict, which is made empty and filled afterwards."""

    def __new__(cls, *given: Any) -> "_Empty":
        if given:
            raise pickle.UnpicklingError("an OrderedDict of a list")
        return super().__new__(cls)


class _StandIn:
    """Replaces every function that a pickle calls; takes anything and keeps nothing."""

    def __new__(cls, *_: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Rehearsal(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        return _Empty if name == "OrderedDict" else _StandIn

    def persistent_load(self, _: Any) -> _StandIn:
        return _StandIn()
