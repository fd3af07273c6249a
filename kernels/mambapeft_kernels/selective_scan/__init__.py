"""The selective scan (S6) recurrence."""

from mambapeft_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
