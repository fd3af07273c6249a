"""Training speed on one GPU: mambapeft_vision/benchmarks/training.py."""

from mambapeft_vision.benchmarks.training import main

if __name__ == "__main__":
    main()
