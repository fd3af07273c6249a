"""The training step, as a LightningModule."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from mambapeft_vision.adapt import AdaptedModel
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.training.config import TrainerConfig
from mambapeft_vision.training.optim import make_optimizer, set_learning_rates


class Normalise(nn.Module):
    """uint8 images [b, 3, H, W] → float32, scaled to [0, 1] and normalised per channel, on the images' device."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


class FineTuning(LightningModule):
    """Trains what an adapted model's methods own, and its head, with plain cross entropy.

    Its saved state is the adapter (methods' tensors and the head), never the frozen backbone.

    Args:
        normalise: from the loader's images to the backbone's input.
        seed: with the epoch, decides dropout and drop path, so that an epoch draws the same whether or not the run
            was interrupted before it.
    """

    def __init__(self, model: AdaptedModel, normalise: nn.Module, recipe: TrainerConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        self.recipe = recipe
        self.seed = seed
        self.last_loss: Tensor | None = None  # of the latest step
        self._loss_sum: Tensor | float = 0.0
        self._correct: Tensor | int = 0
        self.images_seen = 0  # in this epoch

    def configure_optimizers(self) -> Optimizer:
        return make_optimizer(self.model, self.recipe)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(epoch_seed(self.seed, self.current_epoch))
        self._loss_sum, self._correct, self.images_seen = 0.0, 0, 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        steps = self.trainer.num_training_batches
        step = self.current_epoch * steps + batch_idx
        set_learning_rates(self.optimizers(), self.recipe, step=step, epoch=self.current_epoch, steps_per_epoch=steps)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.model(self.normalise(images))
        loss = F.cross_entropy(logits, labels)
        self.last_loss = loss.detach()
        self._loss_sum = self._loss_sum + self.last_loss * len(labels)
        self._correct = self._correct + (logits.detach().argmax(dim=1) == labels).sum()
        self.images_seen += len(labels)
        return loss

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        # Lightning's own refuses fused optimisers in mixed precision, where (without a loss scale) nothing is amiss.
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.trained().values(), self.recipe.clip_norm)

    def epoch_metrics(self) -> dict[str, float]:
        """Mean loss and top-1 accuracy (0 to 1) over this epoch's images so far, as they were trained on."""
        seen = self.images_seen
        return {"loss": float(self._loss_sum) / seen, "accuracy": float(self._correct) / seen}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.adapter_state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        self.model.load_adapter_state(state_dict, "the run's checkpoint")


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch's dropout and drop path, unrelated to those of other epochs and seeds."""
    digest = hashlib.sha256(f"training step, seed {seed}, epoch {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
