"""What a pretrained backbone's features are worth: mambapeft_vision/benchmarks/features.py."""

from mambapeft_vision.benchmarks.features import main

if __name__ == "__main__":
    main()
