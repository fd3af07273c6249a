"""Runs from Python."""

from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run import run
from mambapeft_vision.run.compose import compose
from mambapeft_vision.run.exit import summary
from mambapeft_vision.utils.errors import UserError


def train(*overrides: str, config_dir: str | Path | None = None) -> RunRecord | None:
    """Fine-tunes as `mambapeft train` with the same overrides does.

    The run has its folder below paths.outputs: an unfinished one is continued, a finished one is not repeated.

    Args:
        overrides: groups and keys, such as `"method=lora_p_x"`, `"dataset=vtab/cifar"`, `"trainer.max_epochs=20"`.
        config_dir: a folder with options of your own, such as method/mine.yaml.
    Returns: the result of the run; None for a dry run (`"dry_run=true"`).
    Raises: UserError for what the caller can repair.

    Example:
        >>> result = train("experiment=demo", "method=lora_p_x")  # doctest: +SKIP
        >>> f"{result.accuracy:.1%}"  # doctest: +SKIP
        '97.0%'
    """
    try:
        return run.train(compose("train", overrides, config_dir), overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(summary(error)) from error
