"""The shared part of the published codes that `load_reference` reads: one of their switches is one of our methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mambapeft_vision.methods.method import Method
from mambapeft_vision.utils.errors import UserError

#: Our names of a token generator's tensors → the published code's.
GENERATOR = {
    "table": "embedding.weight",
    "embedding": "embedding.weight",
    "fc1.weight": "transform.0.weight",
    "fc1.bias": "transform.0.bias",
    "fc2.weight": "transform.2.weight",
    "fc2.bias": "transform.2.bias",
}


@dataclass(frozen=True)
class Part:
    """One of our methods, and how its tensors are called in the reference."""

    name: str
    method: Method
    rename: Callable[[str], str]  # our tensor's name within the method → the reference's, without prefix
    trained: bool = True

    def reference_name(self, prefix: str, key: str) -> str:
        return prefix + self.rename(key)

    def references(self, prefix: str) -> set[str]:
        return {self.reference_name(prefix, key) for key in self.method.owned()}


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The published code's arguments, with its defaults for missing ones. Raises UserError for unknown ones."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UserError(f"{what}: unknown argument(s) {', '.join(unknown)}; known: {', '.join(sorted(defaults))}")
    return {**defaults, **given}
