"""Trained models as programs that run without this project: torch.export and ONNX, for any batch size.

Merged methods are a part of the weights; those that stay attached become operations of the program. Every scan is one
operator (`mambapeft_kernels/selective_scan/exported.py`). A program is compared with the model before it is kept.
"""

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.integrations.same_logits import TOLERANCE, difference, images
from mambapeft_vision.utils.atomic import allocate, atomic_path, write_bytes
from mambapeft_vision.utils.errors import UserError

CHECKED_BATCHES = (1, 2, 5)  # one is the batch that is traced, the others are not
_MAX_BATCH = 65_536
_TRACED = 2


def prepare(model: AdaptedModel) -> dict[str, str]:
    """Merges and freezes a model, and chooses what can be traced. Returns the methods that stay attached, and why."""
    left = model.merge()
    model.backbone.set_kernel("torch", "cpu")
    model.cpu().float().requires_grad_(False).eval()
    return left


def to_torch_program(model: AdaptedModel, path: str | Path) -> float:
    """Writes a model (see `prepare`) as a program of `torch.export`; `torch.export.load(path).module()` runs it.

    Returns: the difference of its logits, see `difference`.
    """
    program = trace(model)
    found = _checked(model, program.module(), "the exported program")
    file = io.BytesIO()  # PyTorch's writer ends the process where a disk takes no more
    torch.export.save(program, file)
    write_bytes(Path(path), file.getvalue())
    return found


def to_onnx(model: AdaptedModel, path: str | Path, notes: dict[str, str] | None = None) -> float:
    """Writes a model (see `prepare`) as ONNX: input `images` [batch, C, H, W], normalised; output `logits`.

    notes: texts for the file's metadata.
    Returns: the difference of its logits, see `difference`.
    """
    runtime = _onnxruntime()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own parts
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
    found = _checked(model, _session(runtime, content), "the ONNX model")
    write_bytes(Path(path), content)
    return found


def quantise(path: str | Path, out: str | Path) -> Path:
    """Writes an ONNX model with the weights of its matrix products in int8; activations are quantised as they come."""
    _onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = Path(out)
    with atomic_path(out) as temporary, TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        model = Path(scratch) / "model.onnx"
        # onnxruntime writes a second model beside the first, and reads half of it where the disk is full.
        with open(model, "wb") as file:
            allocate(file.fileno(), 2 * Path(path).stat().st_size)
        model.unlink()
        model.symlink_to(Path(path).absolute())
        # Convolutions stay: those of a patch embedding cost little, and the runtime has no int8 form of them.
        quantize_dynamic(model, temporary, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
    return out


@dataclass(frozen=True)
class Accuracy:
    """Accuracies of two ONNX models on the same images, and how often both predict the same class."""

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


def trace(model: AdaptedModel) -> ExportedProgram:
    """A model as a program for any batch size."""
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


def _checked(model: AdaptedModel, program: Callable[[Tensor], Tensor], what: str) -> float:
    """Compares logits. Raises UserError where they differ by more than roundings."""
    worst = difference(model, program, CHECKED_BATCHES)
    if not worst <= TOLERANCE:
        raise UserError(
            f"{what} computes other logits than the model: they differ by {worst:.1e} of the largest, expected at most "
            f"{TOLERANCE}. Nothing was written. Please report this with the versions of torch and onnxscript"
        )
    return worst
