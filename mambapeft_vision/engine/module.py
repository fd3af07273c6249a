"""The LightningModules that the trainer trains: the base of all, and fine-tuning."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from mambapeft_kernels import FUSED, look_up, resolve_backend
from torch import Tensor, nn
from torch.optim import Optimizer

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.data import Preprocessing
from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.engine.schedule import make_optimizer, set_learning_rates
from mambapeft_vision.engine.step import StepSettings, TrainStep
from mambapeft_vision.utils.errors import UserError


class Normalise(nn.Module):
    """uint8 images [b, C, H, W], scaled to [0, 1] and normalised per channel, on the images' device.

    In float32; under autocast rounded to its dtype, in which a backbone embeds the patches anyway. A GPU looks up what
    the CPU has computed, so both see the same bits: its own division by 255 would be a product with 1 / 255.
    """

    mean: Tensor
    std: Tensor
    table: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        channels = preprocessing.channels
        levels = torch.arange(256, dtype=torch.uint8).expand(1, channels, 1, 256)
        self.register_buffer("table", self._computed(levels).view(channels, 256), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if resolve_backend("auto", images.device) in FUSED:
            return look_up(images, self.table, dtype)
        return self._computed(images).to(dtype)  # on a CPU faster than indexing

    def _computed(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


class TrainingModule(LightningModule):
    """A LightningModule that takes its own steps, so that they can be captured.

    Automatic optimisation is off, because a step is captured from zeroed gradients to the update. Fine-tuning Vim-S on
    a GPU rose from 395 to 2,570 images/s by it (docs/benchmarks/).
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps_done = 0  # over the whole run, up to the latest batch

    @property
    @abstractmethod
    def position(self) -> str:
        """How far the training is, e.g. `epoch 2 of 5`; for messages at the end of an epoch."""

    @property
    def can_be_saved(self) -> bool:
        """Whether a checkpoint made now can be continued."""
        return True

    @abstractmethod
    def release(self) -> None:
        """Gives the memory of captured steps back."""


class TrainBatches(Protocol):
    """Training batches by number, besides those that the loader gives (`TaskDataModule` has them)."""

    def train_batch(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """The batch with that number (from 0) in an epoch, whole, whatever the number of ranks."""

    def images_in_batch(self, number: int) -> int:
        """How many images that batch has, on all ranks."""


class FineTuning(TrainingModule):
    """Trains what an adapted model's methods own, and its head, with plain cross entropy (binary where images have
    several labels), by a `TrainStep` a batch.

    Its saved state is the adapter (methods' tensors and the head), never the frozen backbone.

    In a Trainer of your own, `max_epochs` says how long it trains, as the schedule needs it; `max_steps` is refused.
    There is no validation step.

    Args:
        normalise: from the loader's images to the backbone's input.
        seed: with the epoch and the batch, decides dropout and drop path, so that a step draws the same whether or not
            the run was interrupted before it.
        note: called with one line when steps cannot be captured.
        batches: needed with several ranks, and to look into a step that failed.
    """

    def __init__(
        self,
        model: AdaptedModel,
        normalise: nn.Module,
        recipe: TrainerConfig,
        seed: int,
        settings: StepSettings,
        note: Callable[[str], None] = print,
        batches: TrainBatches | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise
        self.recipe = recipe
        self.seed = seed
        self.images_seen = 0  # in this epoch, on all ranks
        self._step: TrainStep | None = None
        self._settings = settings
        self._note = note
        self._batches = batches

    @property
    def step(self) -> TrainStep:
        """The step in use, from the start of training on."""
        assert self._step is not None, "training has not begun"
        return self._step

    @property
    def position(self) -> str:
        return f"epoch {self.current_epoch + 1} of {self.recipe.max_epochs}"

    @property
    def steps_per_epoch(self) -> int:
        return int(self.trainer.num_training_batches)

    def configure_optimizers(self) -> Optimizer:
        return make_optimizer(self.model, self.recipe)

    def on_fit_start(self) -> None:
        trainer = self.trainer
        if trainer.max_steps != -1 or trainer.max_epochs in (None, -1):
            raise UserError(
                f"Trainer(max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs}): FineTuning's schedule goes "
                f"by epochs; expected max_epochs >= 0 and no max_steps"
            )

    def on_train_start(self) -> None:
        self._renew_step()

    def restart_optimizer(self) -> None:
        """A new optimiser and step, after a change of what is trained."""
        self.trainer.optimizers = [make_optimizer(self.model, self.recipe)]
        self._renew_step()

    def release(self) -> None:
        if self._step is not None:
            self._step.release()

    def on_train_epoch_start(self) -> None:
        self.images_seen = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        steps, epoch = self.steps_per_epoch, self.current_epoch
        step = epoch * steps + batch_idx
        set_learning_rates(self.trainer.optimizers[0], self.recipe, step=step, epoch=epoch, steps_per_epoch=steps)
        whole = self._images_in_step(batch_idx, len(labels))
        self.step(images, labels, epoch_seed(self.seed, epoch) + batch_idx, whole)
        self.images_seen += whole
        self.steps_done = step + 1
        self._count_step()

    def _count_step(self) -> None:
        """Lets `trainer.global_step` count; otherwise Lightning's callbacks would believe that nothing has changed."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def whole_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The batch with that number in this epoch, of all ranks."""
        assert self._batches is not None, "this module was made without `batches`"
        return self._batches.train_batch(self.current_epoch, number)

    def gradients(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> float:
        """The loss of a batch of this epoch; fills the gradients and changes nothing else."""
        return self.step.gradients(*batch, epoch_seed(self.seed, self.current_epoch) + batch_idx)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: tensor.detach() for name, tensor in self.model.adapter_state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        self.model.load_adapter_state(state_dict, "the run's checkpoint")

    def _renew_step(self) -> None:
        optimizer = self.trainer.optimizers[0]
        self._step = TrainStep(
            self.model, self.normalise, optimizer, self._settings, self._note, self._tell_callbacks_of_gradients
        )

    def _tell_callbacks_of_gradients(self) -> None:
        """Lightning's own hook, which it calls after backward passes that it makes itself."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_after_backward(self.trainer, self)

    def _images_in_step(self, number: int, here: int) -> int:
        """The number of images in a step, on all ranks."""
        if self.trainer.world_size == 1:
            return here
        assert self._batches is not None, "several ranks need `batches`"
        return self._batches.images_in_batch(number)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's first step, unrelated to those of other epochs and seeds; later steps count on from it."""
    digest = hashlib.sha256(f"training step, seed {seed}, epoch {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
