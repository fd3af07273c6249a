"""Draws which parts of an image a prediction rests on: mambapeft explain run=outputs/... image=cat.jpg"""

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.commands.predict import add_model_options
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.startup import imports_kept
from mambapeft_vision.utils.text import plain

EXAMPLES = """\
example:
  mambapeft explain run=outputs/... image=cat.jpg --out why.png

Squares of the image are covered one by one; where that lowers the probability of the class, the square speaks for it.
"""


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_intermixed_options(arguments)
    given = dict(word.partition("=")[::2] for word in options.words)
    if set(given) != {"run", "image"} or not all(given.values()) or len(options.words) != 2:
        raise UserError(f"{' '.join(options.words)}: expected run=DIR, the folder of a run, and image=FILE")
    image = Path(given["image"]).expanduser()
    with imports_kept():  # PyTorch's, for which --help need not wait
        from mambapeft_vision.run.explain import draw, explain
        from mambapeft_vision.run.trained import open_trained

    trained = open_trained(
        given["run"],
        weights=options.backbone_weights,
        device=options.device,
        kernel=options.kernel,
        own=OwnCode(options.methods, options.backbones),
    )
    found = explain(trained, image, grid=options.grid, class_name=options.class_name)
    out = Path(f"{image.stem}-explained.png") if options.out is None else options.out.expanduser()
    draw(found, out)
    top = ", ".join(f"{plain(name)} {share:.1%}" for name, share in found.prediction.top)
    say(f"{image}: {top}. The evidence for {plain(found.class_name)} is drawn in {out}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "mambapeft explain",
        f"Draws which parts of an image a prediction rests on.\n\n{EXAMPLES}",
        usage="%(prog)s run=DIR image=FILE [options]",
    )
    parser.add_argument("words", nargs="+", metavar="run=DIR image=FILE", help="the run and the image")
    parser.add_argument("--out", type=Path, help="the picture (default: NAME-explained.png here)")
    parser.add_argument("--grid", type=int, default=14, help="number of squares along each side (default: %(default)s)")
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class to explain (default: the most probable)"
    )
    add_model_options(parser)
    return parser
