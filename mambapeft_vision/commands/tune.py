"""Tunes learning rate, scale and decay of one method on val200, with Optuna (TPE).

  mambapeft tune method=lora_p_x [trials=30] [space=tune] [storage=URL] [name=...]

Otherwise as `mambapeft search`. The space is configs/search/tune.yaml.
"""

from collections.abc import Sequence

from mambapeft_vision.search.command import parse
from mambapeft_vision.search.search import search
from mambapeft_vision.utils.paths import configs_folder

DEFAULTS = {"space": "tune", "trials": "30", "protocol": "validation"}


def main(arguments: Sequence[str]) -> None:
    configs = configs_folder()
    settings = parse(arguments, configs, DEFAULTS, tuned=True, description=__doc__)
    print(f"winner: {search(settings, configs)}")
