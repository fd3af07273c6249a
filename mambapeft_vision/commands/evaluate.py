"""Tests the adapter of a finished run again, merged: mambapeft evaluate run=outputs/..."""

from collections.abc import Sequence

from omegaconf import DictConfig

from mambapeft_vision.commands.hydra_app import run_app
from mambapeft_vision.utils.startup import imports_kept


def main(arguments: Sequence[str]) -> None:
    run_app("evaluate", evaluate_one, arguments)


def evaluate_one(cfg: DictConfig) -> None:
    """Evaluates one composed config."""
    with imports_kept():  # PyTorch's, for which --help need not wait
        from mambapeft_vision.run.evaluate import evaluate

    evaluate(cfg)
