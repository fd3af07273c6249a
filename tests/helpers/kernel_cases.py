"""Inputs, references and the error measure of the kernel tests, which the benchmark of the kernels uses too."""

from mambapeft_vision.benchmarks.kernel_cases import (
    FIELDS,
    cast,
    errors,
    make_directions,
    make_xz,
    plain_mixer,
    relative_error,
    results,
)

__all__ = ["FIELDS", "cast", "errors", "make_directions", "make_xz", "plain_mixer", "relative_error", "results"]
