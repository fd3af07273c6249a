"""A recorded run again: mambapeft rerun RESULT [key=value ...], which is mambapeft train --from-result RESULT ..."""

from collections.abc import Sequence

from mambapeft_vision.commands import train
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.rerun import FLAG


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(
        "mambapeft rerun",
        "A recorded run again, on the images and weights that it had; the outcome is compared with the recorded one.\n"
        "Files go to <paths.outputs>-again. Further words are those of `mambapeft train`, such as seed=1.",
        usage="%(prog)s RESULT [key=value ...]",
    )
    parser.add_argument("result", help="result.json, or the folder of a finished run")
    options, rest = parser.parse_known_args(arguments)
    train.main([f"{FLAG}={options.result}", *rest])
