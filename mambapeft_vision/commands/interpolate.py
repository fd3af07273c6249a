"""Between pretrained and adapted weights (WiSE-FT): one factor, chosen on validation images, tested once.

  mambapeft interpolate RUN --select RUN800      α chosen with a run on train800, then used for RUN (train800val200)
  mambapeft interpolate RUN800                   a run on train800 chooses for itself
  mambapeft interpolate RUN --alpha 0.7          a given α

The curve over α is printed and kept. The head stays the adapted one at every α; with --probe RUN it goes from a linear
probe's to the adapted one. Methods that do not fold into the weights are refused. The result is recorded below --out
with the setting `interpolation`, which `mambapeft tables` and `report` show in a row of its own.
"""

from collections.abc import Sequence
from pathlib import Path

from mambapeft_vision.results.record import read_record
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.own_code import OwnCode, add_own_code_options
from mambapeft_vision.utils.console import say
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.names import user_path
from mambapeft_vision.utils.startup import imports_kept


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser("mambapeft interpolate", __doc__)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--select", metavar="RUN", help="a run with the same settings on train800, to choose α")
    parser.add_argument("--alpha", type=float, help="factor: 0 is pretrained, 1 adapted (default: chosen)")
    parser.add_argument("--alphas", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", help="default: %(default)s")
    parser.add_argument("--split", default="val200", help="split on which α is chosen (default: %(default)s)")
    parser.add_argument("--probe", metavar="RUN", help="a linear probe on the same task, for the head at α = 0")
    parser.add_argument("--select-probe", metavar="RUN", help="a linear probe for the run of --select")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--cache", metavar="DIR", help="folder of decoded images, such as data/cache")
    add_own_code_options(parser)
    options = parser.parse_options(arguments)
    alphas = _numbers(options.alphas)
    chooser = user_path(options.select or options.run)
    with imports_kept():  # PyTorch's, for which --help need not wait
        from mambapeft_vision.run import interpolate as wise

    own = OwnCode(options.methods, options.backbones)
    how = wise.How(device=options.device, cache=options.cache, own=own)
    alpha, label, found = options.alpha, f"{options.alpha}", None
    if alpha is None:
        wise.check_unseen(read_record(chooser), options.split, chooser)
        if options.probe is not None and options.select is not None and options.select_probe is None:
            raise UserError("--probe: expected --select-probe too, a linear probe on the split of --select")
        probe = options.select_probe if options.select else options.probe
        found = wise.curve(wise.open_interpolation(chooser, options.split, how, probe), alphas)
        alpha, label = wise.best_of(found), f"chosen on {options.split}"
        for one, accuracy in found.items():
            say(f"α {one:<5g} {100 * accuracy:6.2f} % on {options.split}{'  <- chosen' if one == alpha else ''}")
    folder, record = wise.interpolate(
        options.run, alpha, options.out.expanduser(), how, label=label, probe=options.probe, curve=found
    )
    before = read_record(user_path(options.run)).accuracy
    say(f"α {alpha:g}: {100 * record.accuracy:.2f} % on test, {100 * before:.2f} % recorded for the run; {folder}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--alphas {text}; expected numbers such as 0,0.5,1") from None
