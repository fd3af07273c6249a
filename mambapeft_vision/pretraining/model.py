"""The pretrained model: one backbone with a linear head for each source; its running average; its kernel."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import mambapeft_kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapeft_vision.utils.errors import UserError

# A kernel's result may differ from the definition's by this share (float32; Triton's products are in tf32).
AGREEMENT = 5e-3


class SharedBackbone(nn.Module):
    """[b, 3, H, W] → one tensor of logits for each source, from its own part of the batch.

    Args:
        teacher_features: width of the features that `project` predicts; None: there is no projection.
    """

    backbone: Any

    def __init__(self, backbone: nn.Module, classes: dict[str, int], teacher_features: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        width: int = backbone.num_features  # type: ignore[assignment]
        heads = {name: nn.Linear(width, count) for name, count in classes.items()}
        for head in heads.values():
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleDict(heads)
        self.projection = None if teacher_features is None else nn.Linear(width, teacher_features)

    def forward(self, images: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
        """sizes: images of each source, in the order in which they stand in the batch."""
        return self.classify(self.features(images), sizes)

    def features(self, images: Tensor) -> Tensor:
        """The backbone's pooled features [b, c]; it has no head of its own."""
        return self.backbone(images)

    def project(self, features: Tensor) -> Tensor:
        """From features [b, c] to the teacher's [b, teacher_features]."""
        assert self.projection is not None, "there is no teacher"
        return self.projection(features)

    def classify(self, features: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
        """From the backbone's features [b, c], as `forward` does."""
        parts = features.split(list(sizes.values()))
        return {name: self.heads[name](part) for name, part in zip(sizes, parts, strict=True)}


Model = TypeVar("Model", bound=nn.Module)


class Average(Generic[Model]):
    """Exponential moving average of a model's parameters, slow only once there is something to average."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())
        self._decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices and convolutions decay; vectors, A_log, tokens and positions do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.endswith(("A_log", "A_b_log", "cls_token", "pos_embed"))
        (kept if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def choose_kernel(backbone: Any, kernel: str, device: torch.device, images: Tensor) -> tuple[str, float]:
    """Sets the first backend that agrees with `naive` on `images`, in features and all gradients.

    kernel: "auto" tries the backends that run here, best first; a name tries that one. Returns the backend and its
    largest relative difference. Raises UserError when none agrees.
    """
    wanted, findings = features_and_gradients(backbone, "naive", device, images), []
    candidates = mambapeft_kernels.available_backends(device) if kernel == "auto" else [kernel]
    for name in (name for name in candidates if name != "mamba_ssm" or kernel == name):
        try:
            found = features_and_gradients(backbone, name, device, images)
        except RuntimeError as error:  # a compiler or launch that fails here
            findings.append(f"{name}: {type(error).__name__}: {error}")
            print(findings[-1], flush=True)
            continue
        worst = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, wanted, strict=True))
        findings.append(f"{name}: differs from naive by {worst:.1e} (relative, at most {AGREEMENT:.0e} allowed)")
        print(findings[-1], flush=True)
        if worst <= AGREEMENT:
            return backbone.set_kernel(name, device), worst
    raise UserError("No kernel agrees with the definition: " + "; ".join(findings) + ". Try kernel=torch.")


def features_and_gradients(backbone: Any, kernel: str, device: torch.device, images: Tensor) -> list[Tensor]:
    """The features of a batch of images, and the gradients of a loss of them."""
    backbone.set_kernel(kernel, device)
    training = backbone.training
    backbone.eval()  # no drop path
    features = backbone(images)
    loss = F.mse_loss(features, torch.linspace(-1, 1, features.shape[-1], device=device).expand_as(features))
    parameters = [p for n, p in backbone.named_parameters() if not n.startswith("head.")]
    gradients = torch.autograd.grad(loss, parameters)
    backbone.train(training)
    return [features.detach(), *gradients]
