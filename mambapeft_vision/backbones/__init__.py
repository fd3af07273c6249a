"""Backbones: plain models with ports, registered with timm."""

from mambapeft_vision.backbones import vim, vit
from mambapeft_vision.backbones.registry import create_backbone

__all__ = ["create_backbone", "vim", "vit"]
