"""Tests the adapter of a finished run again, merged: python evaluate.py run=outputs/..."""

import hydra
from omegaconf import DictConfig

from mambapeft_vision.imports import imports_kept
from mambapeft_vision.training.cli import job, run_cli
from mambapeft_vision.training.config import register_schemas

register_schemas()


@hydra.main(config_path="configs", config_name="evaluate", version_base="1.3")
@job
def main(cfg: DictConfig) -> None:
    with imports_kept():  # PyTorch's, for which --help need not wait
        from mambapeft_vision.training.evaluate import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    run_cli(main)
