"""`mambapeft cache` under its older name."""

from mambapeft_vision.cli import run

if __name__ == "__main__":
    run("cache")
