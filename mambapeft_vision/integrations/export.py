"""A trained model in the format of another tool, compared with the model before it is kept."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mambapeft_vision.adapter.files import Adapter, read_adapter
from mambapeft_vision.adapter.load import apply_adapter, load_backbone
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.weights import export_official
from mambapeft_vision.data import ConsoleProgress, Preprocessing
from mambapeft_vision.engine.module import Normalise
from mambapeft_vision.integrations import low_rank, program, timm_folder
from mambapeft_vision.integrations.hub import recorded_weights
from mambapeft_vision.integrations.to_peft import to_peft
from mambapeft_vision.results.record import is_finished, read_record
from mambapeft_vision.run.build import build_dataset
from mambapeft_vision.run.evaluate import recorded_config
from mambapeft_vision.run.own_code import NO_OWN_CODE, OwnCode
from mambapeft_vision.run.run_config import make_plan
from mambapeft_vision.utils.atomic import made_folder
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path


@dataclass(frozen=True)
class Request:
    """An export: its source, its output and its options.

    run: folder of a run or adapter.
    out: the file or folder to write.
    weights: weights of the backbone; None: those that the run records, or the official ones.
    own: folders with the user's own Python files, if the run used some.
    int8: for ONNX, also a file with the weights in int8.
    energy, rank: for LoRA, see `low_rank.to_lora`.
    """

    run: str | Path
    out: str | Path
    weights: str | None = None
    own: OwnCode = NO_OWN_CODE
    int8: bool = False
    energy: float = 0.99
    rank: int | None = None


def export(request: Request, to: str) -> list[str]:
    """Writes the model of a run in the format `to`, one of `FORMATS`. Returns a report for the user, line by line.

    Raises: UserError.
    """
    if to not in FORMATS:
        raise UserError(f"to={to}; expected one of {', '.join(FORMATS)}")
    out = user_path(request.out)
    _check_out(out, is_folder=to in _FOLDERS)
    with made_folder(out.parent):
        return FORMATS[to](Source(request), out)


class Source:
    """A run's adapter and backbone, as often as they are needed."""

    def __init__(self, request: Request) -> None:
        self.request = request
        request.own.add()
        self.folder = user_path(request.run)
        self.adapter: Adapter = read_adapter(self.folder)
        self.weights, self.seed = self._weights()

    def _weights(self) -> tuple[str, int]:
        if self.request.weights is not None or not is_finished(self.folder):
            return self.request.weights or "official", 0
        return recorded_weights(read_record(self.folder))

    def backbone(self) -> Any:
        return load_backbone(self.adapter, self.weights, self.seed)

    def model(self) -> AdaptedModel:
        return apply_adapter(self.adapter, self.backbone()).float()

    def test_images(self) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """Makes batches of the run's test split, normalised. Raises UserError where it is not at hand."""
        task = build_dataset(make_plan(recorded_config(self.folder, cache=None, own=self.request.own)))
        task.check(test_only=True)
        preprocessing = Preprocessing.from_timm(self.backbone().default_cfg)
        task.load_test(preprocessing, ConsoleProgress(f"decode {task.name}", "images"))
        normalise = Normalise(preprocessing)
        return lambda: ((normalise(images), labels) for images, labels in task.test_dataloader())


def _onnx(source: Source, out: Path) -> list[str]:
    model = source.model()
    left = program.prepare(model)
    found = program.to_onnx(model, out, notes_of(source, model))
    lines = [f"wrote {out}: {_attached(left)}{_logits(found)}"]
    if source.request.int8:
        small = program.quantise(out, out.with_suffix(f".int8{out.suffix}"))
        lines.append(f"wrote {small}: {small.stat().st_size:,} bytes instead of {out.stat().st_size:,}")
        lines.append(_cost_of_int8(source, out, small, model.multi_label))
    return lines


def _cost_of_int8(source: Source, whole: Path, small: Path, multi_label: bool) -> str:
    if multi_label:
        return "what int8 costs was not measured: an image has any number of labels here, and accuracy means one"
    try:
        batches = source.test_images()
    except UserError as error:
        return f"what int8 costs in accuracy was not measured: {error}"
    found = program.compare(whole, small, batches())
    return (
        f"accuracy on {found.num_images:,} test images: {found.second:.2%} in int8, {found.first:.2%} in float32; "
        f"{found.agreement:.2%} of the predictions are the same"
    )


def _torch_program(source: Source, out: Path) -> list[str]:
    model = source.model()
    left = program.prepare(model)
    return [f"wrote {out}: {_attached(left)}{_logits(program.to_torch_program(model, out))}"]


def _timm(source: Source, out: Path) -> list[str]:
    timm_folder.to_timm(source.model(), out, str(source.folder))
    return [
        f'wrote {out}; after `import mambapeft_vision.backbones`: timm.create_model("local-dir:{out}", pretrained=True)'
    ]


def _official(source: Source, out: Path) -> list[str]:
    export_official(timm_folder.plain_backbone(source.model(), str(source.folder)), out)
    return [f"wrote {out}, with the keys of the official checkpoints"]


def _peft(source: Source, out: Path) -> list[str]:
    found = to_peft(source.model(), source.backbone().float(), out)
    return [
        f"wrote {out}: {_logits(found)}",
        f'peft.PeftModel.from_pretrained(backbone, "{out}") loads it on a backbone with '
        f"num_classes={source.adapter.config['num_classes']}",
    ]


def _lora(source: Source, out: Path) -> list[str]:
    request = source.request
    found = low_rank.to_lora(source.model(), source.backbone().float(), energy=request.energy, rank=request.rank)
    kept = {key: value for key, value in source.adapter.config.items() if key in ("task", "seed")}
    found.model.save(out, {**kept, "origin": "low-rank approximation of another adapter"})
    worst = max(found.errors, key=found.errors.__getitem__, default=None)
    of_weights = "" if worst is None else f"; largest error of a weight's change {found.errors[worst]:.2%} ({worst})"
    return [
        f"wrote {out}: LoRA of rank {found.rank} on {len(found.errors)} weights{of_weights}",
        _logits(found.logits),
    ]


#: Format → what writes it.
FORMATS: dict[str, Callable[[Source, Path], list[str]]] = {
    "onnx": _onnx,
    "torch-export": _torch_program,
    "timm": _timm,
    "official": _official,
    "peft": _peft,
    "lora": _lora,
}
_FOLDERS = ("timm", "peft", "lora")


def _check_out(out: Path, *, is_folder: bool) -> None:
    """Raises UserError, before the work, if the output cannot be written."""
    if is_folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} is no empty folder; expected a new one. Choose another name")
    if not is_folder and out.is_dir():
        raise UserError(f"out={out} is a folder; expected a file to write. Choose another name")


def _attached(left: dict[str, str]) -> str:
    return f"{', '.join(left)} stay operations of their own; " if left else ""


def _logits(difference: float) -> str:
    return f"logits differ from the model's by {difference:.1e} of the largest"


def notes_of(source: Source, model: AdaptedModel) -> dict[str, str]:
    """For the file's metadata: how images are prepared, and what the model is."""
    record = model.backbone.default_cfg
    preprocessing = Preprocessing.from_timm(record)
    return {
        "task": str(source.adapter.config.get("task") or ""),
        "backbone": record["architecture"],
        "class_names": json.dumps(list(model.class_names or [])),
        "input_size": str(list(record["input_size"])),
        "mean": str(list(preprocessing.mean)),
        "std": str(list(preprocessing.std)),
        "interpolation": preprocessing.interpolation,
    }
