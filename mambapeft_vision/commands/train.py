"""Fine-tunes a backbone: mambapeft train method=lora_p_x dataset=vtab/cifar (mambapeft train --help)."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mambapeft_vision.commands.hydra_app import run_app
from mambapeft_vision.run.overrides import prepare_multirun
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.run.rerun import ROOT_CONFIG, split_flag, store_root_config
from mambapeft_vision.utils.paths import configs_folder
from mambapeft_vision.utils.startup import begin_cuda, imports_kept
from mambapeft_vision.utils.timeline import mark


def main(arguments: Sequence[str]) -> None:
    configs = configs_folder()
    result, rest = split_flag(arguments)
    expected = None if result is None else store_root_config(result, rest, configs)

    def train_one(cfg: DictConfig) -> float | None:
        """The test accuracy, which sweepers that search maximise; None: there is none."""
        overrides = HydraConfig.get().overrides.task
        if not cfg.dry_run and cfg.pretrain is None:
            begin_cuda(str(cfg.trainer.device))
        with imports_kept():  # PyTorch's, for which --help need not wait
            from mambapeft_vision.run.run import train
        mark("imports")

        if cfg.pretrain is None:
            record = train(cfg, overrides, expected=expected)
            return None if record is None else record.accuracy
        from mambapeft_vision.pretraining.run import run_pretraining

        OwnCode(backbones=cfg.paths.backbones).add()
        run_pretraining(cfg, overrides)
        return None

    run_app("train" if expected is None else ROOT_CONFIG, train_one, prepare_multirun(rest, configs))
