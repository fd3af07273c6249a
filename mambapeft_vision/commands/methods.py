"""Lists the presets (method=NAME), describes those that are named, or says which of them fit a backbone, and why not.

mambapeft methods
mambapeft methods lora_p_x hybrid
mambapeft methods backbone=vit_s
mambapeft methods backbones=DIR backbone=NAME     a backbone that a file of your own registers, and its code is run
"""

from collections.abc import Iterable, Sequence

from mambapeft_vision.adapter.presets import Preset, fitting_presets, read_presets, registered_name
from mambapeft_vision.backbones.registry import check_registered
from mambapeft_vision.run.arguments import ArgumentParser
from mambapeft_vision.run.own_code import OwnCode
from mambapeft_vision.utils.errors import UserError
from mambapeft_vision.utils.paths import configs_folder
from mambapeft_vision.utils.typed import nearest


def main(arguments: Sequence[str]) -> None:
    known = sorted(file.stem for file in (configs_folder() / "backbone").glob("*.yaml"))
    parser = ArgumentParser("mambapeft methods", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets to describe (default: list all)")
    parser.add_argument(
        "--backbone", metavar="BACKBONE", help="list the presets that fit this backbone: " + ", ".join(known)
    )
    parser.add_argument("--backbones", metavar="DIR", help="backbone files of your own; runs their code")
    options = parser.parse_options(arguments)
    presets = read_presets(configs_folder() / "method")
    for name in options.names:
        if name not in presets:
            raise UserError(f"{name} is no method; {nearest(name, presets)}")
    chosen = {name: presets[name] for name in options.names or presets}
    if options.backbone is not None:
        OwnCode(backbones=options.backbones).add()
        name = options.backbone if options.backbones else registered_name(configs_folder(), options.backbone)
        check_registered(name)
        print_fitting(chosen, options.backbone, name)
    elif options.names:
        print("\n\n".join(map(described, chosen.values())))
    else:
        print_lines((preset.name, f"{preset.count:>12,}  {preset.what}") for preset in chosen.values())


def print_fitting(presets: dict[str, Preset], backbone: str, registered: str) -> None:
    """One line for each preset that fits a backbone, then why the others do not.

    backbone: what the user calls it. registered: its name in timm.
    """
    fitting, reasons = fitting_presets(configs_folder() / "method", registered)
    fitting = [name for name in fitting if name in presets]
    misfits = [name for name in reasons if name in presets]
    print(f"{len(fitting)} of {len(presets)} methods fit {backbone}:")
    print_lines((name, presets[name].what) for name in fitting)
    if misfits:
        print(f"\nThese do not fit {backbone}:")
        print_lines((name, reasons[name]) for name in misfits)


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Names and texts in two columns."""
    rows = list(lines)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def described(preset: Preset) -> str:
    """What a preset is, in a few lines."""
    return "\n".join(
        [
            f"{preset.name}: {preset.what}",
            f"  {preset.formula}",
            f"  {preset.count:,} parameters on {preset.backbone}, without the head",
            f"  paper: {preset.paper}",
            f"  {preset.run}",
        ]
    )
