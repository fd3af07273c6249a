"""Any adapter of weights as a LoRA: the change of every weight by its largest singular values and vectors.

The truncated decomposition is the nearest matrix of its rank (Eckart and Young, 1936).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.integrations.same_logits import difference
from mambapeft_vision.integrations.timm_folder import merge_all
from mambapeft_vision.methods.lora import LoRA
from mambapeft_vision.methods.targets import group_count
from mambapeft_vision.utils.errors import UserError

_UNCHANGED = 1e-7  # relative to a weight's norm: roundings of a merge


@dataclass(frozen=True)
class Approximation:
    """A LoRA that stands for another adapter.

    errors: relative error of every weight, ‖ΔW - LoRA‖ / ‖ΔW‖ (Frobenius).
    logits: largest difference of logits on random images, as a part of the largest logit.
    """

    model: AdaptedModel
    rank: int
    errors: dict[str, float]
    logits: float


@torch.no_grad()
def to_lora(model: AdaptedModel, base: TimmModel, *, energy: float = 0.99, rank: int | None = None) -> Approximation:
    """Decomposes the changes that a model's methods make to the backbone's weights.

    Args:
        model: the adapter; it is merged.
        base: another backbone with the same weights; the LoRA is attached to it.
        energy: part of the squared norm of every change that the rank keeps; the weight that needs most decides.
        rank: instead of `energy`.
    Raises: UserError for methods that change anything but matrices.
    """
    if not 0 < energy <= 1:
        raise UserError(f"energy={energy}; expected a number above 0, at most 1")
    merge_all(model, "a LoRA holds changes of weights alone")
    changes = _changes(model, base)
    singular = {name: torch.linalg.svd(change.double(), full_matrices=False) for name, change in changes.items()}
    needed = max((_rank_of(values, energy) for _, values, _ in singular.values()), default=1)
    rank = needed if rank is None else min(rank, max((v.shape[-1] for _, v, _ in singular.values()), default=1))
    method = LoRA(targets=list(changes), rank=rank, scale=1.0, space="weight")
    lora = adapt(cast(Any, base), {"lora": method} if changes else {}, model.backbone.num_classes)
    errors = {}
    for name, (left, values, right) in singular.items():
        pair, _ = method.pairs()[name]
        roots = values[..., :rank].sqrt()
        kept = roots.shape[-1]  # a small weight has fewer; `up` is zero behind them
        pair.matrix(pair.up)[..., :kept] = left[..., :rank] * roots[..., None, :]
        pair.matrix(pair.down)[..., :kept, :] = roots[..., :, None] * right[..., :rank, :]
        errors[name] = float(values[..., rank:].square().sum().sqrt() / values.square().sum().sqrt())
    lora.class_names, lora.multi_label = model.class_names, model.multi_label
    lora.backbone.head.load_state_dict(model.backbone.head.state_dict())
    return Approximation(lora, rank, errors, difference(model, lora.eval()))


def _changes(model: AdaptedModel, base: TimmModel) -> dict[str, Tensor]:
    """The change of every weight as matrices [..., out, in]. Raises UserError for one that LoRA cannot have."""
    before = dict(base.named_parameters())
    changes, others = {}, []
    for name, after in cast(nn.Module, model.backbone).named_parameters():
        if name.startswith("head."):
            continue
        weight = before[name]
        if weight.shape != after.shape:
            others.append(name)
            continue
        change = after - weight
        if change.norm() <= _UNCHANGED * weight.norm():
            continue
        module = base.get_submodule(name.rpartition(".")[0])
        grouped = group_count(cast(Any, base), name) is not None
        if grouped:
            changes[name] = change
        elif name.endswith(".weight") and isinstance(module, (nn.Linear, nn.Conv2d)):
            changes[name] = change.flatten(1)
        else:
            others.append(name)
    if others:
        raise UserError(
            f"a LoRA changes matrices alone, but the adapter also changes {', '.join(others[:3])}"
            f"{' …' if len(others) > 3 else ''}; export it merged: --to timm or --to official"
        )
    return changes


def _rank_of(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps `energy` of Σσ²; of several matrices, that of the one which needs most."""
    kept = values.square().cumsum(-1)
    enough = kept >= energy * kept[..., -1:] * (1 - 1e-12)
    return int(enough.int().argmax(-1).max()) + 1
