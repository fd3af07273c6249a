"""Memory and time of many adapters on one backbone: mambapeft_vision/benchmarks/adapters.py."""

from mambapeft_vision.benchmarks.adapters import main

if __name__ == "__main__":
    main()
