"""Between pretrained and adapted weights (WiSE-FT, arXiv 2109.01903): θ(α) = (1 - α) θ_pretrained + α θ_adapted.

The adapter is merged, so α scales whatever it makes of the weights; for LoRA it is a factor on its scale. A method that
stays on activations has no pretrained counterpart and is refused. α is chosen on validation images that the model was
not trained on.

The head: WiSE-FT starts from a zero-shot classifier, which these backbones do not have. With `probe`, a linear probe on
the same task takes its place, and the head goes from the probe's to the adapted one; α = 0 is then the linear probe.
Without it the adapted head stays as it is at every α, and α = 0 is that head on pretrained features.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import apply_adapter
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.engine.predict import Predictions
from mambapeft_vision.results.layout import PREDICTIONS_FILE
from mambapeft_vision.results.record import RunRecord, read_record, write_record
from mambapeft_vision.run.assemble import FRESH, Setup, Sources, assemble
from mambapeft_vision.run.ensemble import derived_record
from mambapeft_vision.run.evaluate import check_same_backbone, recorded_config
from mambapeft_vision.run.finish import save_predictions, test
from mambapeft_vision.run.inputs import CONTENT, Fingerprints, changed, has_other_content
from mambapeft_vision.run.own_code import NO_OWN_CODE, OwnCode
from mambapeft_vision.run.run_config import make_plan, make_run_folder
from mambapeft_vision.utils.atomic import write_text
from mambapeft_vision.utils.console import Console
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path

ALPHAS = tuple(round(0.1 * tenth, 1) for tenth in range(11))
CURVE_FILE = "curve.csv"
TRAINED_ON = {"train800val200": ("train800", "val200")}  # splits inside of a training split


class NotInterpolableError(UserError):
    """A method has no counterpart among the pretrained weights."""


@dataclass(frozen=True)
class How:
    """How a command opens a run: where it computes, and the folders of decoded images and of method files."""

    device: str = "auto"
    kernel: str | None = None
    cache: str | None = None
    own: OwnCode = NO_OWN_CODE
    sources: Sources = FRESH


@dataclass(frozen=True)
class Interpolation:
    """A finished run whose weights can be set anywhere between pretrained and adapted, with a split to test it on."""

    record: RunRecord
    setup: Setup
    ends: dict[str, tuple[Tensor, Tensor]]  # pretrained and adapted value of every weight that differs
    console: Console

    @torch.no_grad()
    def test(self, alpha: float) -> Predictions:
        """Tests the weights at α on the split's images."""
        weights = dict(self.setup.model.backbone.named_parameters())
        for name, (pretrained, adapted) in self.ends.items():
            weights[name].copy_(torch.lerp(pretrained, adapted, alpha) if alpha != 1 else adapted)
        return test(self.setup, self.console)


def open_interpolation(run: str | Path, split: str, how: How, probe: str | Path | None = None) -> Interpolation:
    """Builds a finished run's model and its pretrained counterpart.

    Args:
        split: the split that it will be tested on.
        probe: a finished linear probe on the same images and backbone, for the head at α = 0.

    Raises:
        NotInterpolableError: where a method cannot be folded into the weights, or changes their shapes.
        UserError: for a run that cannot be read, or a probe of another task.
    """
    folder = user_path(run)
    how.own.add()
    record, adapter = read_record(folder), read_adapter(folder)
    config = recorded_config(folder, cache=how.cache, own=how.own)
    config.dataset.test_split = split
    plan = make_plan(config)
    check_same_backbone(adapter, plan)
    pretrained: dict[str, Tensor] = {}

    def attach(backbone: Backbone, num_classes: int) -> AdaptedModel:
        pretrained.update({name: p.detach().clone() for name, p in backbone.named_parameters()})
        return apply_adapter(adapter, backbone)

    console = Console()
    setup = assemble(
        plan, console, sources=how.sources, attach=attach, device=how.device, kernel=how.kernel, test_only=True
    )
    if split == record.config["dataset"]["test_split"]:
        images = setup.task.current_fingerprint()
        now = Fingerprints.of_plan(plan, images, setup.model.backbone_sha256, setup.task.content_hash)
        if other := changed(Fingerprints.of_record(record), now):
            console.say(f"the {other} are not those that the run was made from")
    setup.model.to(setup.device)
    for name, why in setup.model.merge().items():
        raise NotInterpolableError(f"{folder}: {name} cannot be interpolated: {why}. Choose a method on weights")
    head = {} if probe is None else _head_of(user_path(probe), record)
    weights = dict(setup.model.backbone.named_parameters())
    ends = _ends({**pretrained, **head}, weights, setup.device, str(folder))
    return Interpolation(record, setup, ends, console)


def _ends(
    pretrained: dict[str, Tensor], adapted: dict[str, torch.nn.Parameter], device: torch.device, where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    ends = {}
    for name, weight in adapted.items():
        start = pretrained.get(name)
        if start is None and name.startswith("head."):
            continue  # without a probe the head is the adapted one everywhere
        if start is None or start.shape != weight.shape:
            raise NotInterpolableError(
                f"{where}: {name} has no pretrained counterpart of its shape, so there is nothing between the two. "
                f"Choose a method that keeps the weights' shapes"
            )
        start = start.to(device, weight.dtype)
        if not torch.equal(start, weight):
            ends[name] = start, weight.detach().clone()
    return ends


def _head_of(probe: Path, record: RunRecord) -> dict[str, Tensor]:
    """A linear probe's head. Raises UserError for a run on other images or weights."""
    other = read_record(probe)
    same = (other.task, other.data_manifest) == (record.task, record.data_manifest)
    if not same or has_other_content(other, record) or other.trainable:
        raise UserError(f"{probe} is no linear probe on {record.task} with the same images; expected one")
    if other.backbone_sha256 != record.backbone_sha256:
        raise UserError(f"{probe} has other weights of the backbone; expected a linear probe on those of the run")
    return {name: tensor for name, tensor in read_adapter(probe).state.items() if name.startswith("head.")}


def curve(of: Interpolation, alphas: Sequence[float] = ALPHAS) -> dict[float, float]:
    """Accuracy (0 to 1) on the split by α."""
    return {alpha: of.test(alpha).accuracy for alpha in alphas}


def best_of(curve: dict[float, float]) -> float:
    """The best α; of equally good ones the one nearest to the adapted weights."""
    return max(curve, key=lambda alpha: (curve[alpha], -abs(1 - alpha)))


def check_unseen(record: RunRecord, split: str, where: object) -> None:
    """Raises UserError where a run was trained on the split on which α is to be chosen."""
    trained = record.config["dataset"]["train_split"]
    if split in TRAINED_ON.get(trained, (trained,)):
        raise UserError(
            f"{where} was trained on {trained}, of which {split} is a part: α cannot be chosen there. Give --select a "
            f"run with dataset.train_split=train800, or --alpha"
        )


def interpolate(
    run: str | Path,
    alpha: float,
    out: Path,
    how: How,
    *,
    label: str,
    probe: str | Path | None = None,
    curve: dict[float, float] | None = None,
) -> tuple[Path, RunRecord]:
    """Tests a finished run's weights at α on the test images, and records the result.

    Args:
        out: the folder below which the result gets one of its own.
        label: how tables name it.
        curve: accuracy by α on the validation images, kept beside the result.

    Returns: the folder and the result.
    Raises: UserError as `open_interpolation`.
    """
    between = open_interpolation(run, "test", how, probe)
    predictions = between.test(alpha)
    config = between.record.config
    record = derived_record(
        [between.record],
        "interpolation",
        label,
        accuracy=predictions.accuracy,
        loss=predictions.loss,
        num_test=len(predictions.labels),
        test_images_per_second=predictions.images_per_second,
        config={**config, "dataset": {**config["dataset"], "test_split": "test"}},
        more={"alpha": alpha, "probe": None if probe is None else read_record(user_path(probe)).fingerprint},
    )
    task, versions = between.setup.task, {k: v for k, v in record.versions.items() if k != CONTENT}
    if task.content_hash is not None:
        versions[CONTENT] = task.content_hash
    record = dataclasses.replace(record, data_manifest=task.manifest_hash, versions=versions)
    folder = make_run_folder(out, record)
    save_predictions(between.setup, predictions, folder / PREDICTIONS_FILE)
    if curve is not None:
        lines = [f"{one},{accuracy}" for one, accuracy in curve.items()]
        write_text(folder / CURVE_FILE, "\n".join(["alpha,accuracy", *lines, ""]))
    write_record(folder, record)
    return folder, record
