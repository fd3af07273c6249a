"""Linear probing: the baseline that trains the classification head alone."""

from typing import Any

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.methods.method import Method


class LinearProbe(Method):
    """Adds and trains nothing; the head, which every method trains, is all there is."""

    def attach(self, model: Backbone) -> None:
        """Nothing to attach."""

    def param_groups(self) -> list[dict[str, Any]]:
        return []
