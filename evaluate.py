"""Tests the adapter of a finished run again, merged: python evaluate.py run=outputs/..."""

from mambapeft_vision.cli import run

if __name__ == "__main__":
    run("evaluate")
