"""The mini benchmark's runs, tables and document: mambapeft_vision/benchmarks/mini_command.py; --help says how."""

import time

STARTED = time.monotonic()  # before the imports, which --max-minutes counts too

from functools import partial  # noqa: E402

from mambapeft_vision.benchmarks.mini_command import main  # noqa: E402
from mambapeft_vision.run.exit import run_cli  # noqa: E402

if __name__ == "__main__":
    run_cli(partial(main, started=STARTED))
