"""The training step, as a LightningModule."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule
from mambapeft_kernels import FUSED, look_up, resolve_backend
from torch import Tensor, nn
from torch.optim import Optimizer

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.engine.schedule import make_optimizer, set_learning_rates
from mambapeft_vision.engine.step import StepSettings, TrainStep
from mambapeft_vision.run.config import TrainerConfig


class Normalise(nn.Module):
    """uint8 images [b, 3, H, W], scaled to [0, 1] and normalised per channel, on the images' device.

    In float32; under autocast rounded to its dtype, in which a backbone embeds the patches anyway. A GPU looks up what
    the CPU has computed, so both see the same bits: its own division by 255 would be a product with 1 / 255.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
        self.register_buffer("table", self._computed(levels).view(3, 256), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if resolve_backend("auto", images.device) in FUSED:
            return look_up(images, self.table, dtype)
        return self._computed(images).to(dtype)  # on a CPU faster than indexing

    def _computed(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


class FineTuning(LightningModule):
    """Trains what an adapted model's methods own, and its head, with plain cross entropy, by a `TrainStep` a batch.

    Its saved state is the adapter (methods' tensors and the head), never the frozen backbone.

    Args:
        normalise: from the loader's images to the backbone's input.
        seed: with the epoch and the batch, decides dropout and drop path, so that a step draws the same whether or not
            the run was interrupted before it.
        note: told in one line when steps cannot be recorded.
    """

    def __init__(
        self,
        model: AdaptedModel,
        normalise: nn.Module,
        recipe: TrainerConfig,
        seed: int,
        settings: StepSettings,
        note: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step is ours, from zeroed gradients to the update
        self.model = model
        self.normalise = normalise
        self.recipe = recipe
        self.seed = seed
        self.step: TrainStep | None = None
        self.images_seen = 0  # in this epoch
        self._settings = settings
        self._note = note

    def configure_optimizers(self) -> Optimizer:
        return make_optimizer(self.model, self.recipe)

    def on_train_start(self) -> None:
        self.renew_step()

    def renew_step(self) -> None:
        """A new step for the trainer's optimiser; after a change of what is trained, or of the optimiser."""
        optimizer = self.trainer.optimizers[0]
        self.step = TrainStep(self.model, self.normalise, optimizer, self._settings, self._note)

    def release(self) -> None:
        """Gives the memory of recorded steps back."""
        if self.step is not None:
            self.step.release()

    def on_train_epoch_start(self) -> None:
        self._epoch_seed = epoch_seed(self.seed, self.current_epoch)
        self.images_seen = 0

    @property
    def steps_done(self) -> int:
        """Steps taken over the whole run, up to the latest batch."""
        return self.current_epoch * self.trainer.num_training_batches + self.trainer.fit_loop.batch_idx + 1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        steps = self.trainer.num_training_batches
        step = self.current_epoch * steps + batch_idx
        optimizer = self.trainer.optimizers[0]
        set_learning_rates(optimizer, self.recipe, step=step, epoch=self.current_epoch, steps_per_epoch=steps)
        whole = self._images_in_step(batch_idx, len(labels))
        self.step(images, labels, self._epoch_seed + batch_idx, whole)
        self.images_seen += whole

    def _images_in_step(self, batch_idx: int, here: int) -> int:
        """On all ranks."""
        if self.trainer.world_size == 1:
            return here
        task = self.trainer.datamodule
        return min(task.batch_size, len(task.train_set) - batch_idx * task.batch_size)

    def gradients(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> float:
        """The loss of a batch of this epoch; fills the gradients and changes nothing else."""
        return self.step.gradients(*batch, self._epoch_seed + batch_idx)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.model.adapter_state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        self.model.load_adapter_state(state_dict, "the run's checkpoint")


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's first step, unrelated to those of other epochs and seeds; later steps count on from it."""
    digest = hashlib.sha256(f"training step, seed {seed}, epoch {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
