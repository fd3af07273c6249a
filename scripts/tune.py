"""Tunes learning rate, scale and decay of one method on val200, with Optuna (TPE).

python scripts/tune.py method=lora_p_x [trials=30] [space=tune] [storage=URL] [name=...]

Otherwise as scripts/search_hybrid.py. The space is configs/search/tune.yaml.
"""

import sys
from pathlib import Path

from mambapeft_vision.run.exit import run_cli
from mambapeft_vision.search.command import parse
from mambapeft_vision.search.search import search

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = {"space": "tune", "trials": "30", "protocol": "validation"}


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    print(f"winner: {search(parse(sys.argv[1:], CONFIGS, DEFAULTS, tuned=True), CONFIGS)}")


if __name__ == "__main__":
    run_cli(main)
