"""Times VMamba's ops on a CUDA GPU: mambapeft_vision/benchmarks/ss2d.py."""

from mambapeft_vision.benchmarks.ss2d import main

if __name__ == "__main__":
    main()
