"""Hydra's command line around a function of a config: overrides, --multirun, --cfg, --help."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
from omegaconf import DictConfig

from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.run.exit import job
from mambapeft_vision.utils.paths import configs_folder


def run_app(config_name: str, function: Callable[[DictConfig], None], arguments: Sequence[str]) -> None:
    """Composes a root config (a file of configs/, or one in Hydra's store) and calls `function`, once a job."""
    register_schemas()
    app = hydra.main(config_path=str(configs_folder()), config_name=config_name, version_base="1.3")(job(function))
    with _command_line(arguments):
        app()


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra has no argument for these: it reads sys.argv."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
