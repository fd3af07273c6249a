"""The reference's own training run, step by step: losses, learning rates, final weights (float64)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from mambapeft_vision.adapter.model import AdaptedModel, adapt
from mambapeft_vision.backbones.vim import Vim
from mambapeft_vision.engine.config import TrainerConfig
from mambapeft_vision.engine.loop import make_trainer, step_settings
from mambapeft_vision.engine.module import FineTuning
from mambapeft_vision.methods.lora import LoRA

GOLDEN = Path(__file__).parents[1] / "golden" / "trajectory" / "lora_X.npz"


class Recorder(Callback):
    """Keeps the loss and the learning rates of each optimiser step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        loss_sum, _, steps = pl_module.step.take_totals()
        assert steps == 1
        self.losses.append(loss_sum / len(batch[1]))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class GoldenBatches:
    """The reference's batches, epoch by epoch."""

    def __init__(self, golden: dict[str, np.ndarray], batch: int) -> None:
        self._images = torch.from_numpy(golden["images"]).double()
        self._labels = torch.from_numpy(golden["labels"])
        self._orders = iter(torch.from_numpy(golden["order"]))
        self._batch = batch

    def __len__(self) -> int:
        return -(-len(self._labels) // self._batch)

    def __iter__(self):
        for chunk in next(self._orders).split(self._batch):
            yield self._images[chunk], self._labels[chunk]


def ours(reference_name: str) -> str | None:
    """Our name of one of the reference's trained tensors; None for the frozen backbone's."""
    if reference_name.startswith("head."):
        return reference_name
    if "lora_X" not in reference_name:
        return None
    layer = reference_name.split(".")[2]
    matrix = "down" if "adapter_down" in reference_name else "up"
    return f"lora_p_x.layers.{layer}.mixer.in_proj.weight.{matrix}"


def build(golden: dict[str, np.ndarray], meta: dict) -> AdaptedModel:
    backbone = Vim(img_size=32, patch_size=8, embed_dim=32, depth=3, drop_path_rate=0).double()
    start = {name.removeprefix("param/"): torch.from_numpy(a) for name, a in golden.items() if name[:6] == "param/"}
    frozen = {name.removeprefix("module."): tensor for name, tensor in start.items() if ours(name) is None}
    missing, unknown = backbone.load_state_dict(frozen, strict=False)
    assert not unknown and all(name.startswith("head.") for name in missing)
    lora = LoRA(
        targets="layers.*.mixer.in_proj.weight", rows="x", rank=meta["peft_kwargs"]["dim_X"],
        scale=meta["peft_kwargs"]["s_X"],
    )  # fmt: skip
    model = adapt(backbone, {"lora_p_x": lora}, num_classes=len(start["head.bias"]))
    model.load_adapter_state({ours(name): tensor for name, tensor in start.items() if ours(name)})
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def run(golden) -> tuple[Recorder, dict[str, Tensor]]:
    meta = json.loads(str(golden["meta_json"]))
    recipe = TrainerConfig(
        max_epochs=meta["epochs"],
        learning_rate=meta["lr"],
        min_lr=1e-5,
        weight_decay=meta["weight_decay"],
        betas=[0.9, 0.999],
        eps=1e-8,
        warmup_epochs=meta["warmup_epochs"],
        start_factor=1e-3,
        clip_norm=meta["clip"],
        head_lr_mult=1.0,
        head_decay_mult=1.0,
        precision="fp32",  # casts nothing: float64 stays float64
        device="cpu",
        checkpoint_every_s=30,
        picture=False,
        micro_batch=None,
        cuda_graph=True,
        devices=1,
    )
    recorder = Recorder()
    module = FineTuning(build(golden, meta), nn.Identity(), recipe, 0, step_settings(recipe, recipe.precision))
    trainer = make_trainer(torch.device("cpu"), [recorder], max_epochs=recipe.max_epochs)
    trainer.fit(module, GoldenBatches(golden, meta["batch"]))
    return recorder, module.state_dict()


def test_losses_equal_the_reference(run, golden):
    recorder, _ = run
    assert len(recorder.losses) == 24
    np.testing.assert_allclose(recorder.losses, golden["losses"], rtol=0, atol=1e-8)


def test_learning_rates_equal_the_reference(run, golden):
    recorder, _ = run
    # All of the reference's groups have one rate, and so have ours.
    for ours_, theirs in zip(recorder.rates, golden["lrs"], strict=True):
        np.testing.assert_allclose(ours_, theirs[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(theirs, theirs[0], rtol=0, atol=0)


def test_final_weights_equal_the_reference(run, golden):
    _, state = run
    final = {ours(name.removeprefix("final/")): a for name, a in golden.items() if name.startswith("final/")}
    assert final.keys() == state.keys()
    for name, expected in final.items():
        np.testing.assert_allclose(state[name].numpy(), expected, rtol=0, atol=1e-8, err_msg=name)
