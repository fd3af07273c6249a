"""Searches for a hybrid in two steps, with Optuna (TPE).

  mambapeft search space=hybrid_step1 [trials=100] [protocol=validation|reference] [storage=URL] [name=...]
  mambapeft search space=hybrid_step2

Anything else is a Hydra override of the runs, such as dataset=vtab/cifar,vtab/dtd. The same command, started again on
this or another machine, works on the same study; between machines without a common file system,
storage=postgresql://USER:PASSWORD@HOST/NAME shares it. The winner and the plots are in searches/<name>.
"""

from collections.abc import Sequence

from mambapeft_vision.search.command import parse
from mambapeft_vision.search.search import search
from mambapeft_vision.utils.paths import configs_folder

DEFAULTS = {"space": "hybrid_step1", "trials": "100", "protocol": "validation"}


def main(arguments: Sequence[str]) -> None:
    configs = configs_folder()
    settings = parse(arguments, configs, DEFAULTS, tuned=False, description=__doc__)
    print(f"winner: {search(settings, configs)}")
