"""Backbones: plain models with ports, registered with timm."""

from mambapeft_vision.backbones import arm, mambareg, videomamba, vim, vit, vmamba
from mambapeft_vision.backbones.registry import create_backbone

__all__ = ["arm", "create_backbone", "mambareg", "videomamba", "vim", "vit", "vmamba"]
