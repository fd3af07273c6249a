"""Values of uint8 images from a table."""

from mambapeft_kernels.pixel_lookup.api import look_up

__all__ = ["look_up"]
