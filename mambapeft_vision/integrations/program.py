"""Trained models as programs that need no package of ours: torch.export and ONNX, for any batch.

Merged methods are a part of the weights; those that stay attached become operations of the program. Every scan is one
operator (`mambapeft_kernels/selective_scan/exported.py`). A program is compared with the model before it is kept.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.timm_model import TimmModel
from mambapeft_vision.utils.atomic import atomic_path, write_bytes
from mambapeft_vision.utils.errors import UserError

CHECKED_BATCHES = (1, 2, 5)  # one is the batch that is traced, the others are not
TOLERANCE = 1e-3  # of the largest logit; other orders of summation stay far below
_MAX_BATCH = 65_536
_TRACED = 2


@dataclass(frozen=True)
class Check:
    """How far a program's logits are from the model's, as a part of the largest one, over `CHECKED_BATCHES`."""

    difference: float

    def __str__(self) -> str:
        return f"logits differ from the model's by {self.difference:.1e} of the largest"


def prepare(model: AdaptedModel) -> dict[str, str]:
    """Merges and freezes a model, and chooses what can be traced. Returns the methods that stay attached, and why."""
    left = model.merge()
    model.backbone.set_kernel("torch", "cpu")
    model.cpu().float().requires_grad_(False).eval()
    return left


def images(model: AdaptedModel, batch: int) -> Tensor:
    """Normalised images [batch, C, H, W] of the model's size, drawn from the batch."""
    backbone = cast(TimmModel, model.backbone)
    size = backbone.in_chans, *backbone.patch_embed.img_size
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))


def to_torch_program(model: AdaptedModel, path: str | Path) -> Check:
    """Writes a model (see `prepare`) as a program of `torch.export`; `torch.export.load(path).module()` runs it."""
    program = _trace(model)
    check = _checked(model, program.module(), "the exported program")
    with atomic_path(Path(path)) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)
    return check


def to_onnx(model: AdaptedModel, path: str | Path, notes: dict[str, str] | None = None) -> Check:
    """Writes a model (see `prepare`) as ONNX: input `images` [batch, C, H, W], normalised; output `logits`.

    notes: texts for the file's metadata.
    """
    runtime = _onnxruntime()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program: Any = torch.onnx.export(
            cast(nn.Module, model),
            (images(model, _TRACED),),
            dynamo=True,
            dynamic_shapes=_any_batch(),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    proto = program.model_proto
    for key, value in (notes or {}).items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    check = _checked(model, _session(runtime, content), "the ONNX model")
    write_bytes(Path(path), content)
    return check


def quantise(path: str | Path, out: str | Path) -> Path:
    """Writes an ONNX model with the weights of its matrix products in int8; activations are quantised as they come."""
    _onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with atomic_path(Path(out)) as temporary:
        # Convolutions stay: those of a patch embedding cost little, and the runtime has no int8 form of them.
        quantize_dynamic(path, temporary, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    return Path(out)


@dataclass(frozen=True)
class Accuracy:
    """Of two ONNX models on the same images: of the first, of the second, and how often both say the same class."""

    first: float
    second: float
    agreement: float
    num_images: int


def compare(first: str | Path, second: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Runs two ONNX models over batches of (normalised images [b, C, H, W], labels [b])."""
    runtime = _onnxruntime()
    run = [_session(runtime, Path(path).read_bytes()) for path in (first, second)]
    right, same, total = [0, 0], 0, 0
    for inputs, labels in batches:
        classes = [session(inputs).argmax(1) for session in run]
        for i, found in enumerate(classes):
            right[i] += int((found == labels).sum())
        same += int((classes[0] == classes[1]).sum())
        total += len(labels)
    return Accuracy(right[0] / total, right[1] / total, same / total, total)


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: Dim("batch", min=1, max=_MAX_BATCH)},)


def _trace(model: AdaptedModel) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(cast(nn.Module, model), (images(model, _TRACED),), dynamic_shapes=_any_batch())


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # the exporter needs it, and says so less readably
    except ImportError as error:
        raise UserError(
            f"ONNX needs packages that are not installed ({error.name}); pip install 'mambapeft-vision[export]'"
        ) from None
    return onnxruntime


def _session(runtime: Any, content: bytes) -> Callable[[Tensor], Tensor]:
    """An ONNX model as a function of images."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(np.asarray(session.run(None, {name: inputs.numpy()})[0]))


@torch.no_grad()
def _checked(model: AdaptedModel, program: Callable[[Tensor], Tensor], what: str) -> Check:
    """Compares logits. Raises UserError where they differ by more than roundings."""
    worst = 0.0
    for batch in CHECKED_BATCHES:
        expected, found = model(images(model, batch)), program(images(model, batch))
        scale = expected.abs().max().clamp_min(1e-12)
        worst = max(worst, float((found - expected).abs().max() / scale))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{what} computes other logits than the model: they differ by {worst:.1e} of the largest, expected at most "
            f"{TOLERANCE}. Nothing was written. Please report this with the versions of torch and onnxscript"
        )
    return Check(worst)
