"""Images per second and memory of a whole model: mambapeft_vision/benchmarks/model.py."""

from mambapeft_vision.benchmarks.model import main

if __name__ == "__main__":
    main()
