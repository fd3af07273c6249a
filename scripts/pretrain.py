#!/usr/bin/env python
"""Pretrains a small backbone on labelled images (docs/pretraining.md): python scripts/pretrain.py vim_nano minutes=5.

Short for python train.py pretrain=vim_nano pretrain.minutes=5.
"""

import runpy
import sys
from pathlib import Path

from mambapeft_vision.pretraining.arguments import train_arguments

if __name__ == "__main__":
    sys.argv[1:] = train_arguments(sys.argv[1:])
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "train.py"), run_name="__main__")
