"""The model of a finished run, ready to be used on new images."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mambapeft_vision.adapter.files import Adapter, read_adapter
from mambapeft_vision.adapter.load import apply_adapter, check_sizes, load_adapter
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.adapter.predict import probabilities_of
from mambapeft_vision.backbones.contract import frozen_casts
from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.engine.device import resolve_device
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.engine.precision import apply_precision, compute_dtype, resolve_precision
from mambapeft_vision.engine.predict import Forward
from mambapeft_vision.results.layout import RUN_CONFIG_FILE
from mambapeft_vision.run.build import build_backbone, set_kernel
from mambapeft_vision.run.evaluate import check_same_backbone, recorded_config
from mambapeft_vision.run.own_code import NO_OWN_CODE, OwnCode
from mambapeft_vision.run.run_config import RunPlan, make_plan
from mambapeft_vision.utils.names import user_path


@dataclass(frozen=True)
class TrainedModel:
    """A merged model, and how images are prepared for it."""

    model: AdaptedModel
    preprocessing: Preprocessing
    device: torch.device
    precision: str
    forward: Forward

    def probabilities(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """uint8 images [C, H, W] → float32 [b, classes], computed as in a test of the run.

        A batch that does not fit the GPU's memory is halved.
        """
        images = torch.from_numpy(np.stack(pixels))
        with torch.no_grad(), frozen_casts(self.model, compute_dtype(self.precision)):
            logits = torch.cat(self._logits(images))
        return probabilities_of(logits, self.model.multi_label).cpu()

    def _logits(self, images: Tensor) -> list[Tensor]:
        with suppress(torch.OutOfMemoryError):
            return [self.forward(images.to(self.device))]
        if len(images) == 1:
            return [self.forward(images.to(self.device))]  # and says what does not fit
        torch.cuda.empty_cache()
        return [logits for half in images.chunk(2) for logits in self._logits(half)]


def open_trained(
    run: str | Path,
    *,
    weights: str | None = None,
    device: str = "auto",
    kernel: str | None = None,
    own: OwnCode = NO_OWN_CODE,
) -> TrainedModel:
    """The merged model of a run's folder, or of a folder that holds an adapter alone.

    Args:
        weights: where the backbone's weights are now; None: where the run's config says, else the official ones.
        device: auto, cpu, cuda or cuda:N.
        kernel: a backend; None: the one that the run asked for.
        own: folders with the user's own Python files, if the run used some.

    Raises: UserError.
    """
    folder = user_path(run)
    own.add()
    adapter = read_adapter(folder)
    plan = _plan_of(folder, weights, own) if (folder / RUN_CONFIG_FILE).exists() else None
    place = resolve_device(device)
    precision = resolve_precision("auto" if plan is None else plan.recipe.precision, place)
    apply_precision(precision)
    model = load_adapter(folder, weights or "official") if plan is None else _model(adapter, plan)
    set_kernel(model.backbone, kernel or ("auto" if plan is None else plan.kernel), place)
    model.merge()
    model.eval().to(place)
    preprocessing = Preprocessing.from_timm(model.backbone.default_cfg)
    normalise = Normalise(preprocessing).to(place)
    return TrainedModel(model, preprocessing, place, precision, Forward(model, normalise, precision, captures=False))


def _plan_of(folder: Path, weights: str | None, own: OwnCode) -> RunPlan:
    config = recorded_config(folder, cache=None, own=own)
    if weights is not None:
        config.backbone.weights = weights
    return make_plan(config)


def _model(adapter: Adapter, plan: RunPlan) -> AdaptedModel:
    check_same_backbone(adapter, plan)
    check_sizes(adapter)
    return apply_adapter(adapter, build_backbone(plan))
