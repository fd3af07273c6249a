"""Tests the adapter of a finished run again, merged: python evaluate.py run=outputs/..."""

import hydra
from omegaconf import DictConfig

from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.run.exit import job, run_cli
from mambapeft_vision.utils.startup import imports_kept

register_schemas()


@hydra.main(config_path="configs", config_name="evaluate", version_base="1.3")
@job
def main(cfg: DictConfig) -> None:
    with imports_kept():  # PyTorch's, for which --help need not wait
        from mambapeft_vision.run.evaluate import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    run_cli(main)
