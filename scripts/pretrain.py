#!/usr/bin/env python
"""Pretrains a small backbone on labelled images (docs/pretraining.md): python scripts/pretrain.py vim_nano minutes=5.

Short for python train.py pretrain=vim_nano pretrain.minutes=5.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    name, *settings = sys.argv[1:] or ["folder"]
    sys.argv[1:] = [name] if name.startswith("-") else [f"pretrain={name}", *(f"pretrain.{text}" for text in settings)]
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "train.py"), run_name="__main__")
