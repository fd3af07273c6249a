"""Predicts the classes of images with the model of a finished run: mambapeft predict run=outputs/... images=DIR"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.own_code import OwnCode, add_own_code_options
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.startup import imports_kept

SOME_SKIPPED = 3  # exit code: some images could not be read
EXAMPLES = """\
examples:
  mambapeft predict run=outputs/... images=new_photos                     a folder, to standard output as CSV
  mambapeft predict run=outputs/... images='photos/*.jpg' --out classes.csv
  mambapeft predict run=outputs/... a.jpg b.png --out classes.jsonl --top 3
  mambapeft predict run=outputs/... images=inbox --watch --out classes.csv   continues as the folder fills up (Ctrl-C)

The columns are file, class, probability and top: the most probable classes. Images are prepared as in training,
whatever their size. Those that cannot be read are said and skipped; the exit code is then 3.
"""


def main(arguments: Sequence[str]) -> int | None:
    options = _parser().parse_intermixed_options(arguments)
    run, images = run_and_images(options.words)
    out = None if options.out is None else options.out.expanduser()
    if options.top < 1 or (options.batch_size is not None and options.batch_size < 1):
        raise UserError(f"--top {options.top}, --batch-size {options.batch_size}: expected at least 1")
    if options.watch is not None and (len(images) != 1 or not Path(images[0]).expanduser().is_dir()):
        raise UserError("--watch: expected images=DIR, one folder that fills up")
    with imports_kept():  # PyTorch's, for which --help need not wait
        from mambapeft_vision.run import predict
        from mambapeft_vision.run.trained import open_trained

    if out is not None:
        predict.format_of(out)  # before the model is loaded
    files = [] if options.watch is not None else predict.find_images(images)
    trained = open_trained(
        run,
        weights=options.backbone_weights,
        device=options.device,
        kernel=options.kernel,
        own=OwnCode(options.methods, options.backbones),
    )
    how = {"top": options.top, "batch_size": options.batch_size}
    if options.watch is None:
        with predict.output(out) as write:
            outcome = predict.predict_files(trained, files, write, **how)
        return SOME_SKIPPED if outcome.skipped else None
    with predict.output(out, append=True) as write:
        known = set() if out is None else predict.files_in(out)
        predict.watch(
            Path(images[0]).expanduser(),
            known,
            lambda new: predict.predict_files(trained, new, write, quiet=True, **how),
            every_s=options.watch,
        )
    return None


def run_and_images(words: Sequence[str]) -> tuple[str, list[str]]:
    """The run and the images of a command line: `run=DIR`, `images=WHAT` and names of files. Raises UserError."""
    run, images = None, []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key == "run":
            run = value
        else:
            images.append(value if equals and key == "images" else word)
    if not run:
        raise UserError("run is missing; expected run=DIR, the folder of a finished run or of an adapter")
    if not images or "" in images:
        raise UserError("images are missing; expected images=DIR, images='*.jpg' or names of files")
    return run, images


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that uses the model of a run."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--kernel", help="a kernel backend (default: the one that the run asked for)")
    parser.add_argument("--backbone-weights", metavar="FILE", help="place of the backbone's weights now")
    add_own_code_options(parser)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "mambapeft predict",
        f"Predicts the classes of images with the model of a finished run.\n\n{EXAMPLES}",
        usage="%(prog)s run=DIR images=WHAT [options]",
    )
    parser.add_argument(
        "words", nargs="+", metavar="run=DIR images=WHAT", help="the run, and folders, files or patterns"
    )
    parser.add_argument("--out", type=Path, help="a .csv or .jsonl file (default: standard output, as CSV)")
    parser.add_argument("--top", type=int, default=5, help="number of classes for each image (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="images in a batch (default: 256 on a GPU, else 32)")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=2.0,
        metavar="S",
        help="look for new images every S seconds (default: 2)",
    )
    add_model_options(parser)
    return parser
