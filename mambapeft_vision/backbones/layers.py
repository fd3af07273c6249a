"""Layers that backbones share: plain PyTorch layers that read their weights through ports."""

from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from mambapeft_kernels import FUSED, gelu
from mambapeft_kernels.derivatives import differentiated_again, plain_gradients, transformed
from mambapeft_kernels.gelu import gelu_of_frozen_linear
from mambapeft_kernels.low_rank.linear import compute_dtype
from timm.layers import lecun_normal_
from torch import Tensor, nn

from mambapeft_vision.backbones.ports import FunctionPort, Port, Ported, SidePort
from mambapeft_vision.utils.errors import UserError

Kind = TypeVar("Kind", bound=nn.Module)


class PortedLinear(Ported, nn.Linear):
    """`nn.Linear` with a side port; without a bias, the port `offset` takes one."""

    cast_weights = ("weight", "bias")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        name: str = "linear",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.side = SidePort(name)
        self.offset = Port(f"{name}.offset")  # () → [out]

    @property
    def keeps_zeros(self) -> bool:
        """Whether a token of zeros comes out as zeros, and gives no weight a gradient."""
        return self.bias is None and self.offset.value is None and self.side.only_low_rank

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        return self.side.linear(x, self.read("weight", dtype), self._bias(dtype), self.training)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        if self.bias is not None:
            return self.read("bias", dtype)
        return None if self.offset.value is None else self.offset.value()


class LinearWeights(Ported, nn.Linear):
    """Holds the weights of a linear map that a kernel computes; `forward` runs if `computes_as` is false."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.read("bias")
        return F.linear(x, self.read("weight", compute_dtype(x)), bias)


class ConvWeights(Ported, nn.Conv1d):
    """Holds the weights of a convolution that a kernel computes; `forward` runs if `computes_as` is false."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.read("bias")
        return self._conv_forward(x, self.read("weight"), bias)


class PortedConv2d(Ported, nn.Conv2d):
    """`nn.Conv2d`, its weights read through ports; or by a kernel instead, where `computes_as` says so."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, None if self.bias is None else self.read("bias"))

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with another bias, or without one."""
        weight = self.read("weight")
        frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        if not (frozen and x.requires_grad and self._is_plain) or transformed() or torch.compiler.is_compiling():
            return self._conv_forward(x, weight, bias)
        dtype = compute_dtype(x)
        bias = None if bias is None else bias.to(dtype)
        geometry = self.stride, self.padding, self.dilation, self.groups
        return _FrozenConvolution.apply(x.to(dtype), weight.to(dtype), bias, geometry)

    @property
    def _is_plain(self) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)


class _FrozenConvolution(torch.autograd.Function):
    """PyTorch's convolution keeps its input for the weight's gradient even where nothing asks for that."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.shape = geometry, x.shape
        last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if last else torch.contiguous_format
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        if differentiated_again(grad):  # a linear map: its gradient is the same at every input
            anywhere = grad.new_zeros(ctx.shape, requires_grad=True)
            (dx,) = plain_gradients(lambda x: F.conv2d(x, weight, None, *ctx.geometry), (anywhere,), (True,), grad)
            return dx, None, None, None
        unread = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        stride, padding, dilation, groups = ctx.geometry
        dx, _, _ = torch.ops.aten.convolution_backward(
            grad, unread, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return dx, None, None, None


def computes_as(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether `module` computes what a `kind` does, so that a kernel may read its weights instead of calling it.

    It is false if other code takes part in the computation: another module in its place or around it (adapters of other
    libraries, quantisation), a replaced `forward` (offloading), or hooks (pruning, weight norm, activations), of this
    module or global ones. Code that only computes its weights (weight ports, `torch.nn.utils.parametrize`) is allowed.
    """
    return (
        getattr(type(module), "forward", None) is kind.forward
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not any(hooks for hooks in _HOOKS_OF_ALL_MODULES)
    )


# The tables that torch.nn.modules.module.register_module_*_hook fill.
_HOOKS_OF_ALL_MODULES = tuple(
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)


# Inputs of an MLP up to which its hidden layer is computed again: there a product's time is that of its bytes.
_MOST_INPUTS_AGAIN = 128


class Mlp(nn.Module):
    """fc2(GELU(fc1(h))), with a side port beside the whole of it."""

    def __init__(self, embed_dim: int, hidden: int, *, name: str) -> None:
        super().__init__()
        self.fc1 = PortedLinear(embed_dim, hidden, name=f"{name}.fc1")
        self.fc2 = PortedLinear(hidden, embed_dim, name=f"{name}.fc2")
        self.side = SidePort(name)
        self.kernel = "torch"

    def forward(self, h: Tensor) -> Tensor:
        return self.side(h, self.fc2(self._hidden(h)), self.training)

    def _hidden(self, h: Tensor) -> Tensor:
        """GELU(fc1(h)); narrow frozen maps keep h for the backward pass instead of the hidden layer."""
        fc1, dtype = self.fc1, compute_dtype(h)
        fused = dtype == torch.bfloat16 and self.kernel in FUSED and not transformed()
        if fused and computes_as(fc1, PortedLinear) and not fc1.side.branches and fc1.bias is not None:
            weight, bias = fc1.read("weight", dtype), fc1.read("bias", dtype)
            again = h.requires_grad and fc1.in_features <= _MOST_INPUTS_AGAIN
            frozen = not weight.requires_grad and not bias.requires_grad
            if not torch.is_grad_enabled() or (frozen and again):
                return gelu_of_frozen_linear(h.to(dtype), weight.to(dtype), bias.to(dtype), self.kernel)
        return gelu(fc1(h), self.kernel)


class PortedLayerNorm(Ported, nn.LayerNorm):
    """`nn.LayerNorm`, its weights read through ports."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.read("weight"), self.read("bias"), self.eps)


class PortedRMSNorm(Ported, nn.RMSNorm):
    """`nn.RMSNorm` in its weight's dtype, which is read through a port. The port `offset` takes a bias."""

    def __init__(self, dim: int, eps: float, *, name: str) -> None:
        super().__init__(dim, eps)
        self.offset = Port(f"{name}.offset")  # () → [D]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.read("weight")
        normed = F.rms_norm(x.to(weight.dtype), self.normalized_shape, weight, self.eps)
        return normed if self.offset.value is None else normed + self.offset.value()


class PortedPatches(Ported, nn.Conv2d):
    """A patch embedding: `nn.Conv2d` without padding, and a side port on its input and output maps.

    Computed as one matrix product over the patches: cuDNN's convolutions take seven times as long for so wide a stride.
    """

    def __init__(self, *args: Any, name: str = "patches", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.side = SidePort(name)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, D, rows, columns]."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UserError(
                f"images have shape {list(x.shape)}; expected [B, {self.in_channels}, H, W]. Change the images, or "
                f"build the backbone for theirs (in_chans=…)"
            )
        bias = None if self.bias is None else self.read("bias")
        compute = self._as_product if self._is_plain else self._conv_forward
        return self.side(x, compute(x.to(compute_dtype(x)), self.read("weight"), bias), self.training)

    @property
    def _is_plain(self) -> bool:
        """Whether there is no padding, dilation or group; other libraries make layers of this type that have some."""
        return self.padding == (0, 0) and self.dilation == (1, 1) and self.groups == 1

    def _as_product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (height, width), (down, right) = self.kernel_size, self.stride
        patches = x.unfold(2, height, down).unfold(3, width, right)  # [B, C, rows, columns, height, width]
        flat = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return F.linear(flat, weight.flatten(1), bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """[B, 3, H, W] → [B, patches, D]; overlapping patches when stride < patch_size."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, stride: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        if patch_size > min(img_size):
            raise UserError(
                f"backbone.patch_size={patch_size} is larger than the images, {img_size[0]}x{img_size[1]}; lower it or "
                f"set backbone.img_size"
            )
        self.img_size = img_size
        rows, columns = ((size - patch_size) // stride + 1 for size in img_size)
        self.grid_size = rows, columns
        self.num_patches = rows * columns
        self.images = FunctionPort("images")
        self.proj = PortedPatches(in_chans, embed_dim, patch_size, stride, name="patch_embed.proj")

    def init_weights(self) -> None:
        """LeCun's normal distribution, and a zero bias."""
        lecun_normal_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.img_size:
            raise UserError(
                f"images are {images.shape[-2]}x{images.shape[-1]}, but this backbone was built for "
                f"{self.img_size[0]}x{self.img_size[1]}; resize them or set backbone.img_size"
            )
        return self.proj(self.images(images)).flatten(2).transpose(1, 2)


def both_sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of images, from both or from one number for both."""
    if isinstance(img_size, int):
        return img_size, img_size
    height, width = img_size
    return height, width


def zero_head(num_features: int, num_classes: int, **like: Any) -> nn.Module:
    """A linear head that starts at zero; the identity for no classes. like: device and dtype."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(num_features, num_classes, **like)
    zero_init(head)
    return head


def zero_init(head: nn.Module) -> None:
    """Sets all parameters of a head to zero."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
