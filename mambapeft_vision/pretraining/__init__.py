"""Pretraining of small backbones on labelled images: one backbone, a head for each source (docs/how-to/pretrain.md)."""
