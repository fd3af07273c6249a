"""Fine-tunes a Vision Mamba: python train.py method=lora_p_x dataset=vtab/cifar (python train.py --help)."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mambapeft_vision.training.cli import job, run_cli
from mambapeft_vision.training.config import register_schemas

register_schemas()


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
@job
def main(cfg: DictConfig) -> None:
    from mambapeft_vision.training.run import train  # imports PyTorch, for which --help need not wait

    train(cfg, HydraConfig.get().overrides.task)


if __name__ == "__main__":
    run_cli(main)
