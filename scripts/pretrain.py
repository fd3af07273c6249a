#!/usr/bin/env python
"""Pretrain a small backbone on labelled images. `python scripts/pretrain.py --help` says how."""

import sys

from mambapeft_vision.pretraining.run import main

if __name__ == "__main__":
    sys.exit(main())
