"""Backbones: plain models with ports, registered with timm. Files of one's own: `add_backbones_folder`."""

from mambapeft_vision.backbones import arm, mambareg, videomamba, vim, vit, vmamba
from mambapeft_vision.backbones.registry import add_backbones_folder, create_backbone

__all__ = ["add_backbones_folder", "arm", "create_backbone", "mambareg", "videomamba", "vim", "vit", "vmamba"]
