"""Times every kernel on a CUDA GPU: mambapeft_vision/benchmarks/kernels.py."""

from mambapeft_vision.benchmarks.kernels import main

if __name__ == "__main__":
    main()
