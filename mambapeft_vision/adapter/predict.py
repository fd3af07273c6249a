"""Predictions of an adapted model for images of any origin: files, Pillow's images, arrays."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.data.preprocessing import Preprocessing, decode_image, describe_failure, planes_of, resized
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.text import plain

OneImage: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"
Images: TypeAlias = "OneImage | Iterable[OneImage]"
THRESHOLD = 0.5  # least probability of a label, where an image may have several


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one image.

    Args:
        name: the file, or the position of an image that is not a file.
        label: the most probable class.
        class_name: its name, or its number where the model knows no names.
        probability: probability of that class, 0 to 1.
        top: the most probable classes by name, with their probabilities.
        labels: names of the classes that the image has, where images may have several; else of the one class.
    """

    name: str
    label: int
    class_name: str
    probability: float
    top: tuple[tuple[str, float], ...]
    labels: tuple[str, ...]


def predict(model: AdaptedModel, images: Images, *, top: int = 5, batch_size: int = 64) -> list[Prediction]:
    """See `AdaptedModel.predict`. An array is uint8 in [H, W] or [H, W, C]; a tensor uint8 in [C, H, W]."""
    if top < 1 or batch_size < 1:
        raise UserError(f"top={top}, batch_size={batch_size}; expected whole numbers of at least 1")
    preprocessing = Preprocessing.from_timm(model.backbone.default_cfg)
    found: list[Prediction] = []
    for batch in batched(enumerate(_each(images)), batch_size):
        pixels = torch.from_numpy(
            np.stack([prepared(image, f"image {number}", preprocessing) for number, image in batch])
        )
        names = [str(image) if isinstance(image, (str, os.PathLike)) else str(number) for number, image in batch]
        found += predictions(model, names, probabilities(model, pixels, preprocessing), top)
    return found


@torch.no_grad()
def probabilities(model: AdaptedModel, pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 images [b, C, H, W] → float32 probabilities [b, classes] on the CPU, in evaluation mode.

    Where images may have several labels, each class has a probability of its own.
    """
    parameter = next(model.parameters())
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    images = ((pixels.float() / 255 - mean) / std).to(parameter.device, parameter.dtype)
    in_training = [module for module in model.modules() if module.training]  # a part of a model may be in evaluation
    try:
        logits = model.eval()(images).float()
    finally:
        for module in in_training:
            module.training = True
    return probabilities_of(logits, model.multi_label).cpu()


def probabilities_of(logits: Tensor, several: bool) -> Tensor:
    """Logits [b, classes] → probabilities: softmax, or with `several` (labels an image) the sigmoid of each class."""
    return logits.sigmoid() if several else logits.softmax(dim=1)


def predictions(model: AdaptedModel, names: Sequence[str], shares: Tensor, top: int) -> list[Prediction]:
    """From probabilities [b, classes] to predictions."""
    order = shares.argsort(dim=1, descending=True, stable=True)

    def name_of(label: int) -> str:
        return str(label) if model.class_names is None else model.class_names[label]

    found = []
    for name, row, best in zip(names, shares.tolist(), order.tolist(), strict=True):
        labels = [k for k in best if row[k] >= THRESHOLD] if model.multi_label else best[:1]
        found.append(
            Prediction(
                name=name,
                label=best[0],
                class_name=name_of(best[0]),
                probability=row[best[0]],
                top=tuple((name_of(k), row[k]) for k in best[:top]),
                labels=tuple(map(name_of, labels)),
            )
        )
    return found


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` items."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _each(images: Images) -> Iterable[OneImage]:
    if isinstance(images, (str, os.PathLike, Image.Image)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim <= 3
    ):
        return [images]
    return images


def prepared(image: Any, name: str, preprocessing: Preprocessing) -> np.ndarray:
    """An image as uint8 [C, H, W], as in training. Raises UserError naming the file or, for other images, `name`."""
    name = plain(image, 1_000) if isinstance(image, (str, os.PathLike)) else name
    try:
        if isinstance(image, (str, os.PathLike)):
            return decode_image(user_path(image), preprocessing)
        return resized(planes_of(_opened(image, preprocessing.channels), preprocessing.channels), preprocessing)
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist; expected an image") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise far more than OSError on damaged files
        raise UserError(f"{name} cannot be used ({describe_failure(error)}); expected an image") from error


def _opened(image: Any, channels: int) -> Image.Image:
    """An image as Pillow's. Raises ValueError for values that are no pixels."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a {type(image).__name__}; files, Pillow's images, arrays and tensors are read")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(
            f"{image.dtype} {image.shape}; pixels are uint8, [H, W] or [H, W, C] (a tensor [C, H, W]). A batch that is "
            f"normalised already goes to model(images)"
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim == 3 and image.shape[2] not in (3, 4):
        raise ValueError(f"{image.shape[2]} channels; give a file (.npy) where there are more than four")
    return Image.fromarray(np.ascontiguousarray(image))
