"""The base of backbones with mixers of selective scans: choice and compilation of kernels, roles of parameters."""

from concurrent.futures import Future
from typing import Any

import torch
from mambapeft_kernels import BlockSizes, compile_ahead, resolve_backend

from mambapeft_vision.backbones.mixer import Mixer
from mambapeft_vision.backbones.timm_model import TimmModel


class ScanModel(TimmModel):
    """Base of backbones whose `layers` have a `mixer` each."""

    @property
    def blocks(self) -> list[Any]:
        """The blocks, first to last."""
        return list(self.block_list)

    @property
    def mixers(self) -> list[Mixer]:
        """The blocks' mixers, first to last."""
        return [block.mixer for block in self.blocks]

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Role → names of parameters, block after block, and in a block direction after direction."""
        suffixes = self.mixers[0].suffixes

        def mixer(pattern: str) -> tuple[str, ...]:
            """`pattern` has "*" where the suffix of a direction stands."""
            names = [pattern.replace("*", suffix) for suffix in suffixes] if "*" in pattern else [pattern]
            return tuple(f"layers.{i}.mixer.{name}" for i in range(len(self.blocks)) for name in names)

        return {
            "patch_embed": ("patch_embed.proj.weight",),
            "pos_embed": ("pos_embed",),
            "cls_token": ("cls_token",),
            "in_proj": mixer("in_proj.weight"),
            "out_proj": mixer("out_proj.weight"),
            "x_proj": mixer("x_proj*.weight"),
            "dt_proj": mixer("dt_proj*.weight"),
            "dt_bias": mixer("dt_proj*.bias"),
            "conv": mixer("conv1d*.weight"),
            "A_log": mixer("A*_log"),
            "D": mixer("D*"),
        }

    def set_kernel(self, kernel: str, device: torch.device | str) -> str:
        """Chooses the kernel backend for all mixers; returns the name of what will run on `device`."""
        resolved = resolve_backend(kernel, device)
        for mixer in self.mixers:
            mixer.kernel = resolved
        return resolved

    def compile_ahead(self, kernel: str, dtype: torch.dtype, device: torch.device) -> tuple[Future, ...]:
        """Starts to compile a block's kernels for activations of `dtype`; see `mambapeft_kernels.compile_ahead`."""
        mixer = self.mixers[0]
        sizes = BlockSizes(self.embed_dim, mixer.d_inner, mixer.states, mixer.dt_rank, mixer.d_conv)
        return compile_ahead(sizes, mixer.scale, dtype, device, kernel)
