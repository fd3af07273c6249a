"""Fine-tunes a backbone: python train.py method=lora_p_x dataset=vtab/cifar (python train.py --help)."""

from mambapeft_vision.cli import run

if __name__ == "__main__":
    run("train")
