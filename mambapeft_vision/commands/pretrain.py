"""Pretrains a small backbone on labelled images (docs/how-to/pretrain.md).

  mambapeft pretrain folder sources.mine.path=/path/to/images steps=2000
  mambapeft pretrain vim_nano steps=5000

NAME is a file of configs/pretrain; every other word is one of its keys. The second line is short for
`mambapeft train pretrain=vim_nano pretrain.steps=5000`.
"""

from collections.abc import Sequence

from mambapeft_vision.commands import train
from mambapeft_vision.pretraining.arguments import train_arguments
from mambapeft_vision.run.arguments import ArgumentParser


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft pretrain", __doc__, usage="%(prog)s NAME [key=value ...]")
    parser.add_argument("name", help="a file of configs/pretrain, such as folder or vim_nano")
    options, overrides = parser.parse_with_overrides(arguments)
    train.main(train_arguments([options.name, *overrides]))
