"""Many adapters on one backbone in memory: each request names one, and a batch is computed adapter by adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mambapeft_vision.adapter.files import read_adapter
from mambapeft_vision.adapter.load import load_shared
from mambapeft_vision.adapter.model import AdaptedModel
from mambapeft_vision.backbones.contract import Backbone
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.text import plain
from mambapeft_vision.utils.typed import nearest


class AdapterPool:
    """Adapters by name on one backbone, whose tensors all of them share.

    An adapter adds its own tensors and nothing else, so a switch copies nothing. Adapters can have any methods, also
    methods that do not merge, and any number of classes. An adapter that trains tensors of the backbone (bitfit, full)
    has copies of them.

    Args:
        backbone: the one that the adapters were trained on, on the device that computes; it is not changed.

    Example:
        >>> pool = AdapterPool(create_backbone("vim_nano_patch8_64"))   # doctest: +SKIP
        >>> pool.add("birds", "outputs/.../seed0-1234abcd")             # doctest: +SKIP
        >>> logits = pool(images, ["birds", "cars", "birds"])           # doctest: +SKIP
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._shared = {tensor.data_ptr() for tensor in _tensors(backbone)}
        self._models: dict[str, AdaptedModel] = {}

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._models)

    def add(self, name: str, folder: str | Path) -> None:
        """Loads an adapter.

        Args:
            name: the name that requests use.
            folder: the folder of a finished run or of an adapter.
        Raises: UserError for a name that is taken, or an adapter that was trained on another backbone.
        """
        if name in self._models:
            raise UserError(f"there is an adapter {plain(name)} already; remove it first, or take another name")
        device = next(self.backbone.parameters()).device
        self._models[name] = load_shared(read_adapter(folder), self.backbone).to(device)

    def remove(self, name: str) -> None:
        """Removes an adapter and frees its memory. Raises UserError for an unknown name."""
        self.model(name)
        del self._models[name]

    def model(self, name: str) -> AdaptedModel:
        """The model of one adapter. Raises UserError for an unknown name."""
        if name not in self._models:
            raise UserError(f"there is no adapter {plain(name)}; {nearest(name, self._models)}")
        return self._models[name]

    @torch.no_grad()
    def __call__(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Computes each image with its adapter: logits [classes of the adapter], in the order of the requests.

        Args:
            images: [B, C, H, W], normalised, on the backbone's device.
            names: the adapter's name for each image. The pool computes images of one adapter together.
        """
        if len(names) != len(images):
            raise UserError(f"{len(names)} names for {len(images)} images; expected one for each")
        places: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            places.setdefault(name, []).append(place)
        models = {name: self.model(name) for name in places}  # before anything is computed
        for model in models.values():
            if model.training:  # somebody's loop left it so: drop path and dropout would change the answers
                model.eval()
        results: dict[int, Tensor] = {}
        for name, of in places.items():
            batch = images if len(of) == len(images) else images[torch.tensor(of, device=images.device)]
            results |= dict(zip(of, models[name](batch).unbind()))
        return [results[place] for place in range(len(images))]

    def bytes_of(self, name: str) -> int:
        """Bytes that one adapter takes beside the backbone. Raises UserError for an unknown name."""
        own = {tensor.data_ptr(): tensor for tensor in _tensors(self.model(name))}
        sizes: list[int] = [tensor.nbytes for place, tensor in own.items() if place not in self._shared]
        return sum(sizes)

    @property
    def backbone_bytes(self) -> int:
        """Bytes of the backbone, which all adapters share."""
        return sum(tensor.nbytes for tensor in _tensors(self.backbone))


def _tensors(model: Backbone | AdaptedModel) -> list[Tensor]:
    module = cast(nn.Module, model)
    return [*module.parameters(), *module.buffers()]
