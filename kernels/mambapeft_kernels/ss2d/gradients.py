"""The last step of the backends' gradients."""

from torch import Tensor


def summed(out: dict[str, Tensor], need: dict[str, bool], batch: int, segments: int) -> dict[str, Tensor]:
    """The gradients that `need` names, summed over their parts."""
    for name in ("proj", "weight", "bias", "A", "offset"):
        if need[name]:
            out[name] = out[name][0] if len(out[name]) == 1 else out[name].sum(0)
    if need["first"]:
        out["first"] = out["first"].unflatten(0, (batch, segments))[:, 0].sum(0)
    return out
