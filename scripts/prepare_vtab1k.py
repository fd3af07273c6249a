#!/usr/bin/env python
"""Fetch, lay out and check VTAB-1K. `python scripts/prepare_vtab1k.py --help` says how."""

import sys

from mambapeft_vision.data.prepare.vtab1k import main

if __name__ == "__main__":
    sys.exit(main())
