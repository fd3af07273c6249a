"""`python -m mambapeft_vision` is the command `mambapeft`, also where that is not on the PATH."""

from mambapeft_vision.cli import run

if __name__ == "__main__":
    run()
