"""Hydra's command line around a function of a config: overrides, --multirun, --cfg, --help."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from omegaconf import DictConfig

from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.run.exit import job
from mambapeft_vision.utils.errors import SweepEnded
from mambapeft_vision.utils.paths import configs_folder


def run_app(config_name: str, function: Callable[[DictConfig], float | None], arguments: Sequence[str]) -> None:
    """Composes a root config (a file of configs/, or one in Hydra's store) and calls `function`, once a job."""
    register_schemas()
    errors: list[Exception] = []
    one_job = _keeping_errors(job(function), errors)
    app = hydra.main(config_path=str(configs_folder()), config_name=config_name, version_base="1.3")(one_job)
    with _command_line(arguments):
        app()
    if errors:
        raise errors[0]


def _keeping_errors(function: Callable[[DictConfig], Any], errors: list[Exception]) -> Callable[[DictConfig], Any]:
    """Collects errors that Hydra would precede by a line of its own. Errors that end a sweep still reach it."""

    @functools.wraps(function)
    def kept(cfg: DictConfig) -> Any:
        try:
            return function(cfg)
        except SweepEnded:
            raise
        except Exception as error:
            errors.append(error)
            return None

    return kept


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Puts the arguments into sys.argv, where Hydra reads them."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
