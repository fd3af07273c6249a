"""Searches for a hybrid in two steps, with Optuna (TPE).

python scripts/search_hybrid.py space=hybrid_step1 [trials=100] [protocol=validation|reference] [storage=URL] [name=...]
python scripts/search_hybrid.py space=hybrid_step2

space: a file of configs/search. Anything else is a Hydra override of the runs, such as dataset=vtab/cifar,vtab/dtd.
The same command, started again on this or another machine, works on the same study; between machines without a common
file system, storage=postgresql://USER:PASSWORD@HOST/NAME shares it. trials counts those of all workers. The winner and
the plots are in searches/<name>.
"""

import sys
from pathlib import Path

from mambapeft_vision.run.exit import run_cli
from mambapeft_vision.search.command import parse
from mambapeft_vision.search.search import search

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = {"space": "hybrid_step1", "trials": "100", "protocol": "validation"}


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    print(f"winner: {search(parse(sys.argv[1:], CONFIGS, DEFAULTS, tuned=False), CONFIGS)}")


if __name__ == "__main__":
    run_cli(main)
