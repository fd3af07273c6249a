"""Fine-tunes a Vision Mamba: python train.py method=lora_p_x dataset=vtab/cifar (python train.py --help)."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mambapeft_vision.results.record import RunRecord
from mambapeft_vision.run.config import register_schemas
from mambapeft_vision.run.exit import job, run_cli
from mambapeft_vision.run.overrides import prepare_multirun
from mambapeft_vision.run.rerun import recorded
from mambapeft_vision.utils.startup import imports_kept

CONFIGS = Path(__file__).resolve().parent / "configs"

_record: RunRecord | None = None  # of --from-result

register_schemas()


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
@job
def main(cfg: DictConfig) -> None:
    overrides = HydraConfig.get().overrides.task
    with imports_kept():  # PyTorch's, for which --help need not wait
        from mambapeft_vision.run.run import train

    if cfg.pretrain is not None:
        from mambapeft_vision.pretraining.run import run_pretraining

        run_pretraining(cfg, overrides)
    else:
        train(cfg, overrides, expected=_record)


def prepare_and_run() -> None:
    global _record
    with recorded(sys.argv[1:], CONFIGS) as (arguments, _record):
        sys.argv[1:] = prepare_multirun(arguments, CONFIGS)
        main()


if __name__ == "__main__":
    run_cli(prepare_and_run)
