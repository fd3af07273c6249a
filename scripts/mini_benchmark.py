"""`mambapeft mini` under its older name."""

import time

STARTED = time.monotonic()  # before the imports, which --max-minutes counts too

import sys  # noqa: E402
from functools import partial  # noqa: E402

from mambapeft_vision.commands.mini import main  # noqa: E402
from mambapeft_vision.run.exit import run_cli  # noqa: E402

if __name__ == "__main__":
    run_cli(partial(main, sys.argv[1:], started=STARTED))
