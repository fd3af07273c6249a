"""Methods' sizes on other backbones than Vim-S, for which the presets are written.

With `method_sizes=of_vim_s` a size is a share of Vim-S and stays that share: ranks, adapter widths and numbers of
blocks in proportion to the channels of the scan (d_inner, 768 in Vim-S; the mean over the blocks of a backbone with
stages), extra states in proportion to the states (d_state, 16 in Vim-S); rounded, at least 1. Numbers of tokens stay,
because they are no width. An alpha is scaled with its rank, because alpha / rank is the scale of a branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.utils.errors import UserError

CHANNELS, STATES = 768, 16  # Vim-S's
BY_CHANNELS = ("rank", "dim", "n_blocks", "hidden")
BY_STATES = ("states",)
SIZES = (*BY_CHANNELS, *BY_STATES)


def scaled(methods: Mapping[str, Mapping[str, Any]], backbone: Backbone) -> dict[str, dict[str, Any]]:
    """The methods' specs with their sizes scaled from Vim-S to `backbone`. Raises UserError where it is no Vim."""
    if not backbone.mixers:
        raise UserError(
            f"method_sizes=of_vim_s: {type(backbone).__name__} has no channels and states of a scan to compare with "
            "Vim-S's; expected a state-space backbone, or method_sizes=given"
        )
    channels = fmean(mixer.d_inner for mixer in backbone.mixers)
    shares = dict.fromkeys(BY_CHANNELS, channels / CHANNELS)
    shares |= dict.fromkeys(BY_STATES, backbone.mixers[0].d_state / STATES)
    found: dict[str, Any] = dict(methods)
    for name, spec in methods.items():
        if not isinstance(spec, Mapping):  # for build_method to refuse
            continue
        found[name] = {key: _share(value, shares[key]) if key in shares else value for key, value in spec.items()}
        if isinstance(spec.get("alpha"), (int, float)) and isinstance(spec.get("rank"), int) and spec["rank"] >= 1:
            found[name]["alpha"] = spec["alpha"] * found[name]["rank"] / spec["rank"]
    return found


def _share(size: Any, share: float) -> Any:
    """A size times `share`. Anything but a whole number is returned unchanged; the method refuses it."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        return size
    return max(1, round(size * share))
