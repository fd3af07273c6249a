"""Faults for runs under test: callbacks of Lightning's, which `train(..., callbacks=...)` takes."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class InStep(Callback):
    """Calls `act` before the training step with this number (from 1, counted over all epochs of this attempt)."""

    def __init__(self, number: int, act: Callable[[], Any]) -> None:
        self._number, self._act = number, act
        self._steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._steps += 1
        if self._steps == self._number:
            self._act()


class AfterStep(InStep):
    """Calls `act(module)` after the step with this number."""

    def __init__(self, number: int, act: Callable[[Any], Any]) -> None:
        super().__init__(number, lambda: None)
        self._change = act

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps == self._number:
            self._change(pl_module)


class Gradients(InStep):
    """Calls `act(module)` on the gradients of the step with this number, and of all later backward passes."""

    def __init__(self, number: int, act: Callable[[Any], Any]) -> None:
        super().__init__(number, lambda: None)
        self._change = act

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps >= self._number:
            self._change(pl_module)


def raises(error: BaseException, number: int) -> InStep:
    """Raises `error` in the training step with this number, from 1."""

    def act() -> None:
        raise error

    return InStep(number, act)
