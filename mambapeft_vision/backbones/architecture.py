"""The sizes that a config or an adapter may give a backbone, checked before anything is built from them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.typed import check_arguments

# Far beyond any model; an adapter's config is untrusted, and its sizes must not cost hours or all memory.
LARGEST, DEEPEST = 16_384, 1_024


def check_sizes(kind: type[nn.Module], sizes: Mapping[str, Any]) -> None:
    """Raises UserError unless `sizes` are arguments of a `Vim` or `Vit` of the right type and in range."""
    if "num_classes" in sizes:
        raise UserError("backbone.num_classes is no size of a backbone; the task has dataset.num_classes")
    check_arguments(kind, sizes, "backbone")
    for key, value in sizes.items():
        if key == "img_size" and isinstance(value, (list, tuple)) and len(value) != 2:
            raise UserError(f"backbone.img_size={value}; expected [height, width], or one number for both")
        for number in value if isinstance(value, (list, tuple)) else [value]:
            _check_range(key, number)


def _check_range(key: str, number: Any) -> None:
    if number is None or isinstance(number, bool):
        return
    if key == "drop_path_rate":
        if not 0 <= number < 1:
            raise UserError(f"backbone.{key}={number}; expected 0 <= {key} < 1")
    elif key == "norm_eps":
        if not number > 0:
            raise UserError(f"backbone.{key}={number}; expected a number > 0")
    else:
        largest = DEEPEST if key == "depth" else LARGEST
        if not 1 <= number <= largest:
            raise UserError(f"backbone.{key}={number}; expected a whole number from 1 to {largest:,}")
